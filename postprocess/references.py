"""What people wrote and answered, and the result files that are judged by it. The order is that of the file.

Captions:
    {"images": [{"id"}], "annotations": [{"image_id", "caption"}]}    COCO's captions_*.json and *_gt.json
    [{"image": "a.jpg", "caption": [...], "image_id": 7}]             evaluation lists of salesforce/BLIP and LAVIS
    {"images": [{"filename", "split", "sentences"}]}                  Karpathy's dataset_*.json: one split of it
    [{"image_id", "caption"}]                                         results
Answers:
    {"annotations": [{"question_id", "answers": [{"answer"}, ...]}]}  VQA v2's annotations; its questions may stand beside
    [{"question_id", "question", "answer": [...]}]                    lists of salesforce/BLIP and LAVIS: vqa_val_eval.json
    [{"question_id", "answer"}]                                       results

Ids are compared as preprocess.image_ids reads them: 522418, "522418", "000000522418" and "coco_522418" are one picture, and an
entry without an id has the number at the end of its file name. The id of a question is a number as well where it is digits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from models.errors import Misuse, UserError
from preprocess.annotations import in_words, is_text, load_json, part, read_annotations
from preprocess.checked import Id, checked_id, checked_list, checked_text
from preprocess.image_ids import id_of, image_id

SHOWN = 5  # ids that a message names
T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """A question and what people answered to it."""

    answers: tuple[str, ...]  # at least one; of VQA v2 ten
    answer_type: str | None = None
    question_type: str | None = None
    question: str | None = None
    image: Id | None = None  # the id of its picture


def read_captions(path: Path, split: str = "test") -> dict[Id, list[str]]:
    """The captions that people wrote for each picture. `split` chooses from Karpathy's own file, the others hold one.

    Raises UserError that names the file, the entry (from 0) and what was found there; a picture without captions is one.
    """
    values = _load(path, "a JSON file of captions that people wrote")
    if isinstance(values, dict) and "annotations" in values:
        return _coco(values, path)
    if isinstance(values, dict) and "images" in values:
        del values  # read again: such files are the largest
        return _karpathy(path, split)
    return _listed(checked_list(values, f"{path} holds", "entries with 'image' and 'caption', or an object of COCO's"), path)


def read_caption_results(path: Path) -> dict[Id, str]:
    """One caption for each picture, [{"image_id", "caption"}]; it may be empty. Raises UserError as `read_captions`."""
    found: dict[Id, str] = {}
    for number, entry in enumerate(checked_list(_load(path, "a JSON list of results"), f"{path} holds", "results")):
        where = f"{path}, entry {number}"
        each = image_id(part(entry, "image_id", where), where)
        _once(found, each, f"{where}: the image_id")
        found[each] = _result(part(entry, "caption", where), where, "caption")
    return found


def read_answers(annotations: Path, questions: Path | None = None) -> dict[Id, Asked]:
    """What people answered to each question. `questions` is VQA v2's file of questions, for their texts: an annotation of it
    that is not asked there is an error.

    Raises UserError that names the file and the question; one without answers is one.
    """
    values = _load(annotations, "a JSON file of annotated questions")
    if isinstance(values, dict) and "questions" in values and "annotations" not in values:
        raise Misuse(f"{annotations} holds questions and no answers. VQA v2's answers are in v2_mscoco_*_annotations.json.")
    entries = part(values, "annotations", str(annotations)) if isinstance(values, dict) else values
    texts = _questions(questions) if questions else {}
    found: dict[Id, Asked] = {}
    for number, entry in enumerate(checked_list(entries, f"{annotations} holds", "questions with answers")):
        where = f"{annotations}, entry {number}"
        each = question_id(part(entry, "question_id", where), where)
        where = f"{where} (question {_shown(each)})"
        _once(found, each, f"{where}: the question_id")
        if questions and each not in texts:
            raise UserError(f"{where}: {questions} has no such question. Are both files of the same split?")
        found[each] = Asked(
            answers=_answers(entry, where),
            answer_type=_maybe(entry, "answer_type", where),
            question_type=_maybe(entry, "question_type", where),
            question=texts.get(each) or _maybe(entry, "question", where),
            image=_image(entry, where),
        )
    return found


def read_answer_results(path: Path) -> dict[Id, str]:
    """One answer to each question, [{"question_id", "answer"}]; it may be empty. Raises UserError as `read_answers`."""
    found: dict[Id, str] = {}
    for number, entry in enumerate(checked_list(_load(path, "a JSON list of results"), f"{path} holds", "results")):
        where = f"{path}, entry {number}"
        each = question_id(part(entry, "question_id", where), where)
        _once(found, each, f"{where}: the question_id")
        found[each] = _result(part(entry, "answer", where), where, "answer")
    return found


def question_id(value: Any, where: str) -> Id:
    """The id of a question; "262148000" is 262148000. Raises UserError when it is neither a whole number nor a text."""
    found = checked_id(value, where, "question_id")
    return int(found) if isinstance(found, str) and found.isascii() and found.isdigit() and len(found) <= 18 else found


def paired(references: Mapping[Id, T], results: Mapping[Id, str], of: str, only_results: bool = False) -> list[tuple[Id, str, T]]:
    """Each result with its references, in the order of the results. `of` says what they are of: "pictures", "questions".

    Every reference needs its result, unless `only_results`: then those without one are left out. Raises UserError, which counts
    them and names the first, for results of unknown ids, for missing ones, and when there is no result.
    """
    if not results:
        raise UserError(f"There are no results to compare; expected one for each of {len(references):,} {of}.")
    if unknown := [each for each in results if each not in references]:
        raise UserError(
            f"{len(unknown):,} of {len(results):,} results are of {of} that the references do not have: {_first(unknown)}. "
            "Are results and references of the same split?"
        )
    if not only_results and (missing := [each for each in references if each not in results]):
        raise UserError(
            f"{len(missing):,} of {len(references):,} {of} have no result: {_first(missing)}. Give a result for each, or "
            f"compare only the {of} that have one (--subset)."
        )
    return [(each, text, references[each]) for each, text in results.items()]


def _coco(values: dict[str, Any], path: Path) -> dict[Id, list[str]]:
    """COCO's form. Pictures in the order of `images`, as pycocotools has them; without `images` as they are first named."""
    captions: dict[Id, list[str]] = {}
    for number, value in enumerate(_list(values.get("images", []), f"{path}: its 'images'")):
        captions[image_id(part(value, "id", f"{path}, image {number}"), f"{path}, image {number}", "id")] = []
    listed = bool(captions)
    for number, value in enumerate(checked_list(values["annotations"], f"{path}: its 'annotations' is", "captions")):
        where = f"{path}, annotation {number}"
        if isinstance(value, dict) and "caption" not in value and "answers" in value:
            raise Misuse(f"{path} holds answers to questions, not captions.")
        each = image_id(part(value, "image_id", where), where)
        if listed and each not in captions:
            raise UserError(f"{where}: its image_id, {_shown(each)}, is none of the {len(captions):,} pictures in 'images'.")
        captions.setdefault(each, []).append(checked_text(part(value, "caption", where), where, "its caption"))
    return _all_have(captions, path)


