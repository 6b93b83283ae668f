"""Pictures and questions to a data/ folder for visual question answering: the tensor img, each picture once, and beside it the
questions, what people answered, and the answers to choose from.

N pictures, Q questions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import manifest
from preprocess.pictures import Options, find_broken, open_config, picture_protocol, with_interpolation, write_pictures
from preprocess.questioned import Questioned, of_pictures


@dataclass(frozen=True)
class WrittenQuestions:
    """What a run has written."""

    pictures: int  # N
    questions: int  # Q
    answers: int  # of people, to all questions
    choices: int  # answers to choose from
    broken: list[dict[str, Any]]  # pictures left out: {"image", "entry", "reason"}


def write_vqa(found: Questioned, graphs: Path, out: Path, options: Options) -> WrittenQuestions:
    """Write the data/ folder `out` from pictures and questions (preprocess.questioned) and the graphs/ folder that will read
    it. Texts are kept as annotated: blip-run makes tokens of them. `options.limit` counts pictures.

    Raises UserError, and leaves an older `out` as it was, when the graphs cannot be read, when a picture is broken and
    `options.skip_broken` is not set, or when nothing remains.
    """
    config, tokenizer = open_config(graphs)
    config = with_interpolation(config, options.interpolation)
    found = found.first(options.limit)
    broken = find_broken(found.pictures, options)  # before anything is decoded
    with manifest.new_folder(out, "data", task="vqa") as folder:
        written = write_pictures(folder, found.pictures, broken, config, options)
        questions = of_pictures(found.questions, written.kept)
        content = {
            "task": "vqa",
            "layout": options.layout,
            "tensors": {"img": written.img},
            "protocol": picture_protocol(config, tokenizer),
            "images": [{**image, "image_id": found.ids[i]} for i, image in zip(written.kept, written.images, strict=True)],
            "questions": [dataclasses.asdict(question) for question in questions],
            **({"answer_list": found.answer_list} if found.answer_list else {}),
            "broken": written.broken,
            "source": found.source,
        }
        manifest.write(folder, "data", content)
    answers = sum(len(question.answers) for question in questions)
    return WrittenQuestions(len(written.kept), len(questions), answers, len(found.answer_list or []), written.broken)
