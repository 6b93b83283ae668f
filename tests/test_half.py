"""demo/half.py: what it writes is read as the whole one is, half as large."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from demo import half
from models.checkpoint import load_model
from models.config_file import to_dict
from tests import chain
from tests.tiny import TINY, random_model


def halved(weights: Path, out: Path) -> Result:
    return CliRunner().invoke(half.main, ["--weights", str(weights), "--out", str(out)])


def test_a_half_is_read_as_the_whole(tmp_path: Path) -> None:
    model = random_model()
    tensors = {name: parameter.data for name, parameter in model.named_parameters()}
    about = {"config": json.dumps(to_dict(TINY)), "seed": "3"}
    save_file(tensors | {"count": torch.tensor([70_000])}, tmp_path / "w.safetensors", about)
    said = chain.done(halved(tmp_path / "w.safetensors", tmp_path / "half.safetensors"))
    assert said.startswith(f"{tmp_path / 'half.safetensors'}: ")
    found = load_file(tmp_path / "half.safetensors")
    assert found.pop("count").tolist() == [70_000]
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {n: (torch.float16, t.shape) for n, t in tensors.items()}
    with safe_open(tmp_path / "half.safetensors", "pt") as file:
        assert file.metadata() == about
    save_file(tensors, tmp_path / "w.safetensors", about)
    chain.done(halved(tmp_path / "w.safetensors", tmp_path / "half.safetensors"))
    loaded, _ = load_model(TINY, tmp_path / "half.safetensors")
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter.data, tensors[name], atol=1e-4, rtol=1e-3)


def test_what_cannot_be_halved(tmp_path: Path) -> None:
    """What was there stays."""
    save_file({"small": torch.ones(2), "large": torch.tensor([7e4])}, tmp_path / "w.safetensors")
    (tmp_path / "out").write_text("kept")
    assert "large holds numbers that half precision has no place for" in chain.refusal(
        halved(tmp_path / "w.safetensors", tmp_path / "out")
    )
    (tmp_path / "text").write_text("hello")
    for name in ("none", "text"):
        assert f"{tmp_path / name} cannot be read" in chain.refusal(halved(tmp_path / name, tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text", "w.safetensors"]


@pytest.mark.parametrize("folder", ["nowhere", "w.safetensors"])
def test_no_folder_to_write_to(tmp_path: Path, folder: str) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    assert folder in chain.refusal(halved(tmp_path / "w.safetensors", tmp_path / folder / "half.safetensors"))
