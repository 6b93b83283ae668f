"""Measuring in two processes: each writes its part of the texts, and all know the same figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.test_fit import logged, trained, weights
from tests.test_training_validate import pictures, stage2  # noqa: F401 (a fixture)
from tests.two_processes import run_two


@pytest.mark.parametrize("mode", ["ddp", "full_shard"])
def test_two_processes_give_one_figure(tmp_path: Path, pictures: Path, mode: str) -> None:  # noqa: F811
    """That of one process, and the training goes on as its. The two write different numbers of texts: a process that counted
    on the other to run the model as often would wait for ever."""
    values = stage2(tmp_path, pictures, "opt")
    values["model"].pop("lora")
    values["run"] |= {"precision": "fp32", "checkpointing": False, "steps": 3, "eval_batchsize": 5, "batchsize": 4}
    values["data"]["validation"]["annotations"] = str(pictures / "odd.json")
    one = weights(trained(tmp_path, values))
    figures = logged(tmp_path, "metrics")
    sets = (f"--set=parallel.mode={mode}", "--set=run.batchsize=2", f"--set=run.out={tmp_path / 'two' / 'out'}")
    run_two("training", "stage2", "--config", str(tmp_path / "settings.yaml"), *sets)
    assert list(logged(tmp_path / "two", "metrics")) == list(figures) == [1, 2, 3]
    for step, metrics in logged(tmp_path / "two", "metrics").items():
        assert metrics == pytest.approx(figures[step], abs=1e-9)
    assert max(metrics["Bleu_1"] for metrics in figures.values()) > 0
    two = load_file(tmp_path / "two" / "out" / "weights.safetensors")
    far = {name for name in one if float((one[name] - two[name]).abs().max()) > 1e-5}
    assert all("key.bias" in name for name in far), far  # see tests/test_fit.py
