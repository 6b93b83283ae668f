"""Prompts to texts, whatever runs the decoder: how each model reads them, which are written on together, and what counts
towards the lengths.

N prompts that are written on together, L tokens, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from models.config import Blip2LlmConfig, BlipCaptionConfig, BlipVqaConfig, Config
from models.errors import Misuse
from models.llm_config import T5Config
from preprocess.padding import right_padded
from preprocess.wordpiece_words import WordpieceWords
from preprocess.words import Words
from runtime.decode import generate
from runtime.decoding import TRANSFORMERS, Steps
from runtime.generation_presets import COUNTED, POSITIONS, Settings
from runtime.prompts import text_of

# Which prompts (N,), and their ids and mask (N, L), to a decoder that is ready to go on from them.
Begin = Callable[[np.ndarray, np.ndarray, np.ndarray], Steps]


@dataclass(frozen=True)
class Written:
    """What was written for one request, the best first."""

    texts: list[str]
    scores: list[float]
    tokens: list[int]  # new words of each, without the one that ends it

    def __post_init__(self) -> None:
        assert len(self.texts) == len(self.scores) == len(self.tokens)


def write(
    begin: Begin,
    words: Words,
    config: Config,
    settings: Settings,
    prompts: Sequence[str],
    numbers: Sequence[int],
    on_step: Callable[[int], None] | None = None,
) -> list[Written]:
    """What is written after each prompt, given as the model reads it.

    Args:
        begin: the decoder, after what else it looks at.
        numbers: of the prompts in the whole run, from which their random numbers come.
        on_step: told after each step how many words it gave.

    Raises as `runtime.decode.generate`.
    """
    found: list[Written | None] = [None] * len(prompts)
    for chosen, ids, mask in together(words, config, settings, prompts):
        before = counted(words, config, settings, ids, mask)
        own = [numbers[n] for n in chosen]
        texts = generate(begin(chosen, ids, mask), before, words.stop_ids, settings.after(before.shape[1]), on_step, own)
        for n, row, kept, generated in zip(chosen, ids, mask, texts, strict=True):
            said = partial(text_of, words, config, settings, prompts[n], row[kept > 0].tolist())
            found[n] = Written(
                [said(text.ids) for text in generated],
                [float(text.score) for text in generated],
                [len(text.ids) for text in generated],
            )
    return [written for written in found if written is not None]


def lengths(
    words: Words,
    config: Config,
    settings: Settings,
    prompts: Sequence[str],
    options: tuple[str, str] = ("--max-length", "--min-length"),
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Of the prompts that are written on together: which they are, the tokens of the longest, and how many new words there may
    be at most.

    `options`: what the user calls the lengths. Raises Misuse when they leave no room for a new word, or contradict each other.
    """
    for chosen, ids, mask in together(words, config, settings, prompts):
        before = counted(words, config, settings, ids, mask).shape[1]
        decoding = settings.after(before)
        new, least = decoding.max_length - before, decoding.min_length - before
        if new < 1:
            raise Misuse(
                f"max_length {settings.decoding.max_length} leaves no room for a new word after the {before} that count "
                f"already. The longest prompt is {max(prompts, key=len)[:60]!r}; shorten it, or give a larger {options[0]}."
            )
        if least > new:
            raise Misuse(
                f"min_length {settings.decoding.min_length} counts {COUNTED[settings.min_counts]}, max_length "
                f"{settings.decoding.max_length} counts {COUNTED[settings.max_counts]}: after the prompt "
                f"{prompts[chosen[0]][:40]!r} that is {least} new words or more, and {new} at most. "
                f"Give a smaller {options[1]}."
            )
        yield chosen, ids.shape[1], new


def read(words: Words, config: Config, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask (N, L) as the decoder takes them."""
    if isinstance(config, BlipVqaConfig):
        assert isinstance(words, WordpieceWords)
        return words.questions(prompts, config.protocol.max_length)
    ids, mask = words.prompts(prompts)
    if isinstance(config, Blip2LlmConfig) and isinstance(config.llm, T5Config):
        rows = [row[kept > 0].tolist() for row, kept in zip(ids, mask, strict=True)]
        return right_padded(rows, words.pad_id)  # as the original: T5 counts the distances between words
    return ids, mask


def together(
    words: Words, config: Config, settings: Settings, prompts: Sequence[str]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Which prompts are written on together, and their ids and mask (N, L): those of equal length where the length counts
    towards max_length. Otherwise all of them, but those without a token by themselves: beside longer ones they would be
    written on from a word of padding."""
    ids, mask = read(words, config, prompts)
    lengths = mask.sum(axis=1)
    if not (isinstance(config, BlipCaptionConfig) or settings.max_counts == POSITIONS):
        lengths = np.where(lengths > 0, ids.shape[1], 0)
    for length in np.unique(lengths):
        chosen = np.flatnonzero(lengths == length)
        yield chosen, ids[chosen, ids.shape[1] - length :], mask[chosen, ids.shape[1] - length :]


def counted(words: Words, config: Config, settings: Settings, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(N, L) what counts before the new words, as `runtime.decode.generate` takes it."""
    if isinstance(config, BlipCaptionConfig):
        return ids
    whole = settings.max_counts == POSITIONS or settings.decoding.rule == TRANSFORMERS
    if isinstance(config, Blip2LlmConfig) and not isinstance(config.llm, T5Config) and whole:
        queries = np.full((len(ids), config.qformer.queries), -1, np.int64)
        # transformers 5.x counts padding as a word that was there, so its penalty depends on the batch.
        seen = ids if settings.decoding.rule == TRANSFORMERS else np.where(mask > 0, ids, -1)
        return np.concatenate([queries, seen], axis=1)
    return np.tile(np.array(words.start_ids, np.int64), (len(ids), 1))
