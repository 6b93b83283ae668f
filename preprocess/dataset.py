"""The data sets that blip-pre writes, one for each task: the manifest of a data/ folder, checked, and its tensors.

Used by runtime (which reads data/) and by postprocess (which reads outputs/ as well).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from models import manifest
from models.errors import UserError
from preprocess.tensors import Tensor, open_tensor

T = TypeVar("T")


@dataclass(frozen=True)
class RetrievalData:
    """Pictures and captions ready for the graphs. N pictures, M captions."""

    source: manifest.Manifest
    protocol: dict[str, Any]  # models.config.Protocol's fields, image_size, vocab, encode_id, tokenizer, pillow
    images: list[dict[str, Any]]  # N of {"image": path as annotated, "width", "height": pixels before resizing}
    captions: list[str]  # M, as annotated
    image_of_text: np.ndarray  # (M,) int64: the picture each caption was written for
    broken: list[dict[str, Any]]  # left out by --skip-broken: {"image", "entry", "reason"}
    img: Tensor  # (N, 3, S, S) float32
    ids: Tensor  # (M, L) int64, [CLS] first
    mask: Tensor  # (M, L) int64, 1 where ids is not padding

    @property
    def encode_id(self) -> int:
        """The id of [ENC], which the ITM graphs want in place of the first id."""
        return int(self.protocol["encode_id"])


def read_retrieval(folder: Path, verify: bool = False) -> RetrievalData:
    """Open a data/ folder that `blip-pre retrieval` wrote. Raises UserError when it is damaged or of another task."""
    return _read(folder, "retrieval", verify, _retrieval)


def _retrieval(found: manifest.Manifest) -> RetrievalData:
    content = found.content
    int(content["protocol"]["encode_id"])
    data = RetrievalData(
        found,
        content["protocol"],
        content["images"],
        content["captions"],
        np.asarray(content["image_of_text"], np.int64),
        content["broken"],
        open_tensor(found, "img"),
        open_tensor(found, "ids"),
        open_tensor(found, "mask"),
    )
    counts = {
        "captions": len(data.captions),
        "image_of_text": len(data.image_of_text),
        "ids": len(data.ids),
        "mask": len(data.mask),
    }
    if len(set(counts.values())) > 1 or len(data.images) != len(data.img):
        raise _contradiction(found, f"{counts}, {len(data.images)} images for {len(data.img)} in img")
    if data.image_of_text.ndim != 1:
        raise _contradiction(found, f"image_of_text is {data.image_of_text.shape}, expected one number for a caption")
    if len(data.captions) and not 0 <= data.image_of_text.min() <= data.image_of_text.max() < len(data.images):
        raise _contradiction(found, f"a caption belongs to a picture beyond the {len(data.images)} images")
    return data


@dataclass(frozen=True)
class ClassifyData:
    """Pictures with class labels, ready for the graphs. N pictures, C classes."""

    source: manifest.Manifest
    protocol: dict[str, Any]  # as RetrievalData's
    images: list[dict[str, Any]]  # N of {"image": path, or name in CIFAR, "width", "height": pixels before resizing}
    classes: list[str]  # C names
    broken: list[dict[str, Any]]  # left out by --skip-broken: {"image", "entry", "reason"}
    img: Tensor  # (N, 3, S, S) float32
    label: Tensor  # (N,) int64: the number of each picture's class


def read_classify(folder: Path, verify: bool = False) -> ClassifyData:
    """Open a data/ folder that `blip-pre classify` wrote. Raises UserError when it is damaged or of another task."""
    return _read(folder, "classify", verify, _classify)


def _classify(found: manifest.Manifest) -> ClassifyData:
    content = found.content
    data = ClassifyData(
        found,
        dict(content["protocol"]),
        content["images"],
        content["classes"],
        content["broken"],
        open_tensor(found, "img"),
        open_tensor(found, "label"),
    )
    counts = {"images": len(data.images), "img": len(data.img), "label": len(data.label)}
    if len(set(counts.values())) > 1:
        raise _contradiction(found, str(counts))
    if not isinstance(data.classes, list):
        raise TypeError("its classes, expected a list")
    names = {name.strip() for name in data.classes if isinstance(name, str) and name.strip()}
    if len(names) < len(data.classes):
        raise _contradiction(found, "its classes are not names, each another one")
    label = np.asarray(data.label)  # (N,)
    if label.shape != (len(data.images),) or label.dtype != np.int64:
        raise _contradiction(found, f"label is {label.dtype} {label.shape}, expected int64 ({len(data.images)},)")
    if len(label) and not 0 <= label.min() <= label.max() < len(data.classes):
        raise _contradiction(found, f"a label is beyond the {len(data.classes)} classes")
    return data


@dataclass(frozen=True)
class CaptionData:
    """Pictures to be captioned, ready for the graphs. N pictures."""

    source: manifest.Manifest
    protocol: dict[str, Any]  # models.config.Protocol's fields, image_size, tokenizer_sha256, pillow
    images: list[dict[str, Any]]  # N of {"image", "width", "height", "image_id": number or text}, no two ids equal
    references: list[list[str]]  # N lists of captions as annotated; all are empty when there are none
    prompts: list[str] | None  # N, as given; None when no picture has one of its own
    broken: list[dict[str, Any]]  # left out by --skip-broken: {"image", "entry", "reason"}
    img: Tensor  # (N, 3, S, S) float32


def read_caption(folder: Path, verify: bool = False) -> CaptionData:
    """Open a data/ folder that `blip-pre caption` wrote. Raises UserError when it is damaged or of another task."""
    return _read(folder, "caption", verify, _caption)


def _caption(found: manifest.Manifest) -> CaptionData:
    content = found.content
    prompts = content.get("prompts")
    data = CaptionData(
        found,
        dict(content["protocol"]),
        content["images"],
        content["references"],
        prompts,
        content["broken"],
        open_tensor(found, "img"),
    )
    counts = {"images": len(data.images), "img": len(data.img), "references": len(data.references)}
    if prompts is not None:
        counts["prompts"] = len(_texts(prompts, "prompts"))
    if len(set(counts.values())) > 1:
        raise _contradiction(found, str(counts))
    for number, captions in enumerate(data.references):
        _texts(captions, f"references of picture {number}")
    if len({_id(image["image_id"], "image_id") for image in data.images}) < len(data.images):
        raise _contradiction(found, "two pictures have the same image_id")
    return data


@dataclass(frozen=True)
class VqaData:
    """Pictures and questions about them, ready for the graphs. N pictures, Q questions."""

    source: manifest.Manifest
    protocol: dict[str, Any]  # as CaptionData's
    images: list[dict[str, Any]]  # N of {"image", "width", "height", "image_id": number or text}
    # Q of {"question_id": number or text, no two equal, "image": row of img, "question": as annotated,
    # "answers": what people answered, empty when nobody was asked, "answer_type", "question_type": text or None}
    questions: list[dict[str, Any]]
    answer_list: list[str] | None  # the answers to choose from, as given
    broken: list[dict[str, Any]]  # left out by --skip-broken: {"image", "entry", "reason"}
    img: Tensor  # (N, 3, S, S) float32


def read_vqa(folder: Path, verify: bool = False) -> VqaData:
    """Open a data/ folder that `blip-pre vqa` wrote. Raises UserError when it is damaged or of another task."""
    return _read(folder, "vqa", verify, _vqa)


def _vqa(found: manifest.Manifest) -> VqaData:
    content = found.content
    answer_list = content.get("answer_list")
    data = VqaData(
        found,
        dict(content["protocol"]),
        content["images"],
        content["questions"],
        answer_list,
        content["broken"],
        open_tensor(found, "img"),
    )
    if len(data.images) != len(data.img):
        raise _contradiction(found, f"{len(data.images)} images for {len(data.img)} in img")
    if answer_list is not None and not _texts(answer_list, "answer_list"):
        raise _contradiction(found, "its answer_list is empty")
    for number, question in enumerate(data.questions):
        where = f"question {number}"
        _texts([question["question"]], where)
        _texts(question["answers"], f"answers of {where}")
        _texts([each for each in (question["answer_type"], question["question_type"]) if each is not None], f"types of {where}")
        if not 0 <= _whole(question["image"], f"image of {where}") < len(data.images):
            raise _contradiction(found, f"{where} is about a picture beyond the {len(data.images)} images")
    if len({_id(question["question_id"], "question_id") for question in data.questions}) < len(data.questions):
        raise _contradiction(found, "two questions have the same question_id")
    return data


def _texts(values: Any, what: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"its {what}, expected texts")
    return values


def _id(value: Any, what: str) -> int | str:
    return value if isinstance(value, str) else _whole(value, what)


def _whole(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"its {what}, expected a whole number")
    return value


def _read(folder: Path, task: str, verify: bool, read: Callable[[manifest.Manifest], T]) -> T:
    """What `read` makes of a data/ folder of this task; what it stumbles over becomes a UserError."""
    found = manifest.read(folder, "data", verify)
    if found.content.get("task") != task:
        raise UserError(f"{folder} was made for the task {found.content.get('task')!r}, expected {task!r}. Use blip-pre {task}.")
    try:
        return read(found)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / manifest.NAME} lacks or garbles {error}. Write it again with blip-pre {task}.") from error


def _contradiction(found: manifest.Manifest, what: str) -> UserError:
    return UserError(f"{found.folder / manifest.NAME} contradicts itself: {what}.")
