"""BLIP that describes pictures or answers questions, in the layouts of others and back with the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from models.checkpoint import load_generator
from models.config import BlipCaptionConfig, BlipVqaConfig
from models.config_file import to_dict
from models.huggingface import huggingface_config
from models.presets import preset
from tests.make_generator import TRAINING, State, blip_state
from tests.test_convert import assert_same_bits, convert, read, refused, run
from tests.test_generator_checkpoint import pretrained
from tests.test_llm_checkpoint import CLOSE, SQUARE_VQA
from tests.their_generators import far, our_logits, their_logits
from tests.tiny import TINY, TINY_CAPTION, TINY_VQA

CONFIGS: dict[str, BlipCaptionConfig | BlipVqaConfig] = {"captions": TINY_CAPTION, "answers": SQUARE_VQA}


def saved(path: Path, state: State) -> Path:
    torch.save({"model": state, **TRAINING}, path)
    return path


@pytest.mark.parametrize("half", [False, True], ids=["float32", "half"])
@pytest.mark.parametrize("second", ["lavis", "hf", "ours"])
@pytest.mark.parametrize("first", ["lavis", "hf", "ours"])
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(tmp_path: Path, name: str, first: str, second: str, half: bool) -> None:
    config = CONFIGS[name]
    state = blip_state(config, std=0.2)
    if half:
        state = {n: tensor.half() if tensor.is_floating_point() else tensor for n, tensor in state.items()}
    convert(saved(tmp_path / "m.pth", state), first, tmp_path / "first", config)
    convert(tmp_path / "first", second, tmp_path / "second", config)
    convert(tmp_path / "second", "lavis", tmp_path / "last.pth", config)
    assert_same_bits(read(tmp_path / "last.pth"), state)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_the_folder(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    path = saved(tmp_path / "m.pth", blip_state(config, std=0.2))
    convert(path, "hf", tmp_path / "hf", config)
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]
    kind = json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"][0]
    assert kind == {"captions": "BlipForConditionalGeneration", "answers": "BlipForQuestionAnswering"}[name]
    transformers.utils.logging.disable_progress_bar()
    theirs: Any
    theirs, report = getattr(transformers, kind).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model, _ = load_generator(config, path)
    assert far(our_logits(model, config), their_logits(theirs.eval().requires_grad_(False), config)) < CLOSE


def test_the_preset_is_told_by_the_names_and_sizes(tmp_path: Path) -> None:
    config = preset("blip-caption-demo")
    assert isinstance(config, BlipCaptionConfig)
    path = saved(tmp_path / "m.pth", blip_state(config))
    result = run("--from", path, "--to", "ours", "--out", tmp_path / "m.safetensors")
    assert result.exit_code == 0, result.output
    assert "left out: 2 tied copies, 4 records of the training run, 1 position ids" in result.output
    assert load_generator(config, tmp_path / "m.safetensors")[1].ignored == {}


def test_published_token_ids() -> None:
    """transformers' generate begins with them; which they are elsewhere is the vocabulary's affair."""
    config = preset("blip-caption-base")
    assert isinstance(config, BlipCaptionConfig)
    text = huggingface_config(config)["text_config"]
    assert (text["bos_token_id"], text["sep_token_id"], text["pad_token_id"]) == (30522, 102, 0)
    assert huggingface_config(TINY_CAPTION)["text_config"]["bos_token_id"] is None


def test_the_pretraining_stays_a_model_for_retrieval(tmp_path: Path) -> None:
    state = pretrained()
    convert(saved(tmp_path / "m.pth", state), "hf", tmp_path / "hf", TINY)
    architecture = json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"]
    assert architecture == ["BlipForImageTextRetrieval"]
    convert(tmp_path / "hf", "ours", tmp_path / "m.safetensors", TINY)
    # Nothing is lost on the way: it describes pictures still.
    model, _ = load_generator(BlipCaptionConfig(TINY.vision, TINY.text), tmp_path / "m.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_questions_that_transformers_cannot_express(tmp_path: Path) -> None:
    path, sizes = saved(tmp_path / "m.pth", blip_state(TINY_VQA)), tmp_path / "sizes.json"
    sizes.write_text(json.dumps(to_dict(TINY_VQA)))
    found = refused("--from", path, "--config", sizes, "--to", "hf", "--out", tmp_path / "hf")
    assert "transformers has one configuration for what reads questions and what says answers" in found
    assert not (tmp_path / "hf").exists()
