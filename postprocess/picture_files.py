"""Pictures for a page that are files, and not rows of a tensor: of a folder, by their ids, or those that a run was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models import manifest
from models.errors import UserError
from postprocess.gallery import encoded
from preprocess.captioned import pictures_in
from preprocess.checked import Id
from preprocess.image_ids import id_of
from preprocess.images import open_rgb


class PictureFiles:
    """N pictures by number, made when asked for, each once."""

    def __init__(self, names: Sequence[str], paths: Sequence[Path | None]) -> None:
        self.names, self.paths, self.made = names, paths, dict[int, dict[str, Any]]()

    def __call__(self, index: int) -> dict[str, Any] | None:
        """As gallery.Pictures; None of a picture that there is no file of. Raises UserError for a file that is no picture."""
        path = self.paths[index]
        if path is not None and index not in self.made:
            image = open_rgb(path)
            self.made[index] = {"uri": encoded(image), "name": self.names[index], "width": image.width, "height": image.height}
        return self.made.get(index)

    def frame(self) -> tuple[int, int]:
        """Shape of the box that pictures are shown in; the files are not opened to know theirs."""
        return 4, 3


def in_folder(folder: Path | None, ids: Sequence[Id | None]) -> PictureFiles:
    """The pictures of `folder` whose names have these ids; None: no pictures, names alone.

    Raises UserError when there is none of them, or two files of one.
    """
    if folder is None:
        return PictureFiles(["" if each is None else str(each) for each in ids], [None] * len(ids))
    found: dict[Id, str] = {}
    wanted = {each for each in ids if each is not None}
    for name in pictures_in(folder):
        each = id_of(name)
        if each in wanted and found.setdefault(each, name) != name:
            raise UserError(
                f"{folder}: {found[each]} and {name} could both be the picture {each}. Name a folder that has one of each."
            )
    if not found:
        raise UserError(
            f"{folder} has none of the {len(wanted):,} pictures: the number at the end of a file's name is taken for its id, "
            "or the name when it has none. Name another folder, or leave --images out."
        )
    names = [found.get(each, each) if each is not None else "" for each in ids]
    return PictureFiles(list(map(str, names)), [folder / found[each] if each in found else None for each in ids])


def as_named(folder: Path, images: Sequence[Mapping[str, Any]]) -> PictureFiles:
    """The pictures {"image", "sha256"} that a run was given in `folder`, where they still are what they were then."""
    paths = [folder / str(image["image"]) for image in images]
    same = [_is(path, str(image["sha256"])) for path, image in zip(paths, images, strict=True)]
    return PictureFiles(
        [str(image["image"]) for image in images], [path if there else None for path, there in zip(paths, same, strict=True)]
    )


def _is(path: Path, sha256: str) -> bool:
    try:
        return bool(manifest.file_record(path)["sha256"] == sha256)
    except (OSError, ValueError):
        return False
