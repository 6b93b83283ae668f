"""What decoding is asked for, what it needs of a model, and what it gives.

N prompts, B of them still going, M sequences of each at a time (beams, or samples), V words, L ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from models.errors import Misuse

ORIGINAL = "original"  # LAVIS with BLIP-2: transformers 4.33
ORIGINAL_BLIP = "original-4.15"  # BLIP, and the BLIP classes of LAVIS: transformers 4.15 to 4.26
TRANSFORMERS = "transformers"  # 5.x
RULES = (ORIGINAL, ORIGINAL_BLIP, TRANSFORMERS)
NEVER = "never"  # of early_stopping

MOST_BEAMS = 64  # a mistake beyond: each has keys and values of its own
# Beyond these a penalty leaves float32 before it is of use to anybody.
LENGTH_PENALTY = 10.0
REPETITION_PENALTY = (1e-3, 1e3)
LEAST_TEMPERATURE = 1e-3


class Steps(Protocol):
    """A decoder with its caches, for N prompts."""

    def start(self) -> np.ndarray:
        """float32 logits (N, V) of the word after each prompt."""

    def step(self, ids: np.ndarray, parents: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """float32 logits (B, M, V) of the word after these.

        Args:
            ids: (B, M) int64, the words that were chosen.
            parents: (B, M) int64, which row of the call before each continues. The rows of a call are counted through,
                b * M + m; after `start`, row n is prompt n.
            prompts: (B,) int64, ascending: those still going. One that is finished is no longer there, so it costs nothing.
        """


@dataclass(frozen=True)
class Decoding:
    """How words are chosen. max_length and min_length count the ids before the first new word and the new ones.

    temperature, top_k (0: all) and top_p are read with do_sample alone, length_penalty, early_stopping and rule with
    num_beams above 1 alone. Every rule knows early_stopping False and True; "never" came after transformers 4.26.
    """

    max_length: int
    min_length: int = 0
    num_beams: int = 1
    num_return: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    rule: str = ORIGINAL
    repetition_penalty: float = 1.0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """One sequence: its new words without the stop word, and whether it came to one.

    `score` is that of the beams' rule; without beams, the sum of the model's own log-probabilities of the new words and the
    stop word (before any penalty, temperature or choice among the likeliest).
    """

    ids: tuple[int, ...]
    score: float
    stopped: bool


def check(options: Decoding) -> None:
    """Raise Misuse when an option is no number of its kind, is out of its range, or contradicts another."""
    for name, least in {"max_length": 1, "min_length": 0, "num_beams": 1, "num_return": 1, "top_k": 0, "seed": 0}.items():
        _whole(name, getattr(options, name), least)
    for name in ("length_penalty", "repetition_penalty", "temperature", "top_p"):
        _number(name, getattr(options, name))
    if not isinstance(options.do_sample, bool):
        raise Misuse(f"do_sample is {options.do_sample!r:.60}; expected True or False.")
    if not isinstance(options.rule, str) or options.rule not in RULES:
        raise Misuse(f"There is no rule {options.rule!r:.60}; known rules: {', '.join(RULES)}.")
    if not (isinstance(options.early_stopping, bool) or options.early_stopping == NEVER):
        raise Misuse(f"early_stopping is {options.early_stopping!r:.60}; expected True, False or {NEVER!r}.")
    if options.num_beams > MOST_BEAMS:
        raise Misuse(f"num_beams is {options.num_beams:,}; expected at most {MOST_BEAMS}.")
    _ranges(options)
    if options.min_length > options.max_length:
        raise Misuse(f"min_length {options.min_length} is above max_length {options.max_length}.")
    if options.do_sample and options.num_beams > 1:
        raise Misuse(f"do_sample goes with num_beams 1, not {options.num_beams}: beams are searched here, not sampled.")
    if not options.do_sample and options.num_return > options.num_beams:
        raise Misuse(
            f"num_return {options.num_return} is above num_beams {options.num_beams}. Ask for more beams, or for do_sample."
        )
    if options.early_stopping == NEVER and options.rule == ORIGINAL_BLIP:
        raise Misuse(f"The rule {ORIGINAL_BLIP!r} knows no early_stopping {NEVER!r}; give True or False, or another rule.")


def _ranges(options: Decoding) -> None:
    if abs(options.length_penalty) > LENGTH_PENALTY:
        raise Misuse(
            f"length_penalty is {options.length_penalty}; expected a number from {-LENGTH_PENALTY:g} to {LENGTH_PENALTY:g}."
        )
    least, most = REPETITION_PENALTY
    if not least <= options.repetition_penalty <= most:
        raise Misuse(f"repetition_penalty is {options.repetition_penalty}; expected a number from {least:g} to {most:g}.")
    if options.temperature < LEAST_TEMPERATURE:
        raise Misuse(
            f"temperature is {options.temperature}; expected at least {LEAST_TEMPERATURE:g}. "
            "For the likeliest word each time, leave do_sample out."
        )
    if not 0 < options.top_p <= 1:
        raise Misuse(f"top_p is {options.top_p}; expected a number above 0, at most 1.")


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise Misuse(f"{name} is {value!r:.60}; expected a whole number, {least} or more.")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)) or not math.isfinite(value):
        raise Misuse(f"{name} is {value!r:.60}; expected a number.")
