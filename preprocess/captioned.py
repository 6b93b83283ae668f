"""Pictures to be captioned: those of a folder, or of a list with the captions that people wrote, and prompts. N pictures.

These lists are read; the first two need not hold captions:
    [{"image": "a.jpg", "caption": [...], "image_id": 7, "prompt": "..."}]       evaluation lists of salesforce/BLIP and LAVIS
    {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}  COCO's captions_*.json and *_gt.json
    {"images": [{"filename", "split", "sentences"}]}                             Karpathy's dataset_*.json: one split of it
    name.jpg#0 <TAB> caption                                                     Flickr8k.token.txt: one split of it
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import manifest
from models.errors import Misuse, UserError
from preprocess.annotations import in_words, load_json, part, picture_path, read_annotations
from preprocess.checked import Id, checked_list, checked_text
from preprocess.image_ids import coco_names, id_of, image_id, refuse_twins
from preprocess.lines import SUFFIXES, read_flickr, read_prompts
from preprocess.pictures import Pictures, check_folder

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")  # suffixes, also in capital letters
TEST = "test"  # the split when none is named


@dataclass(frozen=True)
class Captioned:
    """Pictures in order."""

    pictures: Pictures  # N
    ids: list[Id]  # N, each another one
    references: list[list[str]]  # N lists of captions as annotated; all are empty when there are none
    prompts: list[str] | None  # N
    source: dict[str, Any]  # where they come from, for the manifest

    def first(self, limit: int | None) -> Captioned:
        """The first `limit` pictures, all when None."""
        return Captioned(
            self.pictures.first(limit),
            self.ids[:limit],
            self.references[:limit],
            self.prompts and self.prompts[:limit],
            self.source,
        )


@dataclass(frozen=True)
class Entry:
    """One picture as a list names it."""

    number: int  # in its list, from 0
    image: str  # path below the picture folder
    id: Id
    captions: list[str]
    prompt: str | None = None


def read_captioned(
    images: Path, annotations: Path | None = None, split: str | None = None, prompts: Path | None = None
) -> Captioned:
    """The pictures of the folder `images`, all of them or those that `annotations` names. `split` chooses from Karpathy's own
    file and from Flickr8k's (None: test); `prompts` is a text with one line for each picture.

    Raises UserError that names the file, the entry (from 0) and what was found there; Misuse when options contradict each
    other.
    """
    if annotations is None:
        if split:
            raise Misuse("--split chooses from a list of pictures; name it with --annotations, or leave --split out.")
        entries = [Entry(number, name, id_of(name), []) for number, name in enumerate(pictures_in(images))]
        source = {"kind": "folder", "folder": str(images.absolute())}
    else:
        entries = _read(annotations, images, split or TEST)
        check_folder(images, [entry.image for entry in entries], annotations)
        sha256 = manifest.file_record(annotations)["sha256"]
        source = {"kind": "annotations", "file": str(annotations), "sha256": sha256, "folder": str(images.absolute())}
    where = annotations or images
    names, ids = [entry.image for entry in entries], [entry.id for entry in entries]
    refuse_twins(ids, names, where)
    _all_or_none(entries, [bool(entry.captions) for entry in entries], "caption", where)
    _all_or_none(entries, [entry.prompt is not None for entry in entries], "prompt", where)
    own = [entry.prompt for entry in entries if entry.prompt is not None]
    if prompts:
        if own:
            raise Misuse(f"Both --prompts-file and {where} give prompts; choose one of them.")
        own = read_prompts(prompts)
        if len(own) != len(entries):
            raise UserError(f"{prompts} holds {len(own):,} prompts for {len(entries):,} pictures of {where}; expected one each.")
        source["prompts"] = str(prompts)
    lost = "them and their captions" if annotations else "them"
    pictures = Pictures(names, [entry.number for entry in entries], [images / name for name in names], lost)
    return Captioned(pictures, ids, [entry.captions for entry in entries], own or None, source)


def pictures_in(images: Path) -> list[str]:
    """The pictures of a folder and of the folders in it, known by their suffix, sorted. What is hidden is left out.

    Raises UserError when there is none, and for a link to a folder, which would not be entered.
    """
    if not images.is_dir():
        raise UserError(f"There is no folder {images}; --images takes a folder of pictures.")
    found: list[str] = []
    for root, folders, files in os.walk(images, onerror=_fail):
        folders[:] = [name for name in folders if name[0] != "."]
        if linked := [name for name in folders if (Path(root) / name).is_symlink()]:
            raise UserError(f"{Path(root) / linked[0]} is a link to a folder, and is not entered. Copy the folder, or remove it.")
        names = [name for name in files if name[0] != "." and Path(name).suffix.lower() in PICTURES]
        found.extend((Path(root) / name).relative_to(images).as_posix() for name in names)
    if not found:
        raise UserError(f"{images} holds no picture: no file whose name ends in {', '.join(PICTURES)}.")
    return [picture_path(name, str(images)) for name in sorted(found)]


def _read(path: Path, images: Path, split: str) -> list[Entry]:
    if path.suffix.lower() in SUFFIXES:
        found = enumerate(read_flickr(path, split))
        return [Entry(number, name, id_of(name), captions) for number, (name, captions) in found]
    values = load_json(path, "a JSON list of pictures")
    if not isinstance(values, dict):
        return _listed(checked_list(values, f"{path} holds", "entries with 'image'"), path)
    pictures = checked_list(part(values, "images", str(path)), f"{path}: its 'images' is", "pictures")
    if "annotations" in values or (isinstance(pictures[0], dict) and "id" in pictures[0]):
        return _coco(pictures, values.get("annotations", []), path, images)
    del values, pictures  # read again: such files are the largest
    return _karpathy(path, split)


def _listed(values: list[Any], path: Path) -> list[Entry]:
    """BLIP's list. Entries with a single caption that name the same picture are one, as in its training files."""
    entries: list[Entry] = []
    places: dict[str, int] = {}
    for number, value in enumerate(values):
        image = picture_path(part(value, "image", f"{path}, entry {number}"), f"{path}, entry {number}")
        where = f"{path}, entry {number} ({image})"
        key = next((key for key in ("image_id", "img_id") if key in value), None)  # nocaps has img_id
        entry = Entry(
            number,
            image,
            image_id(value[key], where, key) if key else id_of(image),
            _captions(value["caption"], where) if "caption" in value else [],
            checked_text(value["prompt"], where, "its prompt") if "prompt" in value else None,
        )
        if image not in places or not isinstance(value.get("caption"), str):
            places[image] = len(entries)
            entries.append(entry)
            continue
        earlier = entries[places[image]]
        if (earlier.id, earlier.prompt) != (entry.id, entry.prompt):
            raise UserError(f"{where}: its image_id or prompt is not that of entry {earlier.number}, which is the same picture.")
        earlier.captions.extend(entry.captions)
    return entries


