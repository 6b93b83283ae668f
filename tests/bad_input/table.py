"""Bad input as a table: what is spoilt, which command meets it, and what it has to say.

Each case goes through the real command line, without and with an older complete result in --out. Whatever happens, no
file of the whole working folder may change: no half-written result, nothing left over, the older result as it was.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.testing import Result

import bench.__main__
import export.__main__
import models.convert
import postprocess.__main__
import preprocess.__main__
import runtime.__main__
import training.__main__
from models import manifest
from tests import chain

COMMANDS: dict[str, click.Command] = {
    "pre": preprocess.__main__.main,
    "export": export.__main__.main,
    "convert": models.convert.main,
    "run": runtime.__main__.main,
    "post": postprocess.__main__.main,
    "bench": bench.__main__.main,
    "train": training.__main__.main,
}
# What a step has written to --out before: a step is a command, or a command and one of its tasks.
OLDER = {
    "pre": "data",
    "pre classify": "label-data",
    "pre cifar": "label-data",
    "export": "graphs",
    "run": "outputs",
    "run classify": "label-outputs",
    "run features": "features",
    "post": "report",
    "post top1": "label-report",
    "train": "model/model.safetensors",
}
LONGEST = 900  # characters of a message: what is wrong must not drown in it


@dataclass(frozen=True)
class Work:
    """A folder of its own with a good result of every step, for one test to spoil."""

    root: Path

    @property
    def out(self) -> Path:
        """What the command is to write."""
        return self.root / "out"

    def __getitem__(self, name: str) -> Path:
        return self.root / name

    def usual(self, step: str) -> list[object]:
        """Options with which `step` would succeed. One that is given again later replaces the first."""
        model = self["model"]
        pictures = ("--annotations", self["annotations.json"], "--images", self["images"])
        sizes = ("--config", model / "config.json", "--tokenizer", model / "vocab.txt")
        weights = model / "model.safetensors"
        prepared = ("--graphs", self["graphs"], "--out", self.out, "--workers", 1)
        engine = ("--graphs", self["graphs"], "--out", self.out, "--threads", 1)
        steps: dict[str, tuple[object, ...]] = {
            "pre": ("retrieval", *pictures, *prepared),
            "pre classify": ("classify", "--images", self["classes"], *prepared),
            "pre cifar": ("classify", "--cifar", self["cifar"], *prepared),
            "export": (*sizes, "--checkpoint", weights, "--out", self.out, "--graphs", "text_embed"),
            "convert": ("--from", weights, "--config", model / "config.json", "--to", "hf", "--out", self.out),
            "run": ("retrieval", "--data", self["data"], *engine, "--k-test", 3),
            "run classify": ("classify", "--data", self["label-data"], *engine, "--template", "{} word9"),
            "run features": ("features", "--data", self["data"], *engine, "--batchsize", 2),
            "post": ("--recall", "--outputs", self["outputs"], "--data", self["data"], "--out", self.out),
            "post top1": ("--top1", "--outputs", self["label-outputs"], "--data", self["label-data"], "--out", self.out),
            "bench": ("--graphs", self["graphs"], "--record", self.out, "--loops", 1, "--warmup", 0, "--threads", 1),
            "train": ("pretrain", "--config", "demo-pretrain"),
            "train probe": (
                *("probe", *sizes, "--checkpoint", self["whole.pth"]),
                *("--image", self["images"] / "0.png", "--text", "word1 word2"),
            ),
        }
        return list(steps[step])

    def call(self, step: str, *options: object) -> Result:
        """Run `step` with its usual options and these. What it did not foresee is raised here."""
        return chain.call(COMMANDS[step.split()[0]], *self.usual(step), *options)

    def annotate(self, entry: object, number: int = 1) -> None:
        """Put `entry` in the place of the annotations' entry `number`."""
        entries = json.loads(self["annotations.json"].read_text("utf-8"))
        entries[number] = entry
        self["annotations.json"].write_text(json.dumps(entries), "utf-8")

    def picture(self, name: str) -> Path:
        """Let entry 1 name the picture `name`; returns where it belongs."""
        self.annotate({"image": name, "caption": "word1 word2"})
        return self["images"] / name

    def edit(self, file: str, change: Callable[[Any], object]) -> None:
        """Change the JSON values of a file: a manifest, the sizes of the model."""
        values = json.loads(self[file].read_text("utf-8"))
        change(values)
        self[file].write_text(json.dumps(values), "utf-8")

    def resign(self, folder: str) -> None:
        """Write the sizes and hashes of a manifest again, so that only the content is wrong."""
        found = json.loads((self[folder] / manifest.NAME).read_text("utf-8"))
        content = {key: found[key] for key in found.keys() - {"format", "kind", "made_by", "files"}}
        (self[folder] / manifest.NAME).unlink()
        manifest.write(self[folder], found["kind"], content)

    def state(self) -> dict[str, bytes]:
        """Every file of the working folder; folders and links by what they are."""
        return {path.relative_to(self.root).as_posix(): _content(path) for path in sorted(self.root.rglob("*"))}


Spoil = Callable[[Work], Sequence[object] | None]


@dataclass(frozen=True)
class Case:
    """One kind of bad input."""

    name: str
    step: str
    said: tuple[str, ...]  # all of them stand in the message
    spoil: Spoil = lambda work: None  # damages the inputs; returns the options to add
    code: int = 1
    begun: bool = False  # the run has begun, and keeps what it has for the next one

    def __str__(self) -> str:
        return self.name


def options(*values: object) -> Spoil:
    """Nothing is spoilt but the command line."""
    return lambda work: values


def refused(case: Case, work: Work, older: bool = True) -> None:
    """Run `case`, and hold the command to the exit code, to one message and to leaving everything as it was: with nothing
    in --out, then (with `older`, if the step writes there) with a complete result in it, made with other options."""
    aside = work.root.with_name("older")
    if older and case.step in OLDER:
        source = work[OLDER[case.step]]
        shutil.copytree(source, aside) if source.is_dir() else shutil.copy(source, aside)
    added = case.spoil(work) or ()
    _refused_once(case, work, added)
    if aside.exists():
        aside.rename(work.out)
        _refused_once(case, work, added)


def _refused_once(case: Case, work: Work, added: Sequence[object]) -> None:
    before = work.state()
    result = work.call(case.step, *added)
    message = the_message(result.stderr)
    assert result.exit_code == case.code, result.output
    for words in case.said:
        assert words in message, message
    after = work.state()
    if case.begun:
        before, after = (
            {name: content for name, content in state.items() if name.split("/")[0] != ".out.part"} for state in (before, after)
        )
    assert after == before, sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def the_message(stderr: str) -> str:
    """The one error that stands in `stderr`, and ends it."""
    assert "Traceback" not in stderr
    _, *errors = re.split(r"^Error: ", stderr, flags=re.MULTILINE)
    assert len(errors) == 1, stderr
    message = errors[0].rstrip("\n")
    assert message.endswith((".", "?", ")")), message  # click ends some of its own with a bracket
    assert len(message) <= LONGEST, message
    return message


def _content(path: Path) -> bytes:
    if path.is_symlink():
        return f"link to {path.readlink()}".encode()
    return path.read_bytes() if path.is_file() else b"a folder, a pipe, ..."
