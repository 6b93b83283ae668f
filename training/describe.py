"""Texts about pictures by a model in PyTorch: captions and answers to measure it by while it learns, or to show people.

Words are chosen by runtime.decode, so they are those that blip-run writes with the exported model and the same options.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from models.config import Blip2LlmConfig, BlipVqaConfig, GenerationConfig
from models.errors import Misuse
from models.fit import Generator
from models.llm_config import OptConfig
from preprocess.images import normalise, read_image
from preprocess.words import Words
from preprocess.workers import in_order, workers_of
from runtime import generation_presets
from runtime.decoding import Steps
from runtime.generation_presets import PLACE, settings_for
from runtime.prompts import question_prompt
from runtime.writing import lengths, write
from training.decoder import begin, look
from training.gather import rank
from training.precision import precisely, widened
from training.settings import Settings
from training.vocabulary import words_of

CAPTION, VQA = "caption", "vqa"
OPTIONS = ("run.generation.max_length", "run.generation.min_length")


@dataclass(frozen=True)
class Speech:
    """How a model of these sizes is asked for texts."""

    settings: Settings
    config: GenerationConfig
    words: Words
    how: generation_presets.Settings

    def prompts(self, questions: Sequence[str | None]) -> list[str]:
        """What the model reads of questions as annotated; None where a caption is asked for."""
        longest = self.config.protocol.max_words
        return [self.how.prompt if q is None else question_prompt(q, self.how, longest) for q in questions]


def speech_of(settings: Settings, config: GenerationConfig, task: str) -> Speech:
    """What run.generation asks of a model for the task CAPTION or VQA. Captions begin with model.prompt, and questions are put
    into it where it has a place for them, or into the template of the model's authors.

    Raises Misuse for options that contradict each other, UserError for a vocabulary that cannot be used.
    """
    asked = {name: value for name, value in asdict(settings.run.generation).items() if value is not None}
    if task == CAPTION or settings.model.prompt.count(PLACE) == 1:
        asked["prompt"] = settings.model.prompt
    words = words_of(settings, config, config.protocol.max_length)  # prompts are cut as the original cuts them
    return Speech(settings, config, words, settings_for(config, task, None, asked))


def check_room(speech: Speech, prompts: Sequence[str]) -> None:
    """Raise Misuse unless there is room for a new word after each prompt, and a place in the model for the last one."""
    config = speech.config
    for _, length, new in lengths(speech.words, config, speech.how, list(dict.fromkeys(prompts)), OPTIONS):
        if isinstance(config, Blip2LlmConfig):
            if not isinstance(config.llm, OptConfig):
                continue  # no table of positions
            places, taken = config.llm.positions, config.qformer.queries + length
        else:
            places, taken = config.decoder.positions, 1 if isinstance(config, BlipVqaConfig) else length
        if taken + new > places:
            raise Misuse(
                f"{OPTIONS[0]} allows {new} new words after {taken} places that are taken, but the model has {places}. "
                "Choose a smaller one."
            )


def texts_of(model: Generator, speech: Speech, files: Sequence[Path], prompts: Sequence[str]) -> list[str]:
    """The best text about each picture after its prompt, which is given as the model reads it.

    Pictures are read as for evaluation, each once, by data.workers processes where they are many; run.eval_batchsize texts are
    written at a time, on the model's device and in run.precision. Raises UserError for a picture that cannot be read, or when
    the model gives no numbers; Misuse as `check_room`.
    """
    if not files:
        return []
    check_room(speech, prompts)
    settings, config, device = speech.settings, speech.config, next(model.parameters()).device
    asked: dict[Path, list[int]] = {}
    for number, file in enumerate(files):
        asked.setdefault(file, []).append(number)
    workers = workers_of(settings.data.workers)
    decode = partial(read_image, size=config.vision.image_size, interpolation=config.protocol.interpolation)
    found: dict[int, str] = {}
    pixels: list[np.ndarray] = []
    waiting: dict[int, int] = {}  # prompts by their number, and which of `pixels` each goes with
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(files), desc="texts", unit=" texts", leave=False, disable=None if rank() == 0 else True)
    with bar, widened(model), precisely(settings, device), closing(in_order(decode, list(asked), workers)) as pictures:
        for picture, numbers in zip(pictures, asked.values(), strict=True):
            waiting |= dict.fromkeys(numbers, len(pixels))
            pixels.append(picture)
            if len(waiting) >= settings.run.eval_batchsize or len(found) + len(waiting) == len(files):
                texts = _written(model, speech, np.stack(pixels), list(waiting.values()), [prompts[n] for n in waiting])
                found |= dict(zip(waiting, texts, strict=True))
                bar.update(len(waiting))
                pixels, waiting = [], {}
    model.train(was_training)
    return [found[number] for number in range(len(files))]


def _written(model: Generator, speech: Speech, pixels: np.ndarray, picture: list[int], prompts: list[str]) -> list[str]:
    """The texts of one batch: `pixels` (P, 3, S, S) uint8, and for each of N prompts which of them it goes with."""
    protocol, device = speech.config.protocol, next(model.parameters()).device
    image = torch.from_numpy(normalise(pixels, protocol.mean, protocol.std)).to(device)
    seen = look(model, image)[torch.tensor(picture, device=device)]

    def begun(chosen: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> Steps:
        rows = seen[torch.from_numpy(chosen).to(device)]
        return begin(model, rows, ids, mask, speech.words.start_ids[0])

    found = write(begun, speech.words, speech.config, speech.how, prompts, range(len(prompts)))
    return [written.texts[0] for written in found]
