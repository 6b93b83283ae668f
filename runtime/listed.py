"""Pictures that are named on the command line, each with its own prompt or question, in the place of a data/ folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from models import manifest
from models.errors import Misuse
from preprocess.checked import Id
from preprocess.image_ids import id_of
from preprocess.images import open_rgb
from runtime.prompts import split_at_commas


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
    """The pictures of a list with commas between, each with an id of its own. The same picture may be named twice.

    Raises Misuse for an empty list or a blank name, UserError for what is no picture, or cannot be decoded.
    """
    names = [name.strip() for name in split_at_commas(images)]
    if not all(names):
        raise Misuse(f"--images is {images[:60]!r}; expected paths of pictures with commas between, none of them blank.")
    paths = [Path(name) for name in names]
    for path in paths:
        open_rgb(path)  # a broken one is found now, and not when others are done
    found = [
        {"image": name, "image_id": each, "sha256": manifest.file_record(path)["sha256"]}
        for name, path, each in zip(names, paths, ids_of(names), strict=True)
    ]
    source = manifest.Manifest(Path(), "data", {"task": task, "images": found}, {}, {})
    return Listed(source, found, paths)


def ids_of(names: Sequence[str]) -> list[Id]:
    """The ids of pictures by their names (preprocess.image_ids), none of them twice: where names tell the same one, they are the
    ids themselves, and a name that is there again gets its number, "a.png#2"."""
    ids = [id_of(name) for name in names]
    times, taken = Counter(ids), set(names)
    found: dict[Id, None] = {}
    for name, each in zip(names, ids, strict=True):
        own = name if times[each] > 1 else each
        if own in found:
            own = next(other for n in count(2) if (other := f"{name}#{n}") not in taken)
            taken.add(own)
        found[own] = None
    return list(found)
