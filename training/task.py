"""What each task learns: its model, how a batch is made for it, and its losses.

B samples of a batch. What is here is run in every process alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.blip import BlipPretrain
from models.blip2 import Blip2Stage1
from models.blip2_llm import Blip2Llm
from models.captioner import BlipCaptioner
from models.config import Config, GenerationConfig
from models.llm_config import T5Config
from models.vqa import BlipVqa
from preprocess.images import normalise
from preprocess.questions import MAX_WORDS, pre_question
from preprocess.text import CaptionTokenizer
from preprocess.wordpiece_words import WordpieceWords
from preprocess.words import Words
from training import caption, pretrain, stage1, stage2, texts, vqa
from training.learner import Losses
from training.loader import Loaded, tokenised
from training.momentum import Momentum
from training.pretrain import BlipFinetune
from training.settings import Settings
from training.stage2 import Answered, Told
from training.start import sizes_of, started
from training.step import Batch, Step
from training.vocabulary import TOKENIZER, words_of
from training.vqa import Questions


@dataclass(frozen=True)
class Moment:
    """What of a step's place in the training its losses depend on."""

    generator: torch.Generator  # draws hard negatives; the same in all processes
    matching: bool  # whether there is a matching loss yet
    alpha: float  # share of what the momentum copies find


@dataclass(frozen=True)
class Task:
    """A model and what it learns."""

    config: Config
    model: nn.Module
    said: tuple[str, ...]  # about its first weights
    batch_of: Callable[[Loaded], Any]
    losses_of: Callable[[nn.Module, Any, Moment], Losses]
    momentum: Momentum | None = None
    words: CaptionTokenizer | None = None  # of a model that finds pictures and captions


def task_of(settings: Settings) -> Task:
    """The task that `settings` name, ready to begin. Raises UserError and Misuse for files that cannot be used and sizes of
    another task's model."""
    config = sizes_of(settings)
    model, said = started(settings, config)
    if isinstance(config, GenerationConfig):
        return _writing(settings, config, model, said)
    words = CaptionTokenizer.load(settings.model.tokenizer or TOKENIZER, config)
    batch_of = partial(_pairs, settings, config, words)
    if isinstance(model, Blip2Stage1):
        return Task(config, model, tuple(said), batch_of, partial(_stage1, words), words=words)
    asked = settings.model.momentum
    assert isinstance(model, BlipPretrain | BlipFinetune)
    momentum = Momentum(model, asked.decay, asked.queue) if asked else None
    own = settings.parallel.negatives == "own"
    return Task(config, model, tuple(said), batch_of, partial(_pretrain, words, momentum, own), momentum, words)


def _writing(settings: Settings, config: GenerationConfig, model: nn.Module, said: list[str]) -> Task:
    words = words_of(settings, config)
    if isinstance(model, BlipVqa):
        assert isinstance(words, WordpieceWords)
        return Task(config, model, tuple(said), partial(_questions, settings, config, words), _vqa)
    if isinstance(model, BlipCaptioner):
        return Task(config, model, tuple(said), partial(_told, settings, config, words), _caption)
    assert isinstance(model, Blip2Llm)
    if isinstance(model.cfg.llm, T5Config):
        return Task(config, model, tuple(said), partial(_answered, settings, config, words), _answers)
    return Task(config, model, tuple(said), partial(_told, settings, config, words), _text)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch whose tensors are on `device`."""
    return replace(batch, **{field.name: getattr(batch, field.name).to(device) for field in fields(batch)})


# Losses by name. What is 0 because it is left out is there all the same, so that every step logs the same names.


def _stage1(words: CaptionTokenizer, model: nn.Module, batch: Batch, moment: Moment) -> Losses:
    assert isinstance(model, Blip2Stage1)
    return _three(stage1.losses_of(model, words, batch, moment.generator, moment.matching))


def _pretrain(
    words: CaptionTokenizer, momentum: Momentum | None, own: bool, model: nn.Module, batch: Batch, moment: Moment
) -> Losses:
    assert isinstance(model, BlipPretrain | BlipFinetune)
    slow = pretrain.Slow(momentum, moment.alpha) if momentum else None
    found = _three(pretrain.losses_of(model, words, batch, moment.generator, moment.matching, slow, own))
    return found if isinstance(model, BlipPretrain) else {"itc": found["itc"], "itm": found["itm"]}


def _text(model: nn.Module, batch: Told, moment: Moment) -> Losses:
    assert isinstance(model, Blip2Llm)
    return {"lm": stage2.told_loss(model, batch)}


def _answers(model: nn.Module, batch: Answered, moment: Moment) -> Losses:
    assert isinstance(model, Blip2Llm)
    return {"lm": stage2.answered_loss(model, batch)}


def _caption(model: nn.Module, batch: Told, moment: Moment) -> Losses:
    assert isinstance(model, BlipCaptioner)
    return {"lm": caption.told_loss(model, batch)}


def _vqa(model: nn.Module, batch: Questions, moment: Moment) -> Losses:
    assert isinstance(model, BlipVqa)
    return {"vqa": vqa.answers_loss(model, batch)}


def _three(step: Step) -> Losses:
    return {"itc": step.itc, "itm": step.itm, "lm": step.lm}


# Batches.


def _image(loaded: Loaded, config: Config) -> Tensor:
    """(B, 3, S, S) as the model reads it, or the features (B, T, D) that are kept."""
    if loaded.pixels.ndim == 3:
        return torch.from_numpy(loaded.pixels)
    return torch.from_numpy(normalise(loaded.pixels, config.protocol.mean, config.protocol.std))


def _limits(settings: Settings, config: Config) -> tuple[int, int]:
    """Words and tokens that a text is cut to."""
    data, protocol = settings.data, config.protocol
    return data.max_words or protocol.max_words, data.max_length or protocol.max_length


def _pairs(settings: Settings, config: Config, words: CaptionTokenizer, loaded: Loaded) -> Batch:
    ids, mask = tokenised(loaded.texts, words, *_limits(settings, config))
    return Batch(torch.from_numpy(loaded.picture), _image(loaded, config), *_tensors(ids, mask))


def _told(settings: Settings, config: Config, words: Words, loaded: Loaded) -> Told:
    model = settings.model
    found = texts.told(words, loaded.texts, model.prompt, model.trailing_newline, *_limits(settings, config))
    return Told(_image(loaded, config), *_tensors(*found))


def _answered(settings: Settings, config: Config, words: Words, loaded: Loaded) -> Answered:
    found = texts.answered(words, loaded.texts, settings.model.prompt, *_limits(settings, config))
    return Answered(_image(loaded, config), *_tensors(*found))


def _questions(settings: Settings, config: Config, words: WordpieceWords, loaded: Loaded) -> Questions:
    assert loaded.answers is not None
    longest = settings.data.max_words or MAX_WORDS
    ids, mask = words.questions([pre_question(text, longest) for text in loaded.texts], _limits(settings, config)[1])
    flat = [(number, *answer) for number, answers in enumerate(loaded.answers) for answer in answers]
    answer, answer_mask = words.answers([text for _, text, _ in flat])
    question = torch.tensor([number for number, _, _ in flat])
    weight = torch.tensor([share for _, _, share in flat], dtype=torch.float32)
    asked, mask_of_asked, said, mask_of_said = _tensors(ids, mask, answer, answer_mask)
    return Questions(_image(loaded, config), asked, mask_of_asked, said, mask_of_said, question, weight)


def _tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]
