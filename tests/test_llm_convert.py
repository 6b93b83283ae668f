"""BLIP-2's second stage in the layouts of others and back with the same bits, whole or only what was trained of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from models.blip2 import LN_VISION_EPS
from models.blip2_llm import Blip2Llm
from models.checkpoint import load_generator
from models.config import Blip2LlmConfig
from models.config_file import to_dict
from models.huggingface import huggingface_config
from models.layouts import ENCODER
from models.llm_config import GELU_TANH, LlmConfig
from models.presets import preset
from models.write_weights import write_safetensors
from tests.make_checkpoint import stage1_state, write_stage1
from tests.make_generator import State, llm_settings, llm_state, ours, stage2_state, whole, without_encoder, write_llm
from tests.mindspore_file import mindspore_state, write_ckpt
from tests.test_convert import assert_same_bits, convert, read, refused, run
from tests.their_generators import PLACEHOLDER, far, our_logits, their_logits
from tests.tiny import TINY2, TINY_LLAMA, TINY_OPT, TINY_OPT_350M, TINY_T5, tiny_llm

CLOSE = 2e-5  # tests/test_llm_checkpoint.py
LLMS: dict[str, LlmConfig] = {
    "opt": TINY_OPT,
    "t5": TINY_T5,
    "t5 by tanh": dataclasses.replace(TINY_T5, activation=GELU_TANH),
    "llama": TINY_LLAMA,
}


def language(llm: LlmConfig, dtype: torch.dtype = torch.float32) -> State:
    """A language model as it is published, without what follows from its sizes."""
    return {name: tensor for name, tensor in llm_state(llm, std=0.2, dtype=dtype).items() if not name.endswith("inv_freq")}


def trained(path: Path, config: Blip2LlmConfig) -> Path:
    """What blip-train writes where the image encoder and the language model are frozen."""
    state = without_encoder(ours(config, stage2_state(config, std=0.2), {}))
    write_safetensors(path, state, {"config": json.dumps(to_dict(config)), "task": "stage2"})
    return path


def frozen(folder: Path, config: Blip2LlmConfig) -> tuple[object, ...]:
    """The options that name the rest of it."""
    state = stage2_state(config, std=0.2)
    torch.save({n.removeprefix(ENCODER): t for n, t in state.items() if n.startswith(ENCODER)}, folder / "vit.pth")
    write_llm(folder / "llm", config.llm, language(config.llm))
    return "--vit-checkpoint", folder / "vit.pth", "--llm-checkpoint", folder / "llm"


@pytest.mark.parametrize("half", [False, True], ids=["float32", "half"])
@pytest.mark.parametrize(("first", "second"), [("hf", "ours"), ("ours", "hf")])
@pytest.mark.parametrize("name", ["opt", "t5", "llama"])
def test_there_and_back(tmp_path: Path, name: str, first: str, second: str, half: bool) -> None:
    """LAVIS's file of a model of which all was trained, as after LoRA is merged; every ordered pair of layouts is a step."""
    config = tiny_llm(LLMS[name])
    dtype = torch.bfloat16 if half else torch.float32
    state = whole(config, stage2_state(config, std=0.2), language(config.llm, dtype))
    torch.save({"model": state}, tmp_path / "m.pth")
    convert(tmp_path / "m.pth", first, tmp_path / "first", config)
    convert(tmp_path / "first", second, tmp_path / "second", config)
    convert(tmp_path / "second", "lavis", tmp_path / "last.pth", config)
    assert_same_bits(read(tmp_path / "last.pth"), state)
    found, want = (load_generator(config, path)[0].state_dict() for path in (tmp_path / "second", tmp_path / "m.pth"))
    assert_same_bits(found, want)


@pytest.mark.parametrize("name", ["opt", "t5", "llama"])
def test_what_was_trained_alone(tmp_path: Path, name: str) -> None:
    """Under LAVIS's names, which the configuration in the file gives; and back, where they give what they can."""
    config = tiny_llm(LLMS[name])
    path, out = trained(tmp_path / "weights.safetensors", config), tmp_path / "m.pth"
    result = run("--from", path, "--to", "lavis", "--out", out)
    assert result.exit_code == 0, result.output
    assert "the checkpoint has no image encoder, no language model: neither will the new one" in result.output
    assert_same_bits(read(out), without_encoder(stage2_state(config, std=0.2)))
    convert(out, "ours", tmp_path / "ours", config)
    rest = frozen(tmp_path, config)
    want, found = (load_generator(config, held, rest[1], rest[3])[0] for held in (path, tmp_path / "ours"))  # type: ignore[arg-type]
    assert_same_bits(found.state_dict(), want.state_dict())
    convert(path, "lavis", tmp_path / "whole.pth", config, *rest)
    assert_same_bits(read(tmp_path / "whole.pth"), whole(config, stage2_state(config, std=0.2), language(config.llm)))


