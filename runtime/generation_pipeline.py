"""The Python interface of what writes texts: runtime.pipeline has the other tasks, and what a picture may be.

Options are those of blip-run by their names (runtime.generation_presets has them): `preset` says whose defaults, and whatever
is given to pipeline() or to a call takes their place, the call's before pipeline()'s. N pictures.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from models.errors import Misuse
from preprocess.annotations import is_text
from runtime.batches import slices
from runtime.generation_presets import PLACE, settings_for
from runtime.generator import Generator, Request
from runtime.how import How, Writing, answered
from runtime.model import Engine, count
from runtime.outputs import CAPTION, VQA
from runtime.picture_input import Picture, as_list, read_pictures
from runtime.prompts import caption_prompt, question_prompt
from runtime.run import refuse_model
from runtime.vqa import how_for
from runtime.writing import Written

Asked = Picture | Mapping[str, Any]  # a picture, or {"image": picture} with its "prompt" or "question"


class ImageToTextGeneration:
    """What a model writes about pictures.

        write = pipeline("image_to_text_generation", preset="lavis")
        write("dog.jpg")                                                        # "a dog on grass"
        write(["1.jpg", {"image": "2.jpg", "prompt": "a photo of"}], num_beams=5)   # ["two cats", "a red car"]

    One picture gives a text, a list of pictures a list of texts; with num_return above 1 each text is a list of texts, the best
    first. Inputs and names are mindformers'; there top_k and its like are accepted and lost, here they count. Lengths are
    counted as the preset counts (runtime.generation_presets).
    """

    def __init__(self, engine: Engine, preset: str | None = None, use_past: bool = True, **options: Any) -> None:
        """
        Args:
            preset: whose defaults: "blip", "lavis", "paddlemix" or "mindformers".
            use_past: keep what was read; False reads all words again for each new one, to compare.
            options: for calls that give none.
        """
        self._model = _Model(engine, CAPTION, use_past)
        self._preset, self._options = preset, options
        settings_for(engine.graphs.config, CAPTION, preset, options)

    def __call__(
        self,
        images: Asked | Sequence[Asked],
        prompt: str | Sequence[str] | None = None,
        hypothesis_template: str | Sequence[str] | None = None,
        **options: Any,
    ) -> str | list[str] | list[list[str]]:
        """The text of each picture.

        Args:
            images: pictures, or {"image": picture, "prompt": text}.
            prompt: for pictures that have none; one for all, or one for each. None takes the preset's.
            hypothesis_template: holds {} where the prompt goes, or is the whole prompt; one for all, or one for each. Blanks
                around what comes of it are removed, as in mindformers.
            options: of decoding, for this call.
        """
        config = self._model.engine.graphs.config
        settings = settings_for(config, CAPTION, self._preset, {**self._options, **options})
        given, single = as_list(images)
        pictures, own = _pictures(given, "prompt")
        prompts, templates = _each("prompt", prompt, len(given)), _each("hypothesis_template", hypothesis_template, len(given))
        texts = []
        for of_picture, of_call, template in zip(own, prompts, templates, strict=True):
            text = of_call if of_picture is None else of_picture
            if template is not None:
                text = template.replace(PLACE, text or "").strip()
            texts.append(caption_prompt(settings.prompt if text is None else text, settings, config.protocol.max_words))
        found = self._model.answers(Writing(settings), pictures, list(range(len(texts))), texts)
        if settings.decoding.num_return > 1:
            several = [written.texts for written in found]
            return several[0] if single else several
        best = [written.texts[0] for written in found]
        return best[0] if single else best


class VisualQuestionAnswering:
    """Answers to questions about pictures.

        ask = pipeline("visual_question_answering")
        ask("dog.jpg", "What is on the grass?", top_k=2)      # [{"answer": "dog", "score": -0.3}, {"answer": "a dog", ...}]
        ask("dog.jpg", ["What is it?", "What colour?"])       # a list of such lists

        ask({"image": "dog.jpg", "question": "What is it?"})  # as transformers' pipeline takes it; or a list of these

    One question about one picture gives a list of answers, the best first; several questions, pictures or both a list of such
    lists, one picture or one question going with all of the other. Scores are those of blip-run: of the beams, else sums of
    log-probabilities.
    """

    def __init__(
        self,
        engine: Engine,
        preset: str | None = None,
        use_past: bool = True,
        answer_list: Sequence[str] | None = None,
        inference: str | None = None,
        k_test: int | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            preset, use_past, options: as ImageToTextGeneration's; the option `prompt` is a template with {} for the question.
            answer_list: answers to choose from, which BLIP ranks; where nothing is ranked, it and k_test are refused.
            inference: "generate" or "rank"; None ranks where the model can and there is a list.
            k_test: how many answers of the list are ranked for a question; None takes the model's.
        """
        self._model = _Model(engine, VQA, use_past)
        self._preset, self._options = preset, options
        answers = None if answer_list is None else _answers(answer_list)
        self._ranking = (answers, inference, k_test)
        how_for(engine.graphs, preset, options, *self._ranking)

    def __call__(
        self,
        images: Asked | Sequence[Asked],
        question: str | Sequence[str] | None = None,
        top_k: int | None = None,
        **options: Any,
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """[{"answer": str, "score": float}, ...] of each question. `top_k`: how many answers, 1 if None: with the inference
        "generate" it is num_return, and needs as many beams. `options`: of decoding, for this call."""
        asked = {**self._options, **options}
        if top_k is not None:
            asked["num_return"] = count("top_k", top_k)
        graphs = self._model.engine.graphs
        how = how_for(graphs, self._preset, asked, *self._ranking)
        given, one_picture = as_list(images)
        pictures, beside = _pictures(given, "question")
        questions, one_question = _questions(beside, question, one_picture)
        number = len(questions) if one_picture else len(pictures)
        if not one_question and len(questions) != number:
            raise Misuse(f"{len(pictures)} pictures and {len(questions)} questions; expected one for each, or one for all.")
        texts = questions * (number if one_question else 1)
        prompts = [question_prompt(text, how.settings, graphs.config.protocol.max_words) for text in texts]
        about = [0] * number if one_picture else list(range(number))
        found = [
            [{"answer": text, "score": score} for text, score in zip(written.texts, written.scores, strict=True)]
            for written in self._model.answers(how, pictures, about, prompts)
        ]
        return found[0] if one_picture and one_question else found


class _Model:
    """The graphs, opened when they are first needed and then kept."""

    def __init__(self, engine: Engine, task: str, use_past: bool) -> None:
        refuse_model(engine.graphs, task)
        if not isinstance(use_past, bool):
            raise Misuse(f"use_past is {use_past!r:.60}; expected True or False.")
        self.engine, self._use_past = engine, use_past
        self._generator: Generator | None = None

    def answers(self, how: How, pictures: list[Any], about: list[int], prompts: list[str]) -> list[Written]:
        """The answers to `prompts`, each about one of the pictures, the numbers of which ascend."""
        if self._generator is None:
            self._generator = Generator(self.engine.graphs, self.engine.provider, self.engine.threads, self._use_past)
        generator, size = self._generator, self.engine.batchsize
        for line in how.check(generator, prompts):
            warnings.warn(line.removeprefix("Warning: "), stacklevel=3)
        requests = [Request(n, picture, prompt) for n, (picture, prompt) in enumerate(zip(about, prompts, strict=True))]
        found: list[Written] = []
        for part in slices(0, len(pictures), size):
            images = read_pictures(pictures[part], part.start, generator.config)
            asked = [request for request in requests if part.start <= request.picture < part.stop]
            local = [replace(request, picture=request.picture - part.start) for request in asked]
            found += answered(how, generator, images, local, size, lambda words: None)
        return found


def _pictures(given: list[Any], key: str) -> tuple[list[Any], list[str | None]]:
    """The pictures, and the texts that stand beside them under `key`."""
    pictures, texts = [], []
    for number, each in enumerate(given):
        if isinstance(each, Mapping):
            if "image" not in each or each.keys() - {"image", key}:
                keys = ", ".join(map(repr, each))
                raise Misuse(f"Input {number} has the keys {keys:.60}; expected 'image', and {key!r} where it has one.")
            text = each.get(key)
            texts.append(None if text is None else _text(key, text, number))
            pictures.append(each["image"])
        else:
            texts.append(None)
            pictures.append(each)
    return pictures, texts


def _questions(beside: list[str | None], asked: Any, one_picture: bool) -> tuple[list[str], bool]:
    """The questions, and whether it is a single one: those beside the pictures, else what was asked."""
    own = [text for text in beside if text is not None]
    if own and asked is not None:
        raise Misuse("There are questions beside the pictures, and `question` is given too; choose one.")
    if asked is None and None in beside:
        raise Misuse(f"Picture {beside.index(None)} has no question; give `question`, or {{'image': ..., 'question': ...}}.")
    if asked is None:
        return own, one_picture
    values, single = as_list(asked)
    texts = [_text("question", each, n) for n, each in enumerate(values)]
    if blank := [n for n, text in enumerate(texts) if not text.strip()]:
        raise Misuse(f"question {blank[0]} is blank; expected a text.")
    return texts, single


def _each(name: str, given: Any, number: int) -> list[str | None]:
    """One value for each of `number` pictures, of one for all or of as many."""
    if given is None:
        return [None] * number
    values, single = as_list(given)
    texts: list[str | None] = [_text(name, value, n) for n, value in enumerate(values)]
    if single:
        return texts * number
    if len(texts) != number:
        raise Misuse(f"{number} pictures, and {name} has {len(texts)} texts; expected one for each, or one for all.")
    return texts


def _answers(given: Any) -> list[str]:
    answers = [_text("answer", each, n) for n, each in enumerate(as_list(given)[0])]
    if not answers or not all(answer.strip() for answer in answers):
        raise Misuse("answer_list is empty, or holds a blank answer; give texts to choose from, or leave it out.")
    return answers


def _text(name: str, value: Any, number: int) -> str:
    if not isinstance(value, str) or not is_text(value):
        raise Misuse(f"{name} {number} is {value!r:.60}, of type {type(value).__name__}; expected a str.")
    return value


WRITERS: dict[str, Callable[..., Callable[..., Any]]] = {
    "image_to_text_generation": ImageToTextGeneration,
    "visual_question_answering": VisualQuestionAnswering,
}