def _coco(pictures: list[Any], annotations: Any, path: Path, images: Path) -> list[Entry]:
    """COCO's form. A picture without a file name is looked for under the names that COCO's pictures have."""
    ids: list[Id] = []
    names: list[str | None] = []
    for number, value in enumerate(pictures):
        where = f"{path}, image {number}"
        ids.append(image_id(part(value, "id", where), where, "id"))
        names.append(picture_path(value["file_name"], where) if "file_name" in value else None)
        if names[-1] is None and isinstance(ids[-1], str):
            raise UserError(f"{where}: its id is a text, and it has no 'file_name'; only a number tells COCO's file name.")
    unnamed = [each for each, name in zip(ids, names, strict=True) if name is None and isinstance(each, int)]
    sought = iter(coco_names(unnamed, images))
    captions: dict[Id, list[str]] = {each: [] for each in ids}
    if not isinstance(annotations, list):
        raise UserError(f"{path}: its 'annotations' is {in_words(annotations)}; expected a list of captions.")
    for number, value in enumerate(annotations):
        where = f"{path}, annotation {number}"
        each = image_id(part(value, "image_id", where), where)
        if each not in captions:
            raise UserError(f"{where}: its image_id, {json.dumps(each)[:60]}, is none of the {len(ids):,} pictures in 'images'.")
        captions[each].append(checked_text(part(value, "caption", where), where, "its caption"))
    return [Entry(number, name or next(sought), ids[number], captions[ids[number]]) for number, name in enumerate(names)]


def _karpathy(path: Path, split: str) -> list[Entry]:
    found = read_annotations(path, split)
    captions: list[list[str]] = [[] for _ in found.images]
    for caption, image in zip(found.captions, found.image_of_text, strict=True):
        captions[image].append(caption)
    rows = zip(found.entries, found.images, captions, strict=True)
    return [Entry(number, image, id_of(image), texts) for number, image, texts in rows]


def _captions(value: Any, where: str) -> list[str]:
    if isinstance(value, list):
        return [checked_text(text, where, "a caption") for text in checked_list(value, f"{where}: its caption is", "texts")]
    return [checked_text(value, where, "its caption")]


def _all_or_none(entries: Sequence[Entry], has: Sequence[bool], what: str, where: Path) -> None:
    """Raise UserError when some pictures have it and others have not: figures would tell of a part, and not say so."""
    if any(has) and not all(has):
        having, lacking = entries[has.index(True)], entries[has.index(False)]
        raise UserError(
            f"{where}: the picture {lacking.image} (entry {lacking.number}) has no {what}, but {having.image} has. "
            f"Give every picture a {what}, or none."
        )


def _fail(error: OSError) -> None:
    raise error
