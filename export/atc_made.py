"""The .om files that a run of blip-atc has finished when it is stopped, or fails: noted one by one, for the next to go on from.

A note holds for the same call of the same ATC on the same graph, as long as the files are what they were. Those of other calls
are kept until a run is complete, or makes files of the same names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export.atc_command import Job
from export.atc_plan import Plan, files_of
from models import manifest
from models.errors import UserError
from models.om import SUFFIX

NOTES = ".made.json"
WEIGHTS = "weight"  # where ATC puts what --external-weight takes out of an .om


@dataclass(frozen=True)
class Note:
    """Of one call that ended well."""

    call: str  # names the call, and all that it reads
    file: str
    seconds: float
    files: dict[str, dict[str, Any]]  # that it left: relative name -> sha256 and bytes


class Finished:
    """What is finished in `folder`, which holds nothing else once this is made."""

    def __init__(self, folder: Path, plan: Plan, atc: str) -> None:
        """Keeps what was noted, and is as it was noted, of the calls of `plan` by the converter at `atc` and of others; removes
        the rest."""
        self.folder, self.plan, self.atc = folder, plan, os.path.realpath(atc)
        self.calls = {self._call(job) for job in plan.jobs}
        self.notes = {note.call: note for note in _read(folder) if _holds(note, folder)}
        self.sweep()

    def __len__(self) -> int:
        """Calls of the plan that are done."""
        return len(self.calls & self.notes.keys())

    def note(self, job: Job) -> Note | None:
        """That of `job`; None when it has yet to be done."""
        return self.notes.get(self._call(job))

    def make_room(self, job: Job) -> list[str]:
        """Remove what calls of other plans left under the names that `job` may give, before it is called; returns these .om. With
        weights beside the .om that is all that has such weights: nobody says which of them ATC will write, or take."""

        def stands_in_the_way(note: Note) -> bool:
            named = note.file == f"{job.stem}{SUFFIX}" or note.file.startswith(f"{job.stem}_linux_")
            return named or (self.plan.options.external_weight and any(_is_weight(name) for name in note.files))

        going = [note for note in self.notes.values() if note.call not in self.calls and stands_in_the_way(note)]
        for note in going:
            del self.notes[note.call]
        if going:
            self._write()
            still = {name for note in self.notes.values() for name in note.files}
            for name in {name for note in going for name in note.files} - still:
                (self.folder / name).unlink()
        return [note.file for note in going]

    def add(self, job: Job, file: str, seconds: float) -> Note:
        """`job` has left `file`. Which of the weights beside it are its own nobody says, so it is noted with all of them."""
        held = {name: record for note in self.notes.values() for name, record in note.files.items()}
        beside = self.folder.glob(f"{WEIGHTS}/**/*") if self.plan.options.external_weight else ()
        left = [file, *sorted(path.relative_to(self.folder).as_posix() for path in beside if path.is_file())]
        records = {name: held.get(name) or manifest.file_record(self.folder / name) for name in left}
        call = self._call(job)
        self.notes[call] = Note(call, file, seconds, records)
        self._write()
        return self.notes[call]

    def close(self) -> None:
        """The plan is done: what is of others goes, and whatever else has come to lie in the folder."""
        self.notes = {call: note for call, note in self.notes.items() if call in self.calls}
        self.sweep()

    def check(self, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise UserError when `files`, the records of a manifest, are not what was noted: an ATC whose blip-atc was killed may
        still have written. The note of such a file is gone then."""
        for call, note in list(self.notes.items()):
            if changed := [name for name, record in note.files.items() if files.get(name) != record]:
                del self.notes[call]
                raise UserError(
                    f"{changed[0]} has changed since ATC made it: something else writes to {self.folder}, such as an ATC of an "
                    "earlier run. Look for it with `ps -ef`, and end it"
                )

    def sweep(self) -> None:
        """Remove all but what is finished."""
        kept = {name for note in self.notes.values() for name in note.files} | ({NOTES} if self.notes else set())
        _remove_but(self.folder, {self.folder / name for name in kept})

    def _write(self) -> None:
        manifest.write_text(self.folder / NOTES, json.dumps([asdict(note) for note in self.notes.values()]))

    def _call(self, job: Job) -> str:
        """The command, the graph's files, and the texts of the lists that the command names; with weights beside the .om, which
        the graphs may share, all commands."""
        named = {part.partition("=")[2] for part in job.argv}
        lists = {name: text for name, text in self.plan.files.items() if name in named}
        graph = {name: self.plan.source.files[name] for name in files_of(self.plan.source, job.graph)}
        every = [each.argv for each in self.plan.jobs] if self.plan.options.external_weight else []
        return hashlib.sha256(json.dumps([self.atc, job.argv, graph, lists, every], sort_keys=True).encode()).hexdigest()


def _read(folder: Path) -> list[Note]:
    """What was noted; nothing when that cannot be read: it is done again."""
    try:
        return [Note(**note) for note in json.loads((folder / NOTES).read_text("utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def _remove_but(folder: Path, kept: set[Path]) -> None:
    """All files in `folder` but those, and the folders that are empty then."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            _remove_but(path, kept)
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in kept:
            path.unlink()


def _is_weight(name: str) -> bool:
    return name.startswith(f"{WEIGHTS}/")


def _holds(note: Note, folder: Path) -> bool:
    return all((folder / name).is_file() and manifest.file_record(folder / name) == said for name, said in note.files.items())
