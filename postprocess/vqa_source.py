"""Answers to be reported, of a run or of any file of results, and what people answered to the same questions. Q questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import Misuse
from postprocess import facts, written
from postprocess.gallery import Pictures
from postprocess.picture_files import PictureFiles, in_folder
from postprocess.references import Asked, question_id, read_answer_results, read_answers
from preprocess import dataset
from preprocess.checked import Id
from runtime import outputs as runs


@dataclass(frozen=True)
class Answers:
    """Q answers and what is known beside them."""

    ids: list[Id]  # Q, of their questions
    texts: list[str]  # Q
    more: list[list[str]]  # Q: what else was answered, best first
    prompts: list[str] | None  # Q: the questions as the model read them; None where nothing is known of them
    asked: Mapping[Id, Asked] | None  # what people answered, one answer or more to each question
    questions: list[str]  # Q, as annotated
    places: list[int]  # Q: the numbers of their pictures
    picture: Pictures | PictureFiles
    facts: dict[str, Any]


def of_run(
    outputs: Path, data: Path | None, references: Path | None = None, questions: Path | None = None, verify: bool = False
) -> Answers:
    """The answers of an outputs/ folder. They are compared with `references`, or else with what the data/ folder holds.

    Raises UserError when a folder or file is damaged, or when they do not belong together.
    """
    run = runs.read_vqa(outputs, verify)
    origin = written.of_run(run.source, data, lambda folder: dataset.read_vqa(folder, verify))
    ids = [question_id(each["question_id"], f"{outputs}, answer {n}") for n, each in enumerate(run.answers)]
    prompts = [row["prompt"] for row in run.generated]
    asked: Mapping[Id, Asked] | None = None
    if origin.data is None:  # a question for each picture, of which the prompt alone is kept
        texts, places, wanted = prompts, list(range(len(origin.images))), list[Id](range(len(origin.images)))
    else:
        with facts.complete(run.source, origin.data.source):
            rows = origin.data.questions
            texts, places = [row["question"] for row in rows], [row["image"] for row in rows]
            wanted = [question_id(row["question_id"], f"{origin.data.source.folder}, question {n}") for n, row in enumerate(rows)]
            people = [Asked(tuple(row["answers"]), row["answer_type"], row["question_type"], row["question"]) for row in rows]
        if any(own.answers for own in people):
            asked = dict(zip(wanted, people, strict=True))
    written.refuse_others(run.source, ids, wanted, "questions")
    if references:
        asked = read_answers(references, questions)
    files = {"References": references, "Questions": questions}
    return Answers(
        ids=ids,
        texts=[str(each["answer"]) for each in run.answers],
        more=[row["texts"][1:] for row in run.generated],
        prompts=prompts,
        asked=asked,
        questions=texts,
        places=places,
        picture=origin.picture,
        facts={**origin.facts, "files": written.listed({what: path for what, path in files.items() if path})},
    )


def of_file(results: Path, references: Path | None, questions: Path | None = None, images: Path | None = None) -> Answers:
    """The answers of a file of results, shown with the pictures of the folder `images`.

    Raises Misuse when there are no `references`, UserError when a file cannot be read or has not the form that it should.
    """
    if references is None:
        raise Misuse(f"{results} is compared with what people answered: name a file of it with --references.")
    found, asked = read_answer_results(results), read_answers(references, questions)
    people = [asked.get(each) for each in found]
    files = {"Results": results, "References": references, "Questions": questions}
    return Answers(
        ids=list(found),
        texts=list(found.values()),
        more=[[] for _ in found],
        prompts=None,
        asked=asked,
        questions=[(own.question if own else None) or f"question {each}" for each, own in zip(found, people, strict=True)],
        places=list(range(len(found))),
        picture=in_folder(images, [own.image if own else None for own in people]),
        facts=written.of_files({what: path for what, path in files.items() if path}),
    )
