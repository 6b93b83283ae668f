"""The processor that an .om is made for, by the name that ATC knows it by: Ascend310P3, Ascend910B4, Ascend910_9391.

`npu-smi info` shows it in the column Name, without Ascend. Not that of an Atlas A3: there it is Chip Name and NPU Name, with _
between, of `npu-smi info -t board -i ID -c CHIP` (ATC's manual, --soc_version).
"""

from __future__ import annotations

import re
import shutil
import subprocess

from models.errors import Misuse, UserError

BARE = "Ascend910"  # what an Atlas A3 shows as its Name, and the first half of what ATC calls it
SAY = "Say it with --soc: Ascend and the Name that `npu-smi info` shows on the target machine, such as --soc Ascend310P3."
SAY_A3 = (
    "For an Atlas A3 say --soc with the Chip Name and the NPU Name that `npu-smi info -t board -i ID -c CHIP` shows, as in --soc "
    "Ascend910_9391; for others with the whole Name, as in --soc Ascend910B4."
)
NAME = re.compile(r"Ascend\d{3}\w*")
# A row of `npu-smi info` that names a device: | 0       310P3     | OK              | 15.8 ...
ROW = re.compile(r"^\s*\|\s*(\d+)\s+(?:Ascend)?(\d{3}\w*)\s*\|\s*[A-Za-z]", re.MULTILINE)
# Of what it says of a board: Chip Name : Ascend910, NPU Name : 9391
CHIP_NAME = re.compile(r"^\s*Chip Name\s*:\s*(?:Ascend)?(\d{3}\w*)\s*$", re.MULTILINE)
NPU_NAME = re.compile(r"^\s*NPU Name\s*:\s*(\w+)\s*$", re.MULTILINE)
WAIT = 60  # seconds for npu-smi, which hangs when the driver does


def checked_soc(name: str) -> str:
    """`name` with the Ascend that npu-smi leaves out. Raises Misuse when no processor is called so, or several are."""
    full = name if name.startswith("Ascend") else f"Ascend{name}"
    if not NAME.fullmatch(full):
        raise Misuse(f"--soc {name} is not the name of a processor. {SAY}")
    if full == BARE:
        raise Misuse(f"--soc {name} is the beginning of a processor's name. {SAY_A3}")
    return full


def soc_of_this_machine() -> str:
    """The processor in this machine, as npu-smi names it.

    Raises UserError when npu-smi is not installed, fails, or names no device or several kinds.
    """
    if shutil.which("npu-smi") is None:
        raise UserError(f"This machine has no npu-smi, so its processor is not known. {SAY}")
    table = _asked()
    names = sorted(soc_names(table))
    if len(names) != 1:
        raise UserError(f"npu-smi info names {' and '.join(names) or 'no processor'}; one was expected. {SAY}")
    if names != [BARE]:
        return names[0]
    npu = next(number for number, _ in ROW.findall(table))
    name = board_name(_asked("-t", "board", "-i", npu, "-c", "0"))
    if name is None:
        raise UserError(f"npu-smi info names {BARE}, the beginning of a processor's name, and of its board no more. {SAY_A3}")
    return name


def soc_names(table: str) -> set[str]:
    """The processors in the table that `npu-smi info` prints."""
    return {f"Ascend{name}" for _, name in ROW.findall(table)}


def board_name(said: str) -> str | None:
    """The processor of an Atlas A3 in what `npu-smi info -t board` prints, Ascend910_9391; None where it lacks either half."""
    chip, npu = CHIP_NAME.search(said), NPU_NAME.search(said)
    return f"Ascend{chip[1]}_{npu[1]}" if chip and npu else None


def _asked(*more: str) -> str:
    """What `npu-smi info` prints. Raises UserError when it fails."""
    line = " ".join(["npu-smi info", *more])
    try:
        done = subprocess.run(line.split(), capture_output=True, text=True, errors="replace", check=False, timeout=WAIT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{line} did not answer ({type(error).__name__}). {SAY}") from error
    if done.returncode:
        raise UserError(f"{line} ended with exit status {done.returncode}. {SAY}")
    return done.stdout
