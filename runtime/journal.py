"""Which shards of a run are done. A run that was stopped goes on with those that are missing.

A shard is written to its tensors, the tensors are put on the disk, and only then is a line added here. Shards are
the same slices with the same batches whoever computes them, so a resumed run ends with identical files.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from models import manifest
from models.errors import Misuse, UserError
from preprocess.tensors import Writer

NAME = "journal.jsonl"


class Journal:
    """The journal of one run, in the folder that becomes its outputs/."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """`identity` is what the numbers depend on. Raises UserError when the folder holds another run's shards,
        Misuse when that run is of another task."""
        self._path = folder / NAME
        self._seconds: dict[tuple[str, int], float] = {}
        self._items: dict[tuple[str, int], int] = {}
        lines = _complete_lines(self._path)
        found = lines[0].get("identity", {}) if lines else identity
        if differing := sorted(key for key in {*found, *identity} if found.get(key) != identity.get(key)):
            key = "task" if "task" in differing else differing[0]
            if len(lines) > 1:
                raise (Misuse if key == "task" else UserError)(
                    f"{folder} holds a half-finished run with another {key} ({found.get(key)}, now {identity.get(key)}). "
                    "Finish it with its own options, choose another --out, or start anew with --restart."
                )
            manifest.empty(folder)  # that run ended before its first shard did: nothing is lost
        for line in lines[1:]:
            key = (str(line["stage"]), int(line["shard"]))
            self._seconds[key], self._items[key] = float(line["seconds"]), int(line["items"])
        self._resumed = dict(self._items)
        # Written again as a whole, beside and then renamed: a line that was cut short must not stay before the next one,
        # and a full disk must not cost the lines that are there.
        beside = folder / f".{NAME}.part"
        _append(beside, [{"identity": identity}, *lines[1:]], "w")
        beside.replace(self._path)

    def has(self, stage: str, shard: int) -> bool:
        return (stage, shard) in self._seconds

    def note(self, stage: str, shard: int, items: int, seconds: float) -> None:
        """Shard `shard` of `stage` is on the disk."""
        self._seconds[stage, shard], self._items[stage, shard] = seconds, items
        _append(self._path, [{"stage": stage, "shard": shard, "items": items, "seconds": round(seconds, 4)}])

    def timings(self) -> list[dict[str, Any]]:
        """Per stage: items, seconds of all sittings together, items that earlier sittings had done."""
        stages = dict.fromkeys(stage for stage, _ in self._seconds)
        return [
            {
                "stage": stage,
                "items": sum(n for (name, _), n in self._items.items() if name == stage),
                "seconds": round(sum(s for (name, _), s in self._seconds.items() if name == stage), 4),
                "resumed": sum(n for (name, _), n in self._resumed.items() if name == stage),
            }
            for stage in stages
        ]

    def run_shards(
        self,
        stage: str,
        shards: Iterable[tuple[int, int]],
        begin: Callable[[], Callable[[int, int, tqdm[Any]], None]],
        writers: Iterable[Writer],
    ) -> None:
        """Do the shards of `stage` that are missing, with a progress bar.

        Args:
            shards: (start, stop) of each, in items; their order gives them their numbers.
            begin: called once, and only when a shard is missing: opens what the work needs and returns the work, which
                computes and writes the items from start to stop and moves the bar.
            writers: the tensors that `work` writes to.
        """
        todo = list(shards)
        writers = list(writers)
        total = sum(stop - start for start, stop in todo)
        work = None
        often = 0.1 if sys.stderr.isatty() else 30.0  # seconds: a log of hours wants some lines, not thousands
        with tqdm(total=total, desc=f"{stage:<9}", unit=f" {stage}", smoothing=0.1, mininterval=often) as bar:
            for number, (start, stop) in enumerate(todo):
                if self.has(stage, number):
                    bar.update(stop - start)
                    bar.initial = bar.n  # what is already there does not count towards the rate
                    continue
                work = work or begin()
                began = time.perf_counter()
                work(start, stop, bar)
                for writer in writers:
                    writer.flush()
                self.note(stage, number, stop - start, time.perf_counter() - began)


def _append(path: Path, lines: Iterable[dict[str, Any]], mode: str = "a") -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that were written whole: a run may have been killed in the middle of one."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text("utf-8", errors="replace").splitlines(keepends=True):
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not text.endswith("\n") or not isinstance(line, dict):
            break
        lines.append(line)
    return lines
