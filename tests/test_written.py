"""training/written.py: what a training leaves out of the weights it ends with, others' files hold, and all is found again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import training.fit
import training.written
from models.blip2_llm import Blip2Llm
from models.checkpoint import load_generator
from models.config import Blip2LlmConfig
from models.config_file import from_file
from models.errors import UserError
from tests.trainings import equal, stage2, trained, weights


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


@pytest.mark.parametrize("ema", [None, 0.5])
def test_the_best_are_written_when_they_are_measured(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, ema: float | None
) -> None:
    """LoRA merged, and the average where there is one: as if the training had ended there. It goes on as if nothing were."""
    values = stage2(tmp_path, pictures, model={"lora": {"rank": 2, "alpha": 4, "dropout": 0.3}}, run={"ema": ema})
    ended = weights(trained(tmp_path, values, f"run.out={tmp_path / 'ended'}", "run.steps=4"))
    other = weights(trained(tmp_path, values, f"run.out={tmp_path / 'other'}"))
    values["data"]["validation"] = {"annotations": str(pictures / "train.json"), "images": str(pictures)}
    figures = iter([0.5, 0.9, 0.1])
    monkeypatch.setattr(training.fit, "measure_of", lambda *given: lambda model: {"agg": next(figures)})
    fitted = trained(tmp_path, values, "run.validate_every=2", "run.keep=1", "run.save_every=6")
    best = load_file(tmp_path / "out" / "best.safetensors")
    assert equal(best, ended)
    assert equal(weights(fitted), other)
    assert not equal(best, other)
    assert {folder.name for folder in (tmp_path / "out").glob("step-*")} == {"step-0000004", "step-0000006"}


def test_a_full_disk(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence, and none of the file; then --resume writes it."""
    values = stage2(tmp_path, pictures, run={"steps": 1, "save_every": 1})

    def full(path: Path, *given: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(training.written, "write_safetensors", full)
        with pytest.raises(UserError, match=r"No space left on device\. Is the disk full"):
            trained(tmp_path, values)
    assert not [file for file in (tmp_path / "out").iterdir() if "weights" in file.name]
    assert weights(trained(tmp_path, values, resume=True))