def _karpathy(path: Path, split: str) -> dict[Id, list[str]]:
    found = read_annotations(path, split)
    captions: dict[Id, list[str]] = {id_of(image): [] for image in found.images}
    if len(captions) < len(found.images):
        raise UserError(
            f"{path}: two of its {len(found.images):,} pictures have the same id, the number at the end of their names."
        )
    for caption, image in zip(found.captions, found.image_of_text, strict=True):
        captions[id_of(found.images[image])].append(caption)
    return captions


def _listed(entries: list[Any], path: Path) -> dict[Id, list[str]]:
    """BLIP's list. Entries with a single caption that name the same picture are one, as in its training files."""
    captions: dict[Id, list[str]] = {}
    names: dict[Id, tuple[int, Any]] = {}
    for number, entry in enumerate(entries):
        where = f"{path}, entry {number}"
        name = entry.get("image") if isinstance(entry, dict) else None
        key = next((key for key in ("image_id", "img_id") if isinstance(entry, dict) and key in entry), None)
        each = image_id(entry[key], where, key) if key else id_of(checked_text(part(entry, "image", where), where, "its image"))
        texts = part(entry, "caption", where)
        if each in captions and (name != names[each][1] or not isinstance(texts, str)):
            raise UserError(f"{where}: its picture, {_shown(each)}, is that of entry {names[each][0]}. Name a picture once.")
        names.setdefault(each, (number, name))
        of_one = [texts] if isinstance(texts, str) else checked_list(texts, f"{where}: its caption is", "texts")
        captions.setdefault(each, []).extend(checked_text(text, where, "its caption") for text in of_one)
    return captions


