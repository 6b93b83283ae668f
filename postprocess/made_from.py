"""The data/ folder that an outputs/ folder was made from: found, opened, and known to be the right one by its digest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from models import manifest
from models.errors import UserError
from models.manifest import Manifest


class Sourced(Protocol):
    """A data set that knows its folder."""

    @property
    def source(self) -> Manifest: ...


Data = TypeVar("Data", bound=Sourced)


def open_data(run: Manifest, data: Path | None, read: Callable[[Path], Data]) -> Data:
    """What `read` makes of the folder `data`, or of the one that the outputs `run` name.

    Raises UserError when the outputs name none, when there is no such folder, or when they were made from another.
    """
    task = run.content["task"]  # the data's too
    again = f"{manifest.MADE_WITH['outputs']} {task} again."
    try:
        made_from = run.content["data"]
        recorded, digest = Path(made_from["folder"]), str(made_from["digest"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{run.folder / manifest.NAME} does not say which data it was made from ({error}). Run {again}"
        ) from error
    folder = data or recorded
    if not folder.is_dir():
        hint = f"Write it again with {manifest.MADE_WITH['data']} {task}." if data else "Name the data folder with --data."
        raise UserError(f"{run.folder} was made from {recorded}, and there is no folder {folder}. {hint}")
    found = read(folder)
    if found.source.digest != digest:
        raise UserError(
            f"{run.folder}: these outputs were made from another data folder (digest {digest[:12]}; {folder} has "
            f"{found.source.digest[:12]}). Name the right one with --data, or run {again}"
        )
    return found
