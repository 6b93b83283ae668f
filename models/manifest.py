"""What one step hands to the next: a folder whose `manifest.json` is written last, so its presence means complete.

A manifest holds the format version, the kind of folder, the command and versions that made it, sha256 and size of each
file, and the part its kind adds. Imports no torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import Misuse, UserError

FORMAT = 1
NAME = "manifest.json"
MADE_WITH = {
    "data": "blip-pre",
    "graphs": "blip-export",
    "atc": "blip-atc --script",
    "om": "blip-atc",
    "ais_bench": "blip-run ais-bench-script",
    "pairs": "blip-run pairs",
    "outputs": "blip-run",
    "report": "blip-post",
    "features": "blip-train --cache-features",
}
# What to do with a folder that is of another step of the conversion, by the kind that was wanted and the one that was found.
COLLECT = "Its .om files are not collected: run `bash atc.sh` in it, then `blip-atc --collect --out {folder}`."
INSTEAD = {
    ("graphs", "atc"): COLLECT,
    ("om", "atc"): COLLECT,
    ("graphs", "om"): "It is already converted; expected is the folder of blip-export that it was made of.",
    ("atc", "om"): "It has its manifest already; nothing is left to collect.",
}
REPORTED = ("blip-offline", "numpy", "pillow", "tokenizers", "onnx", "onnxruntime", "onnxscript", "onnxslim", "torch")


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read: what its kind adds is in `content`."""

    folder: Path
    kind: str
    content: dict[str, Any]
    files: dict[str, dict[str, Any]]  # relative name -> {"sha256", "bytes"}
    made_by: dict[str, Any]

    @property
    def digest(self) -> str:
        """Names the content, whenever and by whichever command it was made."""
        return _digest(self.kind, self.content, self.files)


def write(folder: Path, kind: str, content: dict[str, Any], files: dict[str, dict[str, Any]] | None = None) -> Manifest:
    """Complete `folder`: hash its files (unless `files` says what they hold) and write its manifest, last, by rename."""
    if files is None:
        names = sorted(
            p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != NAME and p.name[0] != "."
        )
        files = {name: file_record(folder / name) for name in names}
    made_by = {
        "command": command(),
        "python": platform.python_version(),
        "versions": versions(),
    }
    # Escaped to ASCII: a caption or a file name may hold half a surrogate pair, which UTF-8 cannot write.
    text = json.dumps({"format": FORMAT, "kind": kind, "made_by": made_by, **content, "files": files}, indent=1)
    write_text(folder / NAME, text + "\n")
    return Manifest(folder, kind, content, files, made_by)


def read(folder: Path, kind: str, verify: bool = False) -> Manifest:
    """Read and check the manifest of `folder`: kind, version and file sizes always, hashes with `verify`.

    Raises UserError with one sentence that names the file, what was found, what was expected and the command that
    mends it.
    """
    mend = f"Write the folder again with {MADE_WITH[kind]}."
    path = folder / NAME
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. {MADE_WITH[kind]} writes it.")
    if not path.is_file():
        raise UserError(f"{folder} holds no {NAME}: it is not a complete {kind} folder. {mend}")
    try:
        found = json.loads(path.read_text("utf-8"))
        head = (found.pop("format"), found.pop("kind"))
        made_by, files = found.pop("made_by"), found.pop("files")
        records = {name: (int(record["bytes"]), str(record["sha256"])) for name, record in files.items()}
    except (ValueError, OverflowError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}). {mend}") from error
    if head[1] != kind:
        mend = INSTEAD.get((kind, str(head[1])), mend).format(folder=folder)
        raise UserError(f"{folder} is a {head[1]!r} folder, expected {kind!r}. {mend}")
    if head[0] != FORMAT:
        raise UserError(f"{path} has format {head[0]!r}, this release reads {FORMAT}. {mend}")
    for name, (size, sha256) in records.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing, {path} lists it. {mend}")
        if file.stat().st_size != size:
            raise UserError(f"{file} has {file.stat().st_size:,} bytes, its manifest says {size:,}. {mend}")
        if verify and file_record(file)["sha256"] != sha256:
            raise UserError(f"{file} is not what its manifest describes: the sha256 differs. {mend}")
    return Manifest(folder, kind, found, files, made_by)


