"""A run that answers questions about pictures: with words of the model's own, or with one of a list of answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import manifest
from models.config import BlipVqaConfig
from models.errors import Misuse
from preprocess.annotations import is_text
from preprocess.dataset import VqaData, read_vqa
from preprocess.lines import read_lines
from preprocess.questioned import read_answer_list
from runtime import text_run
from runtime.generation_presets import OPTIONS, settings_for
from runtime.generator import Request
from runtime.graphs import Graphs, read_graphs
from runtime.how import GENERATE, INFERENCES, RANK, Ranking, Writing
from runtime.listed import Listed, list_pictures
from runtime.model import count
from runtime.outputs import ANSWERS, VQA
from runtime.place import placed
from runtime.prompts import paired, question_prompt, split_at_commas
from runtime.rows import Row
from runtime.run import refuse_mixed, refuse_model
from runtime.text_run import Job, on_one_line, reader, run_texts

RANKED = ("prompt", "clean_prompt", "num_return")  # the options that ranking reads


@dataclass(frozen=True, kw_only=True)
class Options(text_run.Options):
    """What the user asked of a run that answers questions."""

    questions: str | None = None  # one for each picture of `images`, with commas between
    questions_file: Path | None = None  # the same, one a line
    inference: str | None = None  # one of INFERENCES; None ranks where the model can and there are answers to choose from
    answer_list: Path | None = None  # JSON; with none, the data's
    k_test: int | None = None  # answers that are ranked; None takes the model's
    attend_padding: bool = False  # see runtime.decoders


@dataclass(frozen=True)
class Asked:
    """Questions about pictures, in the order of the data."""

    data: VqaData | Listed
    texts: list[str]  # as annotated
    pictures: list[int]  # of each
    ids: list[int | str]
    answers: list[str] | None  # to choose from, the data's own


def run_vqa(options: Options, say: Callable[[str], None]) -> manifest.Manifest:
    """Write outputs/; goes on where a stopped run ended, and does nothing when the same run is complete. What is answered to
    questions that the command line asks is said, too.

    Raises Misuse for options that cannot be, UserError when graphs and data do not fit each other, or the work fails.
    """
    graphs = read_graphs(options.graphs, options.verify)
    refuse_model(graphs, VQA)
    graphs = placed(graphs, options.provider, options.device, options.batchsize)
    asked = _listed(options) if options.images is not None else _of_data(options, graphs)
    answers = None if options.answer_list is None else read_answer_list(options.answer_list)
    more = (answers, options.inference, options.k_test, options.attend_padding, asked.answers)
    how = how_for(graphs, options.preset, options.asked, *more)
    prompts = [question_prompt(text, how.settings, graphs.config.protocol.max_words) for text in asked.texts]

    def results(rows: list[Row]) -> tuple[str, list[Row]]:
        return ANSWERS, [{"question_id": asked.ids[row["question"]], "answer": row["texts"][0]} for row in rows]

    job = Job(
        task=VQA,
        stage="answers",
        key="question",
        graphs=graphs,
        data=asked.data,
        read=reader(asked.data, graphs),
        requests=[Request(n, picture, prompt) for n, (picture, prompt) in enumerate(zip(asked.pictures, prompts, strict=True))],
        how=how,
        results=results,
    )
    done, rows = run_texts(job, options, say)
    if options.images is not None:
        for row in rows:
            image = asked.data.images[asked.pictures[row["question"]]]["image"]
            say(on_one_line(f"{image}: {asked.texts[row['question']]} {' | '.join(row['texts'])}"))
    return done


def inference_of(graphs: Graphs, asked: str | None, answers: list[str] | None) -> str:
    """How questions are answered. Raises Misuse for a name that is none, for a model that cannot rank, and when there are no
    answers to choose from."""
    ranks = isinstance(graphs.config, BlipVqaConfig)
    if asked is None:
        return RANK if ranks and answers else GENERATE
    if asked not in INFERENCES:
        raise Misuse(f"There is no inference {asked!r:.60}; expected {' or '.join(map(repr, INFERENCES))}.")
    if asked == RANK and not ranks:
        raise Misuse("Only BLIP ranks answers, and these graphs are of BLIP-2, which writes them: use the inference 'generate'.")
    if asked == RANK and not answers:
        raise Misuse("There are no answers to rank; give --answer-list, a JSON list of texts, here or to blip-pre vqa.")
    return asked


def how_for(
    graphs: Graphs,
    preset: str | None,
    asked: Mapping[str, Any],
    answers: list[str] | None,
    inference: str | None = None,
    k_test: int | None = None,
    attend_padding: bool = False,
    of_data: list[str] | None = None,
) -> Writing | Ranking:
    """How questions are answered, by what the user asked for: `answers` are those that the user gave, and `of_data` those to
    choose from otherwise. Raises Misuse when that cannot be."""
    given, answers = answers is not None, of_data if answers is None else answers
    chosen = inference_of(graphs, inference, answers)
    if attend_padding and (chosen == RANK or not isinstance(graphs.config, BlipVqaConfig)):
        raise Misuse("--attend-padding is of BLIP's answers with --inference generate alone. Leave it out.")
    if chosen == GENERATE:
        if idle := [name for name, there in (("answer_list", given), ("k_test", k_test is not None)) if there]:
            raise Misuse(f"{idle[0]} is read with the inference 'rank' alone, and answers are written here. Leave it out.")
        return Writing(settings_for(graphs.config, VQA, preset, asked), attend_padding)
    assert answers
    if idle := [name for name in asked if name not in RANKED and name in OPTIONS]:
        mend = f"Leave it out, or ask for --inference generate{' without --answer-list' if given else ''}."
        raise Misuse(f"{idle[0]} is read with the inference 'generate' alone, and answers are ranked here. {mend}")
    number = count("num_return", asked.get("num_return", 1))
    settings = settings_for(graphs.config, VQA, preset, {name: value for name, value in asked.items() if name != "num_return"})
    k = min(graphs.config.protocol.k_test, len(answers)) if k_test is None else count("k_test", k_test)
    return Ranking(settings, answers, k, min(number, k, len(answers)))


def _of_data(options: Options, graphs: Graphs) -> Asked:
    if options.questions is not None or options.questions_file is not None:
        raise Misuse("--questions and --questions-file go with --images; a data folder has its own questions.")
    data = read_vqa(options.data, options.verify)
    refuse_mixed(graphs, data)
    texts, pictures, ids = ([question[key] for question in data.questions] for key in ("question", "image", "question_id"))
    return Asked(data, texts, pictures, ids, data.answer_list)


def _listed(options: Options) -> Asked:
    assert options.images is not None
    if (options.questions is None) == (options.questions_file is None):
        raise Misuse("--images wants a question for each picture: give --questions, with commas between, or --questions-file.")
    data = list_pictures(options.images, VQA)
    if options.questions_file is not None:
        texts = read_lines(options.questions_file, "one question in each line")
    else:
        texts = split_at_commas(options.questions or "")
    texts = paired(len(data.images), texts, "questions", parted=options.questions_file is None)
    for number, text in enumerate(texts, 1):
        if not text.strip() or not is_text(text):
            raise Misuse(f"Question {number} is {text[:60]!a}; expected a text.")
    numbers = list(range(len(texts)))
    return Asked(data, [text.strip() for text in texts], numbers, [*numbers], None)
