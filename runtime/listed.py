"""Pictures that are named on the command line, each with its own prompt or question, in the place of a data/ folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import manifest
from models.errors import Misuse
from preprocess.image_ids import id_of
from preprocess.images import open_rgb
from runtime.prompts import listed


@dataclass(frozen=True)
class Listed:
    """N pictures. Their manifest is written nowhere: it names what the outputs were made of."""

    source: manifest.Manifest
    images: list[dict[str, Any]]  # N of {"image": path as named, "image_id", "sha256"}
    paths: list[Path]  # N

    @property
    def protocol(self) -> dict[str, Any]:
        return {}


def list_pictures(images: str, task: str) -> Listed:
    """The pictures of a list with commas between. The same picture may be named twice.

    Raises Misuse for an empty list or a blank name, UserError for what is no picture, or cannot be decoded.
    """
    names = [name.strip() for name in listed(images)]
    if not all(names):
        raise Misuse(f"--images is {images[:60]!r}; expected paths of pictures with commas between, none of them blank.")
    paths = [Path(name) for name in names]
    for path in paths:
        open_rgb(path)  # a broken one is found now, and not when others are done
    found = [
        {"image": name, "image_id": id_of(name), "sha256": manifest.file_record(path)["sha256"]}
        for name, path in zip(names, paths, strict=True)
    ]
    source = manifest.Manifest(Path(), "data", {"task": task, "images": found}, {}, {})
    return Listed(source, found, paths)
