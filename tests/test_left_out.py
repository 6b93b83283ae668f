"""What a checkpoint of BLIP-2 holds beside the model: left out where no result depends on it, refused where one does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.blip2 import Blip2Stage1
from models.checkpoint import load_image_encoder, load_model, load_stage1
from models.config_file import to_dict
from models.huggingface import to_huggingface
from tests.make_checkpoint import checkpoint, encoder_file, stage1_state, without_encoder, write_stage1
from tests.mindspore_file import mindspore_state, write_ckpt
from tests.test_blip2_checkpoint import assert_equal, refusal, transformers_model
from tests.test_convert import refused
from tests.tiny import TINY, TINY2, random_blip2, random_model

HF_BIAS = "vision_model.encoder.layers.1.self_attn.qkv.bias"
MINDSPORE_BIAS = "visual_encoder.blocks.1.attention.dense2.bias"
State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    """LAVIS's of TINY2; a test may change it."""
    return stage1_state(TINY2, std=0.2)


def with_key_bias(layout: str, path: Path, state: State, value: float = 1.5) -> str:
    """Write the checkpoint with a bias of the keys of one block, whose name is returned."""
    if layout == "hf":
        theirs = to_huggingface(state, TINY2)
        theirs[HF_BIAS][48:96] = torch.linspace(-1, value, 48)
        save_file(theirs, path)
        return HF_BIAS
    theirs = mindspore_state(state)
    theirs[MINDSPORE_BIAS] += torch.linspace(-1, value, 48)
    write_ckpt(path, theirs)
    return MINDSPORE_BIAS


# Key biases


@pytest.mark.parametrize("layout", ["hf", "mindspore"])
def test_key_biases_are_left_out(tmp_path: Path, state: State, layout: str) -> None:
    with_key_bias(layout, tmp_path / "m", state)
    model, report = load_model(TINY2, tmp_path / "m")
    assert_equal(model, state)
    assert report.ignored["key biases, which change no result"] == 1
    assert "1 key biases, which change no result" in report.lines()[-1]
    assert report.unexpected == ()


@pytest.mark.parametrize("layout", ["hf", "mindspore"])
def test_key_biases_are_not_lost_in_a_conversion(tmp_path: Path, state: State, layout: str) -> None:
    name = with_key_bias(layout, tmp_path / "m", state)
    (tmp_path / "sizes.json").write_text(json.dumps(to_dict(TINY2)))
    options = ("--from", tmp_path / "m", "--to", "ours", "--config", tmp_path / "sizes.json")
    assert f"{name} is not zero for the keys" in refused(*options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["hf", "mindspore"])
def test_key_biases_that_are_no_numbers(tmp_path: Path, state: State, layout: str) -> None:
    name = with_key_bias(layout, tmp_path / "m", state, float("nan"))
    assert f"holds NaN or infinity in {name}." in refusal(tmp_path / "m")


def test_key_biases_change_no_result() -> None:
    """transformers computes with them."""
    model = random_blip2()
    theirs = transformers_model(TINY2, model.state_dict())
    theirs.vision_model.post_layernorm.eps = 1e-5  # the original's
    bias = theirs.get_parameter(HF_BIAS)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = model.image_feat(image)
        bias[48:96] = torch.linspace(-1, 1.5, 48)
        # 9.5e-7 measured on 10 models; a tenth more in the bias of the queries moves at least 0.02.
        assert float((theirs.vision_model(image).last_hidden_state - want).abs().max()) < 1e-5
        bias[:48] += 0.1
        assert float((theirs.vision_model(image).last_hidden_state - want).abs().max()) > 1e-3


# Parts of other image encoders


@pytest.mark.parametrize(
    "name", ["rel_pos_bias.relative_position_bias_table", "blocks.0.attn.relative_position_bias_table", "rope.freqs_cos"]
)
@pytest.mark.parametrize("own", [False, True], ids=["within", "a file of its own"])
def test_relative_positions_are_another_architecture(tmp_path: Path, state: State, name: str, own: bool) -> None:
    table = torch.zeros(49, 6)
    if own:
        write_stage1(TINY2, tmp_path / "m.pth", without_encoder(state))
        torch.save(encoder_file(state, TINY2) | {name: table}, tmp_path / "vit.pth")
        found = refusal(tmp_path / "m.pth", vit=tmp_path / "vit.pth")
    else:
        name = f"visual_encoder.{name}"
        write_stage1(TINY2, tmp_path / "m.pth", state | {name: table})
        found = refusal(tmp_path / "m.pth")
    assert f"is of another architecture: attention in its image encoder depends on {name}, which BLIP-2's has not." in found


def test_mask_tokens_are_left_out(tmp_path: Path, state: State) -> None:
    write_stage1(TINY2, tmp_path / "m.pth", state | {"visual_encoder.mask_token": torch.zeros(1, 1, 48)})
    model, report = load_model(TINY2, tmp_path / "m.pth")
    assert_equal(model, state)
    assert report.ignored["mask tokens of the image encoder's pretraining"] == 1


# The temperature


@pytest.mark.parametrize("layout", ["lavis", "ours", "mindspore"])
def test_a_temperature_of_one_entry(tmp_path: Path, state: State, layout: str) -> None:
    write_stage1(TINY2, tmp_path / "m", state | {"temp": state["temp"].reshape(1)}, layout)
    model, report = load_stage1(TINY2, tmp_path / "m")
    assert_equal(model, state)
    assert report.temperature == load_model(TINY2, tmp_path / "m")[1].temperature == pytest.approx(0.07)


def test_a_temperature_of_one_entry_of_blip(tmp_path: Path) -> None:
    content = checkpoint(random_model(), queue=4)
    content["model"]["temp"] = torch.tensor([0.07])
    torch.save(content, tmp_path / "m.pth")
    assert load_model(TINY, tmp_path / "m.pth")[1].temperature == pytest.approx(0.07)


# What is said of an image encoder that training starts from


def test_an_image_encoder_alone_is_reported(tmp_path: Path, state: State) -> None:
    torch.save(encoder_file(state, TINY2) | {"note": torch.zeros(1)}, tmp_path / "vit.pth")
    config = dataclasses.replace(TINY2, vision=dataclasses.replace(TINY2.vision, image_size=48))
    report = load_image_encoder(Blip2Stage1(config), tmp_path / "vit.pth")
    dropped = len(encoder_file(state, TINY2)) - sum(name.startswith("visual_encoder.") for name in state)
    assert report.lines() == [
        f"checkpoint {tmp_path / 'vit.pth'} (lavis layout, sha256 {report.sha256[:12]})",
        "position embeddings interpolated from 32 to 48 pixels",
        f"ignored: {dropped} tensors of the image encoder's end, which BLIP-2 leaves out",
        "unexpected, not used: note",
    ]
