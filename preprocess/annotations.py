"""Annotations to pictures and their captions. N pictures, M captions.

Three JSON forms are read:
    [{"image": "a.jpg", "caption": ["...", ...]}]     evaluation files of salesforce/BLIP: each entry is one picture
    [{"image": "a.jpg", "caption": "..."}]            its training files: entries that name the same picture are one
    {"images": [{"filename", "split", "sentences"}]}  Karpathy's dataset_{coco,flickr30k}.json: one split of it
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.errors import UserError
from preprocess.text import pre_caption

LARGEST = 1 << 30  # bytes; Karpathy's largest file has 145 MB, and parsing takes about ten times the size in memory


@dataclass(frozen=True)
class Annotations:
    """Pictures in the order of the file, captions in the order of the file."""

    images: list[str] = field(default_factory=list)  # N paths below the picture folder, as annotated
    captions: list[str] = field(default_factory=list)  # M, as annotated
    image_of_text: list[int] = field(default_factory=list)  # M
    entries: list[int] = field(default_factory=list)  # N: number of the entry in the JSON list, from 0 (the first, if several)
    caption_entries: list[int] = field(default_factory=list)  # M

    def keep(self, pictures: list[int]) -> Annotations:
        """Only these pictures (ascending) and their captions, renumbered."""
        new = {old: number for number, old in enumerate(pictures)}
        texts = [t for t, image in enumerate(self.image_of_text) if image in new]
        return Annotations(
            [self.images[i] for i in pictures],
            [self.captions[t] for t in texts],
            [new[self.image_of_text[t]] for t in texts],
            [self.entries[i] for i in pictures],
            [self.caption_entries[t] for t in texts],
        )


def read_annotations(path: Path, split: str = "test") -> Annotations:
    """Read any of the three forms. `split` chooses from Karpathy's own file; the other forms hold one split already.

    Raises UserError that names the file, the entry (from 0) and what was found there: no JSON, another shape, a missing or
    wrong field, a caption without words, a picture path that leaves the picture folder.
    """
    values = load_json(path)
    found = Annotations()
    places: dict[str, int] = {}
    for number, image, captions in _karpathy(values, split, path) if isinstance(values, dict) else _entries(values, path):
        # A list of captions is a picture of its own, even if its name came before: the original counts it so.
        place = places.get(image) if isinstance(captions, str) else None
        if place is None:
            place = places[image] = len(found.images)
            found.images.append(image)
            found.entries.append(number)
        texts = [captions] if isinstance(captions, str) else captions
        found.captions.extend(texts)
        found.image_of_text.extend([place] * len(texts))
        found.caption_entries.extend([number] * len(texts))
    return found


def load_json(path: Path, expected: str = "a JSON list of pictures and captions") -> Any:
    """The values of an annotation file. Raises UserError, which says what was `expected`, when it is no JSON."""
    if not path.exists():
        raise UserError(f"There is no annotation file {path}.")
    if not path.is_file():
        raise UserError(f"{path} is not a file; --annotations takes a JSON file.")
    if (size := path.stat().st_size) > LARGEST:
        raise UserError(f"{path} has {size:,} bytes; annotations of more than {LARGEST:,} bytes are not read. Split the file.")
    data = path.read_bytes()
    if not data.strip():
        raise UserError(f"{path} is empty; expected {expected}.")
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); expected {expected}.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}.") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be annotations.") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path} is not JSON that can be read: {error}.") from error


def _entries(values: Any, path: Path) -> Iterator[tuple[int, str, str | list[str]]]:
    """The entries of salesforce/BLIP's list, checked."""
    if not isinstance(values, list):
        raise UserError(f"{path} holds {in_words(values)}; expected a list of entries with 'image' and 'caption'.")
    if not values:
        raise UserError(f"{path} is an empty list: there is nothing to prepare.")
    for number, entry in enumerate(values):
        where = f"{path}, entry {number}"
        image = picture_path(part(entry, "image", where), where)
        captions = part(entry, "caption", where)
        if isinstance(captions, str):
            yield number, image, _caption(captions, f"{where} ({image})")
        elif isinstance(captions, list) and captions:
            yield number, image, [_caption(text, f"{where} ({image})") for text in captions]
        else:
            what = "an empty list" if captions == [] else in_words(captions)
            raise UserError(f"{where} ({image}): its caption is {what}; expected a text or a list of texts.")


def _karpathy(values: dict[str, Any], split: str, path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """The entries of one split of Karpathy's file, checked. `restval` is part of train, as everyone uses it."""
    entries = part(values, "images", str(path))
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"{path}: its 'images' is {'an empty list' if entries == [] else in_words(entries)}; expected a list of pictures."
        )
    splits: Counter[str] = Counter()
    for number, entry in enumerate(entries):
        where = f"{path}, entry {number}"
        name = str(part(entry, "split", where))
        splits[name] += 1
        if ("train" if name == "restval" else name) != split:
            continue
        image = picture_path(part(entry, "filename", where), where)
        if entry.get("filepath"):  # COCO's file has it, Flickr30k's has not
            image = f"{picture_path(entry['filepath'], where)}/{image}"
        sentences = part(entry, "sentences", where)
        if not isinstance(sentences, list) or not sentences:
            raise UserError(f"{where} ({image}): it has no sentences; expected a list of captions.")
        where = f"{where} ({image})"
        yield number, image, [_caption(part(sentence, "raw", where), where) for sentence in sentences]
    if not splits[split] and not (split == "train" and splits["restval"]):
        has = ", ".join(f"{name} ({count:,})" for name, count in sorted(splits.items()))
        raise UserError(f"{path} has no picture in the split {split!r}; it has {has}. Choose with --split.")


def part(entry: Any, key: str, where: str) -> Any:
    """The value under `key` of a JSON object. Raises UserError, naming the place, when there is none."""
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {in_words(entry)}; expected an object with {key!r}.")
    if key not in entry:
        has = ", ".join(map(repr, list(entry)[:5])) or "nothing"
        raise UserError(f"{where} has no {key!r}; it has {has}.")
    return entry[key]


def picture_path(name: Any, where: str) -> str:
    """A path that stays below the picture folder, judged by its letters alone: a link inside the folder may lead out."""
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: its image is {in_words(name)}; expected the path of a picture below the --images folder.")
    shown = ascii(name[:100])
    if not is_text(name) or any(c < " " for c in name):
        raise UserError(f"{where}: its image {shown} has a control character; expected the path of a picture.")
    if "://" in name:
        raise UserError(
            f"{where}: its image {shown} is an address; expected a path below the --images folder. Download the picture first."
        )
    if "\\" in name:
        raise UserError(f"{where}: its image {shown} has a backslash; write folders with '/'.")
    if name.startswith("/") or ".." in name.split("/"):
        raise UserError(
            f"{where}: its image {shown} leaves the --images folder; expected a path below it, without '..' or a leading '/'."
        )
    return name


def _caption(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{where}: a caption is {in_words(text)}; expected a text.")
    if not pre_caption(text, 1).strip():
        raise UserError(f"{where}: the caption {text[:60]!a} has no words. Remove it from the annotations.")
    if not is_text(text):
        raise UserError(f"{where}: the caption {text[:60]!a} holds half a character (a lone surrogate). Correct it.")
    return text


def is_text(value: str) -> bool:
    """Whether UTF-8 can write it: no lone half of a surrogate pair."""
    return not any("\ud800" <= c <= "\udfff" for c in value)


def in_words(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if value == "" or (isinstance(value, str) and not value.strip()):
        return "an empty text"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
