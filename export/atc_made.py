"""The .om files that a run of blip-atc has finished when it is stopped, or fails: noted one by one, for the next to go on from.

A note holds for the same call of the same ATC on the same graph, as long as the files are what they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export.atc_command import Job
from export.atc_plan import Plan, files_of
from models import manifest

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
        """Keeps what was noted of the calls of `plan` by the converter at `atc`, and is as it was noted; removes the rest."""
        self.folder, self.plan, self.atc = folder, plan, os.path.realpath(atc)
        calls = {self._call(job) for job in plan.jobs}
        self.notes = {note.call: note for note in _read(folder) if note.call in calls and _holds(note, folder)}
        self.sweep()

    def note(self, job: Job) -> Note | None:
        """That of `job`; None when it has yet to be done."""
        return self.notes.get(self._call(job))

    def add(self, job: Job, file: str, seconds: float) -> Note:
        """`job` has left `file`. Which of the weights beside it are its own nobody says, so it is noted with all of them."""
        held = {name: record for note in self.notes.values() for name, record in note.files.items()}
        left = [file, *sorted(f"{WEIGHTS}/{path.name}" for path in self.folder.glob(f"{WEIGHTS}/*"))]
        records = {name: held.get(name) or manifest.file_record(self.folder / name) for name in left}
        call = self._call(job)
        self.notes[call] = Note(call, file, seconds, records)
        manifest.write_text(self.folder / NOTES, json.dumps([asdict(note) for note in self.notes.values()]))
        return self.notes[call]

    def sweep(self) -> None:
        """Remove all but what is finished."""
        kept = {name for note in self.notes.values() for name in note.files} | ({NOTES} if self.notes else set())
        for path in self.folder.iterdir():
            if path.name == WEIGHTS:
                for weight in path.iterdir():
                    if f"{WEIGHTS}/{weight.name}" not in kept:
                        weight.unlink()
            elif path.is_dir():
                shutil.rmtree(path)
            elif path.name not in kept:
                path.unlink()

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


def _holds(note: Note, folder: Path) -> bool:
    return all((folder / name).is_file() and manifest.file_record(folder / name) == said for name, said in note.files.items())
