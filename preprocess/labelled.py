"""Pictures with class labels, from a folder of class folders, from annotations, or from CIFAR's own files.

N pictures, C classes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from models import manifest
from models.errors import Misuse, UserError
from preprocess.annotations import in_words, is_text, load_json, part, picture_path
from preprocess.cifar import LABELS, SPLITS, read_cifar
from preprocess.images import FORMATS
from preprocess.pictures import Pictures, check_folder

LISTS = ("samples", "images", "annotations")  # names under which annotations may keep their entries
SHOWN = 5  # names that an error lists


@dataclass(frozen=True)
class Labelled:
    """Pictures in order, each with its class."""

    pictures: Pictures  # N
    labels: list[int]  # N, each below C
    classes: list[str]  # C, as a prompt will name them
    source: dict[str, Any]  # where they come from, for the manifest

    def first(self, limit: int | None) -> Labelled:
        """The first `limit` pictures, all when None; the classes stay."""
        whole = self.pictures
        pictures = dataclasses.replace(
            whole, names=whole.names[:limit], entries=whole.entries[:limit], sources=whole.sources[:limit]
        )
        return dataclasses.replace(self, pictures=pictures, labels=self.labels[:limit])


def read_labelled(
    images: Path | None, annotations: Path | None, cifar: Path | None, split: str | None = None, labels: str | None = None
) -> Labelled:
    """The pictures of the one source that was named. `split` and `labels` belong to `cifar`.

    Raises Misuse when none was named or more than one, UserError when it cannot be used.
    """
    if cifar:
        if images or annotations:
            raise Misuse("Both --cifar and --images or --annotations are given; choose one source of pictures.")
        return from_cifar(cifar, split or SPLITS[0], labels or LABELS[0])
    if split or labels:
        raise Misuse("--split and --labels choose from CIFAR; give its folder with --cifar, or leave them out.")
    if not images:
        raise Misuse(
            "--annotations needs --images, the folder that its paths start from."
            if annotations
            else "No pictures are named: give --images FOLDER, which holds one folder per class, or --cifar FOLDER."
        )
    return from_annotations(annotations, images) if annotations else from_folders(images)


def from_folders(images: Path) -> Labelled:
    """One folder of pictures per class, as torchvision's ImageFolder reads them: classes in the order of the folders' names,
    pictures in the order of theirs, also below folders of a class. '_' in a folder's name is a blank in the class's.

    What is hidden is left out. Raises UserError for whatever else is no picture by its suffix, and for a class without one.
    """
    if not images.is_dir():
        raise UserError(f"There is no folder {images}; --images takes a folder that holds one folder of pictures per class.")
    visible = sorted(path for path in images.iterdir() if path.name[0] != ".")
    folders = [path for path in visible if path.is_dir()]
    if not folders:
        raise UserError(
            f"{images} holds no class folders; expected one folder of pictures per class. Pictures that lie in one folder need "
            "--annotations."
        )
    if beside := [path.name for path in visible if path not in folders]:
        raise UserError(f"{images} holds {_some(beside)} beside its class folders; move or remove what belongs to no class.")
    names: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        files = _picture_files(folder)
        names.extend(file.relative_to(images).as_posix() for file in files)
        labels.extend([label] * len(files))
    if odd := [name for name in names if not is_text(name)]:
        raise UserError(f"{images}: the file name {odd[0]!a} is not UTF-8. Rename it.")
    pictures = Pictures(names, list(range(len(names))), [images / name for name in names])
    classes = _classes([_spoken(folder.name) for folder in folders], str(images))
    return Labelled(pictures, labels, classes, {"kind": "folders", "folder": str(images.absolute())})


def from_annotations(path: Path, images: Path) -> Labelled:
    """A JSON list of {"image": path below `images`, "label": name or number of a class}, alone or under one of LISTS beside
    "classes", a list of names. Without "classes" these are the labels' names, sorted.

    Raises UserError that names the file, the entry (from 0) and what was found there.
    """
    values = load_json(path, "a JSON list of pictures and labels")
    classes = None
    if isinstance(values, dict):
        if "classes" in values:
            classes = _classes(values["classes"], f"{path}: its 'classes'")
        kept = [name for name in LISTS if name in values]
        if len(kept) != 1:
            has = ", ".join(map(repr, list(values)[:SHOWN])) or "nothing"
            raise UserError(f"{path} has {has}; expected one list of pictures, under {', '.join(map(repr, LISTS))}.")
        values = values[kept[0]]
    if not isinstance(values, list) or not values:
        what = "an empty list" if values == [] else in_words(values)
        raise UserError(f"{path} holds {what}; expected a list of entries with 'image' and 'label'.")
    names, found = [], []
    for number, entry in enumerate(values):
        where = f"{path}, entry {number}"
        names.append(picture_path(part(entry, "image", where), where))
        found.append(_label(part(entry, "label", where), classes, f"{where} ({names[-1]})"))
    classes = classes or _classes(sorted(set(found)), f"{path}: its labels")
    number_of = {name: number for number, name in enumerate(classes)}
    check_folder(images, names, path)
    pictures = Pictures(names, list(range(len(names))), [images / name for name in names])
    source = {
        "kind": "annotations",
        "file": str(path),
        "sha256": manifest.file_record(path)["sha256"],
        "folder": str(images.absolute()),
    }
    return Labelled(pictures, [number_of[name] for name in found], classes, source)


def from_cifar(folder: Path, split: str, labels: str) -> Labelled:
    """A part of CIFAR-100 or CIFAR-10, see preprocess.cifar. '_' in the name of a class is read as a blank."""
    found = read_cifar(folder, split, labels)
    pictures = Pictures(found.names, list(range(len(found.names))), list(found.pixels))
    source = {"kind": "cifar", "folder": str(folder.absolute()), "split": split, "labels": labels}
    return Labelled(pictures, found.labels, _classes([_spoken(name) for name in found.classes], str(folder)), source)


def _picture_files(folder: Path) -> list[Path]:
    """The pictures of one class. Raises UserError when there is none, or something else."""
    found: list[Path] = []
    for root, folders, files in os.walk(folder, onerror=_fail):
        folders[:] = [name for name in folders if name[0] != "."]
        linked = [name for name in folders if (Path(root) / name).is_symlink()]  # not walked, and not passed over in silence
        found.extend(Path(root) / name for name in [*files, *linked] if name[0] != ".")
    if others := sorted(file.relative_to(folder).as_posix() for file in found if file.suffix.lower() not in _suffixes()):
        raise UserError(
            f"{folder} holds what is no picture by its suffix: {_some(others)}. Remove it, or hide it with a dot before its name."
        )
    if not found:
        raise UserError(f"The class folder {folder} holds no picture; remove it, or add the pictures of this class.")
    return sorted(found, key=lambda file: (str(file.parent), file.name))


@cache
def _suffixes() -> frozenset[str]:
    return frozenset(suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS)


def _fail(error: OSError) -> None:
    raise error


def _label(value: Any, classes: Sequence[str] | None, where: str) -> str:
    """The name of the class that a label names or counts. `classes` is None where the file does not list them."""
    if isinstance(value, str):
        if classes and value not in classes:
            raise UserError(f"{where}: its label {value[:60]!a} is none of the {len(classes):,} classes that the file lists.")
        return _class(value, f"{where}: its label")
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{where}: its label is {in_words(value)}; expected the name of a class, or its whole number.")
    if classes is None:
        raise UserError(f"{where}: its label is a number, but the file has no 'classes' that it could count. Add them.")
    if not 0 <= value < len(classes):
        raise UserError(f"{where}: its label is none of the numbers of the {len(classes):,} classes, 0 to {len(classes) - 1}.")
    return classes[value]


def _classes(values: Any, where: str) -> list[str]:
    """Names of classes, none twice: blanks around a name tell nothing apart."""
    if not isinstance(values, list) or not values:
        raise UserError(f"{where} is {'an empty list' if values == [] else in_words(values)}; expected a list of names.")
    names = [_class(value, f"{where}: class {number}") for number, value in enumerate(values)]
    seen: set[str] = set()
    for name in names:
        if (bare := name.strip()) in seen:
            raise UserError(f"{where}: two classes are called {bare[:60]!a}; give each a name of its own.")
        seen.add(bare)
    return names


def _class(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where} is {in_words(value)}; expected the name of a class.")
    if not is_text(value):
        raise UserError(f"{where}, {value[:60]!a}, holds half a character (a lone surrogate). Correct it.")
    return value


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
