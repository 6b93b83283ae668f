"""Which ONNX operators ATC reads at which opset. The list is data, export/atc_ops.txt; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models.errors import UserError

FILE = Path(__file__).with_name("atc_ops.txt")
_OPSETS = re.compile(r"\*|\d{1,2}(-\d{1,2})?(,\d{1,2}(-\d{1,2})?)*")
_ANY = range(1, 100)


@dataclass(frozen=True)
class OpTable:
    """The operators of ai.onnx that have a parser, and the opsets they have it for."""

    opsets: Mapping[str, frozenset[int]]

    def has(self, operator: str, opset: int) -> bool:
        return opset in self.opsets.get(operator, ())

    def said(self, operator: str) -> str:
        """The opsets of an operator: 8-9, 11-18; empty when it has none."""
        runs: list[list[int]] = []
        for opset in sorted(self.opsets.get(operator, ())):
            if runs and runs[-1][-1] == opset - 1:
                runs[-1].append(opset)
            else:
                runs.append([opset])
        return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def read_table(file: Path = FILE) -> OpTable:
    """The table in `file`: on a line opsets, then names; # begins a remark. Raises UserError for a line that is neither."""
    found: dict[str, frozenset[int]] = {}
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"The list of ATC's operators {file} cannot be read: {said.lower()}.") from error
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        opsets, names = words[0], words[1:]
        if not names or not _OPSETS.fullmatch(opsets) or not _read(opsets):
            raise UserError(f"{file}, line {number}: expected opsets and names, as in '8-9,11-18 Upsample', found {line!r}.")
        for name in names:
            found[name] = found.get(name, frozenset()) | _read(opsets)
    if not found:
        raise UserError(f"{file} lists no operator. Expected lines such as '8-9,11-18 Upsample'.")
    return OpTable(found)


def _read(opsets: str) -> frozenset[int]:
    if opsets == "*":
        return frozenset(_ANY)
    ends = [[int(end) for end in part.split("-")] for part in opsets.split(",")]
    return frozenset(number for end in ends for number in range(end[0], end[-1] + 1))
