"""training/written.py: what a training leaves out of the weights it ends with, others' files hold, and all is found again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.blip2_llm import Blip2Llm
from models.checkpoint import load_generator
from models.config import Blip2LlmConfig
from models.config_file import from_file
from models.errors import UserError
from tests.test_fit import pictures, stage2, trained, weights

__all__ = ["pictures"]  # a fixture


def test_a_frozen_image_encoder_stays_in_its_file(tmp_path: Path, pictures: Path) -> None:
    values = stage2(tmp_path, pictures, run={"steps": 1})
    whole = weights(trained(tmp_path, values))
    fitted = trained(tmp_path, values, "run.trainable_only=true", f"run.out={tmp_path / 'without'}")
    found = weights(fitted)
    assert any(name.startswith("visual_encoder.") for name in whole)
    assert found.keys() == {name for name in whole if not name.startswith("visual_encoder.")}
    config = from_file(tmp_path / "sizes.json")
    assert isinstance(config, Blip2LlmConfig)
    assert fitted.weights is not None
    model, report = load_generator(config, fitted.weights, tmp_path / "stage2.safetensors", tmp_path / "llm")
    assert isinstance(model, Blip2Llm)
    assert not report.unexpected
    before = load_file(tmp_path / "stage2.safetensors")
    for name, tensor in model.state_dict().items():
        if name.startswith("visual_encoder."):
            assert torch.equal(tensor, before[name]), name
    with pytest.raises(UserError, match="holds no image encoder"):
        load_generator(config, fitted.weights, None, tmp_path / "llm")


def test_one_that_learnt_is_written(tmp_path: Path, pictures: Path) -> None:
    values = stage2(tmp_path, pictures, model={"freeze_vit": False}, run={"steps": 1, "trainable_only": True})
    assert any(name.startswith("visual_encoder.") for name in weights(trained(tmp_path, values)))
