"""What make would run for an NPU."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def lines(folder: Path, *asked: str) -> dict[str, list[str]]:
    """What each module of ours would be called with, nothing of it run."""
    command = ["make", "-n", f"OUT={folder}", "SOC=Ascend310P3", *asked]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    called = [shlex.split(line) for line in said.splitlines() if " -m " in line]
    return {words[2]: words[3:] for words in called}


@pytest.mark.parametrize("target", ["om", "atc-script"])
def test_options_for_atc(tmp_path: Path, target: str) -> None:
    made = lines(tmp_path, target, 'ATC_OPTIONS=--precision origin --only "text_embed,image"')["export.atc"]
    assert made[made.index("--precision") + 1] == "origin"
    assert made[made.index("--only") + 1] == "text_embed,image"
    assert "--precision" not in lines(tmp_path, target)["export.atc"]


def test_cann_6_reads_opset_13(tmp_path: Path) -> None:
    assert "--opset" not in lines(tmp_path, "om")["export"]
    made = lines(tmp_path, "om", "CANN=6")
    assert made["export"][made["export"].index("--opset") + 1] == "13"
    assert made["export.atc"][made["export.atc"].index("--cann") + 1] == "6"
    own = lines(tmp_path, "om", "CANN=6", "EXPORT_OPTIONS=--opset 11")["export"]
    assert [own[at + 1] for at, word in enumerate(own) if word == "--opset"] == ["11"]
