"""The processor that an .om is made for, by the name that ATC knows it by: Ascend310P3, Ascend910B4."""

from __future__ import annotations

import re
import shutil
import subprocess

from models.errors import Misuse, UserError

SAY = "Say it with --soc: Ascend and the Name that `npu-smi info` shows on the target machine, such as --soc Ascend310P3."
NAME = re.compile(r"Ascend\d{3}\w*")
# A row of `npu-smi info` that names a device: | 0       310P3     | OK              | 15.8 ...
ROW = re.compile(r"^\s*\|\s*\d+\s+(?:Ascend)?(\d{3}\w*)\s*\|\s*[A-Za-z]", re.MULTILINE)
WAIT = 60  # seconds for npu-smi, which hangs when the driver does


def checked_soc(name: str) -> str:
    """`name` with the Ascend that npu-smi leaves out. Raises Misuse when no processor is called so."""
    full = name if name.startswith("Ascend") else f"Ascend{name}"
    if not NAME.fullmatch(full):
        raise Misuse(f"--soc {name} is not the name of a processor. {SAY}")
    return full


def soc_of_this_machine() -> str:
    """The processor in this machine, from the Name column of `npu-smi info`.

    Raises UserError when npu-smi is not installed, fails, or names no device or several kinds.
    """
    if shutil.which("npu-smi") is None:
        raise UserError(f"This machine has no npu-smi, so its processor is not known. {SAY}")
    try:
        done = subprocess.run(["npu-smi", "info"], capture_output=True, text=True, errors="replace", check=False, timeout=WAIT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"npu-smi info did not answer ({type(error).__name__}). {SAY}") from error
    if done.returncode:
        raise UserError(f"npu-smi info ended with exit status {done.returncode}. {SAY}")
    names = sorted(soc_names(done.stdout))
    if len(names) != 1:
        raise UserError(f"npu-smi info names {' and '.join(names) or 'no processor'}; one was expected. {SAY}")
    return names[0]


def soc_names(table: str) -> set[str]:
    """The processors in the table that `npu-smi info` prints."""
    return {f"Ascend{name}" for name in ROW.findall(table)}
