"""What ATC's error codes mean to the person who called blip-atc, and what mends them.

Codes and their causes: CANN's error code reference. The texts beside them differ from release to release, the codes do not.
"""

from __future__ import annotations

import re
import signal

from models.errors import UserError

CODE = re.compile(r"\b(E[0-9A-Z]\d{4}|EZ\d{4})\b:?[ \t]*(.*)")
SHOWN = 300  # characters of ATC's own text
# What a shell ends with whose child a signal ended, and the signal's number; as where atc is a script around ATC.
SHELL_SIGNALLED = 128
SHELL_KILLED = SHELL_SIGNALLED + signal.SIGKILL
# ATC opens with the first of these when it has nothing better to say; a code of its own counts more.
VAGUE = ("E19999", "EZ9999")
UNKNOWN = re.compile(r"unknown command line flag '([^']+)'")
SAY = "Its log is in ~/ascend/log. To see more, write the commands with --script, put --log=debug in atc.sh and run that"

SAY_CANN = "Give --cann 6 or 7 as it is installed; 6 takes graphs of opset 13"

MEANING = {
    "E10001": ("an option has a value that ATC refuses", "Compare --soc and --cann with the CANN release that is installed"),
    "E10002": ("ATC cannot read the shapes of the inputs", "Check that the shell kept the quotes of --input_shape"),
    "E10007": ("a required option is missing", "Compare --cann with the CANN release that is installed"),
    "E10009": ("two options for dynamic shapes exclude each other", "Choose one --dynamic"),
    "E10016": ("an option names an input or operator that the graph does not have", "Export the graph again, or correct --keep"),
    "E10018": ("an axis other than the first is open", "Use --dynamic dims"),
    "E10022": ("the output has no file name", "Choose another --out"),
    "E10054": ("a required option is empty", "Check that the shell kept the quotes of --input_shape"),
    "E10056": (
        "two options exclude each other",
        "Choose --cann as it is installed: 6 takes precision_mode, 7 and 8 precision_mode_v2",
    ),
    "E10501": ("an operator has no implementation in this CANN release", "Run blip-atc --check, or take a newer CANN"),
    "E11010": ("ATC cannot read an option", "Compare --cann with the CANN release that is installed"),
    "E13001": ("a file cannot be opened", "Check that the graphs are where they were, and may be read"),
    "E16002": (
        "the graph holds an operator that this CANN release does not read at its opset",
        "Run blip-atc --check, which names it",
    ),
    "E16005": ("the graph mixes operator domains", "Export it with --target ascend"),
    "E19010": (
        "the graph holds an operator that this CANN release does not read at its opset",
        "Run blip-atc --check, which names it",
    ),
    "E19999": ("ATC failed inside", SAY),
    "E20001": (
        "an operator could not be compiled for this processor",
        "Check --soc, and that the operator package of this CANN release is installed; try a smaller --batchsize",
    ),
    "EZ9999": ("a kernel of the AI core could not be built", f"Try --precision origin or a smaller --batchsize. {SAY}"),
}


def failure(stem: str, status: int, said: str) -> UserError:
    """The error to raise when `atc` ended with `status` (not 0) while it made `stem`, and printed `said`. Its sentences are not
    ended: what is left of the run is for the caller to say."""
    if status < 0 or status == SHELL_KILLED:
        name = signal.Signals(-status if status < 0 else signal.SIGKILL).name
        return UserError(
            f"{stem}: atc was killed ({name}), most often for lack of memory. Set TE_PARALLEL_COMPILER=1, or try a smaller "
            "--batchsize"
        )
    if unknown := UNKNOWN.search(said):
        return UserError(
            f"{stem}: atc ended with exit status {status}, {unknown[0]}: it is of another release of CANN than --cann says. "
            f"{SAY_CANN}"
        )
    found: dict[str, str] = {}
    for code, text in CODE.findall(said):
        found.setdefault(code, text.strip())
    if not found:
        last = (said.strip().splitlines() or ["nothing"])[-1].strip().rstrip(" .")
        return UserError(f"{stem}: atc ended with exit status {status} and no error code; it said: {last[:SHOWN]}. {SAY}")
    code = min(found, key=lambda code: (code in VAGUE, code not in MEANING))
    meaning, mend = MEANING.get(code, ("CANN's error code reference explains it", SAY))
    text = found[code].rstrip(" .")[:SHOWN]
    said = f"{code}, {meaning}: {text}" if text else f"{code}, {meaning}"
    return UserError(f"{stem}: atc ended with exit status {status}, {said}. {mend}")
