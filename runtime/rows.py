"""Results that are no tensors: JSON lines, a file for each shard, until all shards are there.

The names of these files begin with a dot, so that no manifest lists them; they are removed once the whole is written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from models import manifest
from models.errors import UserError

Row = dict[str, Any]
PREFIX = ".rows."


class Rows:
    """The rows of one run, in the folder that becomes its outputs/."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, start: int, rows: list[Row]) -> None:
        """The rows of the shard that begins with item `start`: they are on the disk when this returns."""
        path = self._path(start)
        beside = path.with_name(f"{path.name}.part")
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)

    def merged(self, name: str, shards: list[tuple[int, int]], key: str) -> list[Row]:
        """All rows in the order of their number `key`, and the file `name` with them; the shards' own files are removed.

        Raises UserError when the rows of a shard are lost.
        """
        path = self._folder / name
        if path.exists():  # the run was stopped behind this line
            found: list[Row] = json.loads(path.read_text("utf-8"))
        else:
            found = sorted((row for shard in shards for row in self._read(*shard)), key=lambda row: row[key])
            manifest.write_text(path, lines_of(found))
        for shard in self._folder.glob(f"{PREFIX}*"):
            shard.unlink()
        return found

    def _read(self, start: int, stop: int) -> list[Row]:
        path = self._path(start)
        try:
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        except (OSError, ValueError):
            rows = []
        if len(rows) != stop - start:
            raise UserError(f"{path} is lost or damaged: the run cannot go on where it was. Begin anew with --restart.")
        return rows

    def _path(self, start: int) -> Path:
        return self._folder / f"{PREFIX}{start}.jsonl"


def lines_of(rows: list[Row]) -> str:
    """A JSON list with a line for each row."""
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n" if rows else "[]\n"
