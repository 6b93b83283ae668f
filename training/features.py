"""What a frozen image encoder makes of each picture, computed once and kept on disk: a training reads it in their place.

    out/features/  features.npy   (P, T, D) float32, in the order of the pictures; before the norm `ln_vision`, which learns
                   pictures.npy   (P, 2) int64: bytes and time of change (ns) of each picture when it was read
                   manifest.json  what the features depend on

P pictures, T tokens of one, D width of the encoder. The folder is made beside and renamed when it is complete; one that was
stopped goes on with the pictures that are left. Of several processes each does its share.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import distributed, nn
from tqdm import tqdm

from models import manifest
from models.config import Config
from models.errors import UserError
from preprocess.images import normalise, read_image
from preprocess.workers import in_order, workers_of
from training.gather import processes
from training.parallel import Place
from training.settings import Settings
from training.whole import by_the_first

KIND = FOLDER = "features"
ROWS, PICTURES = "features.npy", "pictures.npy"
ASKED, DONE = ".asked.json", ".done.npy"  # while the folder is made: what the features depend on, and (P,) bool
KEPT = 1024  # pictures after which a process makes sure that its rows are on the disk
NONE = -1  # bytes and time of a picture that is not there
BAR = "{desc}  {n:,}/{total:,} [{elapsed}<{remaining}, {rate_fmt}]"


def features_of(settings: Settings, config: Config, encoder: nn.Module, pictures: Sequence[Path], place: Place) -> np.ndarray:
    """(P, T, D) float32, mapped into memory: those in `run.out`, when they are of these pictures and this encoder, or new ones.

    All processes call it, before FSDP shares out the weights, and within the precision of the training. A picture that is no
    longer there counts as unchanged. Raises UserError, on every process, for a picture that is missing or broken, when the disk
    has no room, and when `run.out` is not one folder for all of them.
    """
    job = _Job(settings, config, encoder, pictures, place)
    folder, asked = settings.run.out / FOLDER, by_the_first(lambda: _asked(job))
    if not by_the_first(lambda: _is_whole(folder, asked, job)):
        with ExitStack() as held:
            part = by_the_first(lambda: held.enter_context(manifest.new_folder(folder, KIND, resumable=True)))
            left = by_the_first(lambda: _begun(part, asked, job))
            _by_all(lambda: _check_shared(part, place))
            _by_all(lambda: _fill(part, _share(left, place), job))
            by_the_first(lambda: _completed(part, asked))
        by_the_first(lambda: None)  # nobody reads before the folder has its name
    _by_all(lambda: _check_shared(folder, place))
    found: np.ndarray = np.load(folder / ROWS, mmap_mode="r").view(np.ndarray)
    if place.rank == 0:
        click.echo(f"features of {len(found):,} pictures in {folder} ({found.nbytes / 1e9:.2f} GB)")
    return found


def _share(left: np.ndarray, place: Place) -> np.ndarray:
    """The pictures of this process. Those of the first machine make all: two machines that map one file write over each other's
    rows, where these share a page."""
    each = min(int(os.environ.get("LOCAL_WORLD_SIZE", place.processes)), place.processes)
    return left[place.rank :: each] if place.rank < each else left[:0]


@dataclass(frozen=True)
class _Job:
    """What features are made of, and by whom."""

    settings: Settings
    config: Config
    encoder: nn.Module
    pictures: Sequence[Path]
    place: Place

    @property
    def shape(self) -> tuple[int, int, int]:
        """(P, T, D)."""
        return len(self.pictures), self.config.vision.tokens, self.config.vision.width


def _asked(job: _Job) -> dict[str, Any]:
    """What the features depend on, beside the content of the pictures."""
    weights = hashlib.sha256()
    for name, tensor in sorted(job.encoder.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    paths = b"".join(os.fsencode(path.absolute()) + b"\0" for path in job.pictures)
    protocol = job.config.protocol
    return {
        "pictures": hashlib.sha256(paths).hexdigest(),
        "image_size": job.config.vision.image_size,
        "interpolation": protocol.interpolation,
        "mean": list(protocol.mean),
        "std": list(protocol.std),
        "image_encoder": weights.hexdigest(),
        "precision": job.settings.run.precision,
    }


def _stamps(pictures: Sequence[Path]) -> np.ndarray:
    """(P, 2) int64."""
    return np.array([_stamp(path) for path in pictures], np.int64).reshape(-1, 2)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return NONE, NONE
    return found.st_size, found.st_mtime_ns


def _changed(file: Path, now: np.ndarray) -> np.ndarray:
    """(P,) bool: pictures that are others than those of `file`."""
    changed: np.ndarray = ((np.load(file) != now) & (now != NONE)).any(axis=1)
    return changed


def _is_whole(folder: Path, asked: dict[str, Any], job: _Job) -> bool:
    """Whether `folder` holds what is asked; when there is something else, that is said."""
    if not folder.is_dir():
        return False
    try:
        found = manifest.read(folder, KIND).content
        differing = [key for key, value in asked.items() if found.get(key) != value]
        rows = np.load(folder / ROWS, mmap_mode="r")
        if not differing and (rows.shape != job.shape or rows.dtype != np.float32):
            differing = [ROWS]
        changed = 0 if differing else int(_changed(folder / PICTURES, _stamps(job.pictures)).sum())
    except (UserError, OSError, ValueError, EOFError) as error:
        if {path.name for path in folder.iterdir()} <= {ROWS, PICTURES, manifest.NAME}:  # nothing in it is worth keeping
            click.echo(f"{error.message if isinstance(error, UserError) else error} The features are made anew.", err=True)
            shutil.rmtree(folder)
        return False
    if differing or changed:
        what = f"other values of {', '.join(differing)}" if differing else f"{changed:,} pictures that have changed since"
        click.echo(f"{folder} holds features of {what}. They are made anew.", err=True)
    return not (differing or changed)


def _begun(part: Path, asked: dict[str, Any], job: _Job) -> np.ndarray:
    """Pictures that are left to do: all, unless `part` has some of what is asked. Makes room for them."""
    text, now, none = json.dumps(asked), _stamps(job.pictures), np.zeros(len(job.pictures), bool)
    try:
        goes_on = (part / ASKED).read_text("utf-8") == text and np.load(part / ROWS, mmap_mode="r").shape == job.shape
        done = np.load(part / DONE) & ~_changed(part / PICTURES, now) if goes_on else none
    except (OSError, ValueError, EOFError):
        goes_on, done = False, none
    if not goes_on:
        manifest.empty(part)
        _make_room(part, job.shape)
    np.save(part / DONE, done)
    np.save(part / PICTURES, now)
    manifest.write_text(part / ASKED, text)
    return np.flatnonzero(~done)


def _make_room(part: Path, shape: tuple[int, int, int]) -> None:
    """Take the whole room at once: what is written through a map into a full disk would kill the process."""
    needed, free = int(np.prod(shape)) * 4, shutil.disk_usage(part).free
    try:
        if needed > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        np.lib.format.open_memmap(part / ROWS, "w+", np.float32, shape)
        with (part / ROWS).open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError as error:
        manifest.empty(part)
        raise UserError(
            f"The features of {shape[0]:,} pictures take {needed / 1e9:.2f} GB, and {part.parent} has {free / 1e9:.2f} GB free "
            f"({(error.strerror or str(error)).lower()}). Make room, choose another run.out, or train without run.cache_features."
        ) from error


def _check_shared(folder: Path, place: Place) -> None:
    if not (folder / ROWS).is_file():
        raise UserError(
            f"Process {place.rank} finds no {folder / ROWS}, which the first process has made. Set run.out to a folder that all "
            "machines share, or train without run.cache_features."
        )


def _fill(part: Path, left: np.ndarray, job: _Job) -> None:
    """Compute the rows of the pictures `left`, in batches of the size that training has: rounding depends on it."""
    rows, done = np.load(part / ROWS, mmap_mode="r+"), np.load(part / DONE, mmap_mode="r+")
    size, data, protocol = job.settings.run.batchsize, job.settings.data, job.config.protocol
    workers = workers_of(data.workers)
    work = partial(read_image, size=job.config.vision.image_size, interpolation=protocol.interpolation)
    new: list[int] = []

    def keep() -> None:
        rows.flush()
        done[new] = True
        done.flush()
        new.clear()

    bar = tqdm(total=len(left), desc=KIND, unit=" pictures", bar_format=BAR, disable=None if job.place.rank == 0 else True)
    with bar, closing(in_order(work, [job.pictures[n] for n in left], workers)) as decoded:
        try:
            for start in range(0, len(left), size):
                numbers = left[start : start + size]
                pixels = [next(decoded) for _ in numbers]
                pixels += pixels[-1:] * (size - len(pixels))
                image = torch.from_numpy(normalise(np.stack(pixels), protocol.mean, protocol.std)).to(job.place.device)
                with torch.inference_mode():
                    rows[numbers] = job.encoder(image)[: len(numbers)].float().cpu().numpy()
                new.extend(numbers.tolist())
                if len(new) >= KEPT:
                    keep()
                bar.update(len(numbers))
        finally:
            keep()


def _completed(part: Path, asked: dict[str, Any]) -> None:
    for name in (ASKED, DONE):
        (part / name).unlink()
    manifest.write(part, KIND, asked)


def _by_all(work: Callable[[], None]) -> None:
    """Do `work` on every process; the UserError of one of them is that of all."""
    found: list[Any] = [None] * processes()
    error = None
    try:
        work()
    except UserError as raised:
        error = raised
    if processes() > 1:
        distributed.all_gather_object(found, error)
    else:
        found = [error]
    for each in found:
        if each is not None:
            raise each
