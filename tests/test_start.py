"""training/start.py: what of a second stage learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.trainings import stage2, written
from training.settings_file import read_settings
from training.start import sizes_of, started

BRIDGE = {"query_tokens", "Qformer", "ln_vision"}
LORA = {"lora": {"rank": 2, "alpha": 4}}


@pytest.mark.parametrize(
    ("asked", "learns"),
    [
        ({}, BRIDGE | {"llm_proj"}),
        ({"freeze_vit": False}, BRIDGE | {"llm_proj", "visual_encoder"}),
        (LORA, BRIDGE | {"llm_proj", "llm_model"}),
        ({"freeze_qformer": True}, {"llm_proj"}),
        ({"freeze_qformer": True, **LORA}, {"llm_model"}),  # PaddleMIX marks LoRA alone as trained
    ],
)
def test_what_learns(tmp_path: Path, pictures: Path, asked: dict[str, Any], learns: set[str]) -> None:
    settings = read_settings(written(tmp_path, stage2(tmp_path, pictures, model=asked)))
    model, _ = started(settings, sizes_of(settings))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == learns
    assert all(name.endswith((".up", ".down")) for name in trained if name.startswith("llm_model."))
