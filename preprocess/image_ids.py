"""The ids of pictures, by which results are compared with references, and the file names that COCO's pictures have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from models.errors import UserError
from preprocess.checked import Id, checked_id

NUMBER = re.compile(r"(?:coco_)?([0-9]{1,18})")  # 18 digits fit into 64 bits
SPLITS = ("val2014", "test2015", "train2014", "test2014")  # in which COCO publishes its pictures
COCO = (
    *(f"COCO_{split}_{{:012d}}.jpg" for split in SPLITS),
    *(f"{split}/COCO_{split}_{{:012d}}.jpg" for split in SPLITS),
    "{:012d}.jpg",
)


def id_of(image: str) -> Id:
    """The id of a picture whose annotations give none: the number after the last "_" of its file name
    ("val2014/COCO_val2014_000000522418.jpg" is 522418), and where that is no number the path as annotated.

    Source: salesforce/LAVIS lavis/datasets/datasets/coco_caption_datasets.py, COCOCapEvalDataset; PaddleMIX has the same.
    """
    last = PurePosixPath(image).stem.rpartition("_")[2]
    number = NUMBER.fullmatch(last)
    return int(number[1]) if number else image


def image_id(value: Any, where: str, key: str = "image_id") -> Id:
    """The id that annotations give under `key`. "522418" and "coco_522418" (of coco_karpathy_train.json) are 522418.

    Raises UserError when it is neither a whole number from 0 nor a text.
    """
    found = checked_id(value, where, key)
    number = NUMBER.fullmatch(found) if isinstance(found, str) else None
    return int(number[1]) if number else found


def refuse_twins(ids: Iterable[Id], names: Iterable[str], where: Path) -> None:
    """Raise UserError when two pictures have the same id: a caption could belong to either."""
    seen: dict[Id, str] = {}
    for each, name in zip(ids, names, strict=True):
        if each in seen:
            raise UserError(
                f"{where}: the pictures {seen[each]} and {name} have the same image_id, {json.dumps(each)[:60]}. Name a picture "
                "once, and where file names tell no ids give each picture an 'image_id' in the file of --annotations."
            )
        seen[each] = name


def coco_names(ids: Sequence[int], images: Path) -> list[str]:
    """The file names below `images` of COCO's pictures with these ids: of the names that COCO gives, the one that is there. A
    picture that is not there gets the name that the one before it suggests."""
    usual = COCO[-1]
    names = []
    for each in ids:
        forms = dict.fromkeys((usual, *COCO))
        usual = next((form for form in forms if (images / form.format(each)).exists()), usual)
        names.append(usual.format(each))
    return names
