"""The stand-in for ATC refuses what ATC is known to refuse, so that the tests over it can fail."""

from __future__ import annotations

import subprocess
from pathlib import Path

import onnx
import pytest

from tests.doubles import atc as double
from tests.om_graphs import PICTURE, onnx_of


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({}, 0, "ATC run success"),
        ({"framework": None}, 255, "E10007"),
        ({"model": ""}, 255, "E10054"),
        ({"model": "none.onnx"}, 255, "E13001"),
        ({"model": "a b.onnx"}, 255, "E10001"),
        ({"output": "out/"}, 255, "E10022"),
        ({"soc_version": "H200"}, 255, "E10001"),
        ({"input_shape": "input_image:1,3,2,2;other:1"}, 255, "E10016"),
        ({"input_shape": "input_image:1,3,4,2"}, 255, "E10001"),
        ({"input_shape": "input_image 1"}, 255, "E10002"),
        ({"precision_mode": "force_fp16"}, 255, "E10056"),
        ({"dynamic_dims": "1;2", "dynamic_batch_size": "1,2"}, 255, "E10009"),
        ({"input_shape": "input_image:1,-1,2,2", "dynamic_batch_size": "1,2"}, 255, "E10001"),
        ({"batch": "4"}, 1, "unknown command line flag 'batch'"),
    ],
)
def test_the_stand_in(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str | None],
    status: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(onnx_of(PICTURE, 17), "g.onnx")
    flags = {"framework": "5", "model": "g.onnx", "output": "g_bs1", "soc_version": "Ascend310P3", "precision_mode_v2": "fp16"}
    flags |= {"input_shape": "input_image:1,3,2,2"}
    argv = [f"--{name}={value}" for name, value in (flags | change).items() if value is not None]
    assert double.main(argv) == status
    assert said in capsys.readouterr().out
    assert Path("g_bs1.om").exists() == (status == 0)


def test_the_stand_in_as_a_program(tmp_path: Path) -> None:
    assert subprocess.run([str(double.install(tmp_path) / "atc"), "--help"], capture_output=True, check=False).returncode == 0