def read_one_of(folder: Path, kinds: Sequence[str], verify: bool = False) -> Manifest:
    """The same of a folder of any of these kinds; what is none of them is told of the first."""
    kind = _head(folder).get("kind")
    return read(folder, str(kind) if kind in kinds else kinds[0], verify)


@contextmanager
def new_folder(out: Path, kind: str, resumable: bool = False, task: str | None = None) -> Iterator[Path]:
    """Yield a folder beside `out`, which takes the place of `out` when the block ends well.

    The block writes the manifest. The folder is empty, and when the block fails nothing is left behind; a `resumable`
    one is kept then, and found again by the next call. An older `out` stays as it was until the new one is complete.
    Raises Misuse when `out` holds something that is not ours, or is of another task than `task` (None: of any), UserError
    when another run is writing it.
    """
    out = Path(os.path.realpath(out))  # renames would take a link for what it points to
    if out.exists() and not out.is_dir():
        raise Misuse(f"{out} is a file; --out takes a folder.")
    if out.is_symlink():  # realpath leaves a link only when following it never ends
        raise Misuse(f"{out} is a link that leads back to itself; choose another --out, or remove it.")
    if out.is_dir() and any(out.iterdir()) and _head(out).get("kind") != kind:
        raise Misuse(f"{out} is not empty and is not a {kind} folder; choose another --out, or empty it yourself.")
    if task:
        refuse_task(out, kind, task)
    out.parent.mkdir(parents=True, exist_ok=True)
    part, old = out.parent / f".{out.name}.part", out.parent / f".{out.name}.old"
    part.mkdir(exist_ok=True)
    with locked(part, f"Another run is writing {out}; wait for it, or choose another --out."):
        if old.exists() and not out.exists():  # a run was killed between its two renames
            old.rename(out)
        if not resumable:
            empty(part)
        try:
            yield part
        except BaseException:
            if not resumable:
                shutil.rmtree(part, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        part.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def refuse_task(out: Path, kind: str, task: str) -> None:
    """Raise Misuse when `out` is complete and of another task: what took hours is not replaced by something else."""
    if (held := _head(out).get("task", task)) != task:
        raise Misuse(f"{out} is of the task {held!r}, this is {task!r}: its {kind} would be lost. Choose another --out.")


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Hold `folder` for this process; raise UserError(busy) when another one has it. The lock dies with its owner."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        # Its owner may have finished, and renamed it, between the two lines above.
        if not folder.is_dir() or not os.path.samestat(os.fstat(handle), folder.stat()):
            raise UserError(busy)
        yield
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename: a reader sees the old text or the new one, never a part."""
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def file_record(path: Path) -> dict[str, Any]:
    """Size and sha256 of one file, as a manifest keeps them."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def versions() -> dict[str, str]:
    """Installed releases of what can change a number."""
    installed = {}
    for name in REPORTED:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def command() -> str:
    """How this process was called, to be typed again: `blip-pre retrieval ...`, `python -m preprocess retrieval ...`."""
    called = Path(sys.argv[0])
    program = [called.name]
    if called.stem == "__main__":
        program = ["python", "-m", called.parent.name]
    elif (called.parent / "__init__.py").is_file():
        program = ["python", "-m", f"{called.parent.name}.{called.stem}"]
    return shlex.join([*program, *sys.argv[1:]])


def _digest(kind: str, content: dict[str, Any], files: dict[str, dict[str, Any]]) -> str:
    text = json.dumps([FORMAT, kind, content, files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _head(folder: Path) -> dict[str, Any]:
    """What the manifest of `folder` says, unchecked; nothing when there is none."""
    try:
        found = json.loads((folder / NAME).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def empty(folder: Path) -> None:
    """Remove what `folder` holds, not the folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
