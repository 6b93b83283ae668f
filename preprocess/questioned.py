"""Questions about pictures, and what people answered. N pictures, Q questions.

These forms are read; answers may be absent:
    [{"image": "a.jpg", "question", "question_id", "answer": [...]}]    evaluation lists of salesforce/BLIP and LAVIS
    {"questions": [{"question_id", "image_id", "question"}]}            VQA v2's questions, pictures of COCO by their number
    {"annotations": [{"question_id", "answers": [{"answer"}, ...]}]}    VQA v2's annotations, beside either of them
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import manifest
from models.errors import UserError
from preprocess.annotations import in_words, is_text, load_json, part, picture_path
from preprocess.checked import Id, checked_id, checked_list, checked_text
from preprocess.image_ids import coco_names, id_of, image_id
from preprocess.pictures import Pictures, check_folder

TYPES = ("answer_type", "question_type")


@dataclass(frozen=True)
class Question:
    """A question and what people answered."""

    question_id: Id
    image: int  # number of its picture, below N
    question: str  # as annotated
    answers: list[str]  # of VQA v2 ten; none when nobody was asked
    answer_type: str | None = None
    question_type: str | None = None


@dataclass(frozen=True)
class Questioned:
    """Pictures, each once, in the order in which the questions name them, and the questions in the order of their file."""

    pictures: Pictures  # N
    ids: list[Id]  # N
    questions: list[Question]  # Q
    answer_list: list[str] | None  # the answers to choose from
    source: dict[str, Any]  # where they come from, for the manifest

    def first(self, limit: int | None) -> Questioned:
        """The first `limit` pictures and their questions, all when None."""
        pictures = self.pictures.first(limit)
        questions = of_pictures(self.questions, list(range(len(pictures.names))))
        return dataclasses.replace(self, pictures=pictures, ids=self.ids[:limit], questions=questions)


@dataclass(frozen=True)
class Answers:
    """What an annotation adds to a question."""

    where: str
    image: Id | None
    answers: list[str]
    types: tuple[str | None, str | None]  # TYPES


def of_pictures(questions: list[Question], kept: list[int]) -> list[Question]:
    """The questions about the pictures `kept`, which are counted anew in this order."""
    new = {old: number for number, old in enumerate(kept)}
    return [dataclasses.replace(each, image=new[each.image]) for each in questions if each.image in new]


def read_questioned(
    images: Path, questions: Path, annotations: Path | None = None, answer_list: Path | None = None
) -> Questioned:
    """The questions of a file about pictures below `images`; with `annotations` the answers are theirs.

    Raises UserError that names the file, the entry (from 0) and what was found there.
    """
    entries = _entries(questions)
    named = _pictures(entries, questions, images)
    numbers, ids, first = _distinct(named, questions)
    annotated = _annotations(annotations) if annotations else None
    choices = read_answer_list(answer_list) if answer_list else None
    found: list[Question] = []
    seen: dict[Id, int] = {}
    for number, (entry, (name, image)) in enumerate(zip(entries, named, strict=True)):
        where = f"{questions}, entry {number} ({name})"
        each = checked_id(part(entry, "question_id", where), where, "question_id")
        if seen.setdefault(each, number) != number:
            raise UserError(f"{where}: its question_id, {_shown(each)}, is that of entry {seen[each]}; expected one of its own.")
        text = checked_text(part(entry, "question", where), where, "its question")
        answers = _own(entry, where) if annotated is None else _annotated(annotated, each, image, where)
        found.append(Question(each, numbers[name], text, answers.answers, *answers.types))
    _all_or_none(found, questions)
    check_folder(images, list(numbers), questions)
    pictures = Pictures(list(numbers), first, [images / name for name in numbers], "them and their questions")
    source = {"kind": "questions", "folder": str(images.absolute())}
    for kind, file in (("questions", questions), ("annotations", annotations), ("answer_list", answer_list)):
        if file:
            source |= {kind: str(file), f"{kind}_sha256": manifest.file_record(file)["sha256"]}
    return Questioned(pictures, ids, found, choices, source)


def read_answer_list(path: Path) -> list[str]:
    """The answers to choose from, a JSON list of texts. Raises UserError that says what was found instead."""
    values = checked_list(_load(path, "--answer-list", "a JSON list of answers"), f"{path} holds", "answers")
    return [checked_text(value, str(path), f"answer {number}") for number, value in enumerate(values)]


def _entries(path: Path) -> list[Any]:
    values = _load(path, "--questions", "a JSON list of questions")
    if isinstance(values, dict):
        return checked_list(part(values, "questions", str(path)), f"{path}: its 'questions' is", "questions")
    return checked_list(values, f"{path} holds", "entries with 'image' and 'question'")


def _pictures(entries: list[Any], path: Path, images: Path) -> list[tuple[str, Id | None]]:
    """The path of each question's picture, and its id where one is given. Where no path is given the id is COCO's."""
    names: list[str | None] = []
    ids: list[Id | None] = []
    for number, entry in enumerate(entries):
        where = f"{path}, entry {number}"
        key = "image" if isinstance(entry, dict) and "image" in entry else "image_id"
        value = part(entry, key, where)
        names.append(picture_path(value, where) if key == "image" else None)
        ids.append(image_id(entry["image_id"], where) if "image_id" in entry else None)
        if names[-1] is None and not isinstance(ids[-1], int):
            raise UserError(f"{where}: its image_id is a text, and it has no 'image'; only a number tells COCO's file name.")
    wanted = list(dict.fromkeys(each for each, name in zip(ids, names, strict=True) if name is None and isinstance(each, int)))
    coco: dict[Id | None, str] = dict(zip(wanted, coco_names(wanted, images), strict=True))
    return [(name or coco[each], each) for each, name in zip(ids, names, strict=True)]


def _distinct(named: list[tuple[str, Id | None]], path: Path) -> tuple[dict[str, int], list[Id], list[int]]:
    """The pictures, each once: their numbers by name, their ids, and the entries that name them first."""
    numbers: dict[str, int] = {}
    ids: list[Id] = []
    first: list[int] = []
    for number, (name, given) in enumerate(named):
        if name not in numbers:
            numbers[name] = len(numbers)
            ids.append(id_of(name) if given is None else given)
            first.append(number)
        elif given not in (None, usual := ids[numbers[name]]):
            earlier = f"entry {first[numbers[name]]}, which asks about the same picture, has {_shown(usual)}"
            raise UserError(f"{path}, entry {number} ({name}): its image_id is {_shown(given)}, but {earlier}.")
    return numbers, ids, first


def _annotations(path: Path) -> dict[Id, Answers]:
    """The annotations of VQA v2 by the id of their question."""
    values = _load(path, "--annotations", "JSON with 'annotations'")
    entries = checked_list(part(values, "annotations", str(path)), f"{path}: its 'annotations' is", "annotations")
    found: dict[Id, Answers] = {}
    for number, entry in enumerate(entries):
        where = f"{path}, annotation {number}"
        each = checked_id(part(entry, "question_id", where), where, "question_id")
        where = f"{where} (question {_shown(each)})"
        if each in found:
            raise UserError(f"{where}: the question is annotated twice. Remove one of the two.")
        image = image_id(entry["image_id"], where) if "image_id" in entry else None
        found[each] = Answers(where, image, _answers(part(entry, "answers", where), where), _types(entry, where))
    return found


def _annotated(annotated: dict[Id, Answers], question: Id, image: Id | None, where: str) -> Answers:
    if question not in annotated:
        raise UserError(f"{where}: --annotations has none of the question {_shown(question)}. Are both files of the same split?")
    found = annotated[question]
    if None not in (image, found.image) and image != found.image:
        raise UserError(f"{found.where}: its image_id is {_shown(found.image)}, but {where} asks about {_shown(image)}.")
    return found


def _own(entry: dict[str, Any], where: str) -> Answers:
    """The answers that stand beside a question."""
    key = next((key for key in ("answers", "answer") if key in entry), None)
    return Answers(where, None, _answers(entry[key], where) if key else [], _types(entry, where))


def _answers(value: Any, where: str) -> list[str]:
    """One text, or a list of texts or of VQA v2's objects with one each. One of several may be blank: somebody said nothing."""
    if isinstance(value, str):
        return [checked_text(value, where, "its answer")]
    values = checked_list(value, f"{where}: its answers are", "texts")
    texts = [part(each, "answer", f"{where}, an answer") if isinstance(each, dict) else each for each in values]
    for text in texts:
        if not isinstance(text, str) or not is_text(text):
            found = "half a character (a lone surrogate)" if isinstance(text, str) else in_words(text)
            raise UserError(f"{where}: an answer is {found}; expected a text.")
    return texts


def _types(entry: dict[str, Any], where: str) -> tuple[str | None, str | None]:
    answer, question = (None if entry.get(key) is None else checked_text(entry[key], where, f"its {key}") for key in TYPES)
    return answer, question


def _all_or_none(questions: list[Question], path: Path) -> None:
    """Raise UserError when some questions have answers and others have not: the accuracy would tell of a part."""
    has = [bool(each.answers) for each in questions]
    if any(has) and not all(has):
        raise UserError(
            f"{path}, entry {has.index(False)}: it has no answers, but entry {has.index(True)} has. Give every question answers, "
            "or none."
        )


def _load(path: Path, option: str, expected: str) -> Any:
    if not path.is_file():
        raise UserError(f"There is no file {path}; {option} takes {expected}.")
    return load_json(path, expected)


def _shown(value: Id | None) -> str:
    return json.dumps(value)[:60]
