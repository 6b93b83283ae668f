"""The processor that an .om is made for: as the user says it, and as npu-smi does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from export.soc import board_name, checked_soc, soc_names, soc_of_this_machine
from models.errors import Misuse, UserError
from tests import chain
from tests.atc_calls import run
from tests.om_graphs import write_folder

SMI = """\
+-------------------------------+-----------------+------------------------------------------------------+
| npu-smi 23.0.rc3              Version: 23.0.rc3                                                        |
+-------------------------------+-----------------+------------------------------------------------------+
| NPU     Name                  | Health          | Power(W)     Temp(C)           Hugepages-Usage(page) |
| Chip    Device                | Bus-Id          | AICore(%)    Memory-Usage(MB)                        |
+===============================+=================+======================================================+
| 0       {first}                 | OK              | 15.8         42                0    / 0              |
| 0       0                     | 0000:82:00.0    | 0            1074 / 21534                            |
+===============================+=================+======================================================+
| 1       {second}                 | OK              | 15.8         42                0    / 0              |
| 0       1                     | 0000:83:00.0    | 0            1074 / 21534                            |
+-------------------------------+-----------------+------------------------------------------------------+
| NPU     Chip                  | Process id      | Process name             | Process memory(MB)        |
| 0       0                     | 123             | python                   | 310                       |
"""


@pytest.fixture
def graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", "/nowhere")
    return write_folder(tmp_path / "graphs")


def test_names_of_processors() -> None:
    assert soc_names(SMI.format(first="310P3", second="310P3")) == {"Ascend310P3"}
    assert soc_names(SMI.format(first="910B4", second="310B1")) == {"Ascend910B4", "Ascend310B1"}
    assert soc_names("no table") == set()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 9", "npu-smi info ended with exit status 9."),
        ("echo nothing", "npu-smi info names no processor; one was expected."),
        (f"cat <<'END'\n{SMI.format(first='910B4', second='310P3')}END", "names Ascend310P3 and Ascend910B4; one was expected."),
        (None, "This machine has no npu-smi, so its processor is not known."),
    ],
)
def test_no_processor(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, said: str) -> None:
    if script:
        add_smi(tmp_path / "smi", script, monkeypatch)
    message = chain.refusal(run(graphs, soc=None))
    assert said in message
    assert "Say it with --soc" in message
    assert said in chain.refusal(run(graphs, "--dry-run", soc=None), 2)


def test_the_processor_of_this_machine(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_smi(tmp_path / "smi", f"cat <<'END'\n{SMI.format(first='310P3', second='310P3')}END", monkeypatch)
    assert "--soc_version=Ascend310P3" in chain.done(run(graphs, "--dry-run", soc=None))


def add_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "npu-smi").write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
    (folder / "npu-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


# Of an Atlas A3, whose Name is that of several processors.

BOARD = """\
	NPU ID                         : 2
	Chip Name                      : Ascend910
	NPU Name                       : 9391
"""


def test_an_a3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for its board."""
    table = SMI.replace("| 0       {first}", "| 2       {first}").format(first="Ascend910", second="Ascend910")
    shown = f"[ $# = 1 ] && cat <<'END' && exit\n{table}END\n"
    asked = f"[ \"$*\" = 'info -t board -i 2 -c 0' ] && cat <<'END'\n{BOARD}END"
    add_smi(tmp_path / "smi", shown + asked, monkeypatch)
    assert soc_of_this_machine() == "Ascend910_9391"
    assert board_name(BOARD.replace("NPU Name", "Board")) is None
    add_smi(tmp_path / "older", f"cat <<'END'\n{table}END", monkeypatch)
    with pytest.raises(UserError, match=r"names Ascend910, the beginning of a processor's name.*as in --soc Ascend910_9391"):
        soc_of_this_machine()


@pytest.mark.parametrize("name", ["910", "Ascend910"])
def test_half_a_name(name: str) -> None:
    with pytest.raises(Misuse, match=f"--soc {name} is the beginning of a processor's name. For an Atlas A3 say"):
        checked_soc(name)


@pytest.mark.parametrize("name", ["Ascend910_9391", "910_9391", "310P3", "Ascend310", "910B4"])
def test_whole_names(name: str) -> None:
    assert checked_soc(name) == f"Ascend{name.removeprefix('Ascend')}"