@pytest.mark.parametrize("name", LLMS)
def test_transformers_reads_the_folder(tmp_path: Path, name: str) -> None:
    config = tiny_llm(LLMS[name])
    path, rest = trained(tmp_path / "weights.safetensors", config), frozen(tmp_path, config)
    said = convert(path, "hf", tmp_path / "hf", config, *rest)
    assert ("image_token_index is left open" in said) == (name != "llama")
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]
    transformers.utils.logging.disable_progress_bar()
    theirs: Any
    kind = transformers.Blip2ForConditionalGeneration
    theirs, report = kind.from_pretrained(tmp_path / "hf", output_loading_info=True, attn_implementation="eager")
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.generation_config.eos_token_id == (1 if name.startswith("t5") else 2)
    theirs.config.image_token_index = PLACEHOLDER
    theirs.vision_model.post_layernorm.eps = LN_VISION_EPS  # which no configuration of theirs can say
    model, _ = load_generator(config, tmp_path / "hf")
    wanted = their_logits(theirs.eval().requires_grad_(False), config)
    assert far(our_logits(model, config), wanted) < CLOSE
    # The check can fail.
    model.llm_proj.bias[0] += 0.5  # type: ignore[union-attr, index, operator]
    assert far(our_logits(model, config), wanted) > 10 * CLOSE


def test_the_preset_is_told_by_the_sizes(tmp_path: Path) -> None:
    config = preset("blip2-opt-demo")
    assert isinstance(config, Blip2LlmConfig)
    state = without_encoder(stage2_state(config))
    torch.save({"model": state}, tmp_path / "m.pth")
    result = run("--from", tmp_path / "m.pth", "--to", "ours", "--out", tmp_path / "ours")
    assert result.exit_code == 0, result.output
    # Without its names and without a configuration several models have them.
    flan = preset("blip2-flan-t5-xxl")
    assert isinstance(flan, Blip2LlmConfig)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in without_encoder(_meta(flan)).items()}
    torch.save({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}, tmp_path / "xxl.pth")
    found = refused("--from", tmp_path / "xxl.pth", "--to", "lavis", "--out", tmp_path / "out.pth")
    assert "blip2-flan-t5-xxl" in found
    assert "name the one that it was trained for with --model" in found


def _meta(config: Blip2LlmConfig) -> State:
    return {name: tensor for name, tensor in Blip2Llm(config).state_dict().items() if not name.startswith("llm_model.")}


def test_words_of_the_published_folders() -> None:
    """transformers' generate begins and ends with them, and counts the places of the picture."""
    said = {name: huggingface_config(preset(f"blip2-{name}")) for name in ("opt-2.7b", "flan-t5-xl", "vicuna-7b")}
    assert [values["image_token_index"] for values in said.values()] == [50265, 32100, 0]
    assert said["opt-2.7b"]["text_config"]["eos_token_id"] == 50118  # a line's end
    assert said["flan-t5-xl"]["text_config"]["decoder_start_token_id"] == 0


# What is refused


def test_what_a_folder_has_to_have(tmp_path: Path) -> None:
    config = tiny_llm(TINY_T5)
    path, rest = trained(tmp_path / "weights.safetensors", config), frozen(tmp_path, config)
    options = ("--from", path, "--to", "hf")
    assert "Add --vit-checkpoint eva_vit_g.pth." in refused(*options, *rest[2:], "--out", tmp_path / "hf")
    assert "Add --llm-checkpoint with the Hugging Face folder of FlanT5" in refused(*options, *rest[:2], "--out", tmp_path / "hf")
    said = llm_settings(TINY_T5) | {"num_heads": 7}
    (tmp_path / "llm" / "config.json").write_text(json.dumps(said))
    assert "num_heads is 7, expected 6" in refused(*options, *rest, "--out", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_words_that_are_narrower(tmp_path: Path) -> None:
    path = trained(tmp_path / "weights.safetensors", tiny_llm(TINY_OPT_350M))
    found = refused("--from", path, "--to", "hf", "--out", tmp_path / "hf")
    assert "this OPT's words are narrower (36 of 56, as in OPT-350M)" in found


def test_mindformers(tmp_path: Path) -> None:
    state = mindspore_state(without_encoder(stage1_state(TINY2)))
    state = {name: tensor for name, tensor in state.items() if "word_embeddings" not in name and ".cls." not in name}
    write_ckpt(tmp_path / "m.ckpt", state | {"llm_proj.weight": torch.zeros(56, 40)})
    found = refused("--from", tmp_path / "m.ckpt", "--to", "ours", "--out", tmp_path / "out")
    assert "is a checkpoint of mindformers, of which only the first stage is read" in found


def test_one_language_model(tmp_path: Path) -> None:
    config = tiny_llm(TINY_OPT)
    rest = frozen(tmp_path, config)[2:]
    torch.save(whole(config, stage2_state(config), language(TINY_OPT)), tmp_path / "m.pth")
    (tmp_path / "sizes.json").write_text(json.dumps(to_dict(config)))
    sizes = ("--config", tmp_path / "sizes.json", "--to", "ours", *rest, "--out", tmp_path / "out")
    assert "already holds a language model. Leave --llm-checkpoint out." in refused("--from", tmp_path / "m.pth", *sizes, code=2)
    write_stage1(TINY2, tmp_path / "first.pth", stage1_state(TINY2))
    assert "it is a checkpoint of BLIP-2's first stage" in refused("--from", tmp_path / "first.pth", *sizes[:4], *sizes[-2:])
    (tmp_path / "sizes.json").write_text(json.dumps(to_dict(TINY2)))
    found = refused("--from", tmp_path / "first.pth", *sizes, code=2)
    assert "--llm-checkpoint is for BLIP-2's second stage" in found