def _questions(path: Path) -> dict[Id, str]:
    values = _load(path, "VQA v2's JSON file of questions")
    entries = part(values, "questions", str(path)) if isinstance(values, dict) else values
    found: dict[Id, str] = {}
    for number, entry in enumerate(checked_list(entries, f"{path} holds", "questions")):
        where = f"{path}, question {number}"
        text = checked_text(part(entry, "question", where), where, "its question")
        found[question_id(part(entry, "question_id", where), where)] = text
    return found


def _answers(entry: dict[str, Any], where: str) -> tuple[str, ...]:
    """Texts, or VQA v2's objects with one each. One of several may be blank: somebody said nothing."""
    key = next((key for key in ("answers", "answer") if key in entry), None)
    if key is None:
        raise UserError(f"{where} has no answers; expected 'answers' or 'answer', a list of texts.")
    values = [entry[key]] if isinstance(entry[key], str) else checked_list(entry[key], f"{where}: its {key!r} is", "texts")
    texts = (part(value, "answer", f"{where}, an answer") if isinstance(value, dict) else value for value in values)
    return tuple(_result(text, where, "answer") for text in texts)


def _image(entry: dict[str, Any], where: str) -> Id | None:
    if "image_id" in entry:
        return image_id(entry["image_id"], where)
    return id_of(checked_text(entry["image"], where, "its image")) if "image" in entry else None


def _maybe(entry: dict[str, Any], key: str, where: str) -> str | None:
    return None if entry.get(key) is None else checked_text(entry[key], where, f"its {key}")


def _result(value: Any, where: str, what: str) -> str:
    if isinstance(value, str) and is_text(value):
        return value
    found = "half a character (a lone surrogate)" if isinstance(value, str) else in_words(value)
    raise UserError(f"{where}: its {what} is {found}; expected a text.")


def _all_have(captions: dict[Id, list[str]], path: Path) -> dict[Id, list[str]]:
    if bare := [each for each, texts in captions.items() if not texts]:
        raise UserError(
            f"{path}: {len(bare):,} of {len(captions):,} pictures have no caption: {_first(bare)}; expected one or more."
        )
    return captions


def _once(found: Mapping[Id, Any], each: Id, where: str) -> None:
    if each in found:
        raise UserError(f"{where} {_shown(each)} comes a second time. Give one of each.")


def _load(path: Path, expected: str) -> Any:
    if not path.is_file():
        raise UserError(f"There is no file {path}; expected {expected}.")
    return load_json(path, expected)


def _list(values: Any, what: str) -> list[Any]:
    if isinstance(values, list):
        return values
    raise UserError(f"{what} is {in_words(values)}; expected a list.")


def _first(ids: list[Id]) -> str:
    more = f" and {len(ids) - SHOWN:,} more" if len(ids) > SHOWN else ""
    return ", ".join(map(_shown, ids[:SHOWN])) + more


def _shown(each: Id) -> str:
    return json.dumps(each)[:60]
