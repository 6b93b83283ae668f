"""The two ways to answer a request: to write a text, or to choose one of a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from runtime.batches import slices
from runtime.decoders import Seen
from runtime.generation_presets import Settings
from runtime.generator import Generator, Request
from runtime.writing import Written

GENERATE, RANK = "generate", "rank"
INFERENCES = (GENERATE, RANK)


class How(Protocol):
    """How requests are answered."""

    def content(self) -> dict[str, Any]:
        """What decides the texts, as a manifest keeps it."""

    def check(self, generator: Generator, prompts: Sequence[str]) -> list[str]:
        """Raise when these prompts cannot be answered so; returns what is to be said of them."""

    def answer(
        self, generator: Generator, seen: Seen, requests: Sequence[Request], on_step: Callable[[int], None]
    ) -> list[Written]:
        """The answers to requests about pictures that were seen. `on_step` is told how many words each step gave."""


@dataclass(frozen=True)
class Writing:
    """With words of the model's own."""

    settings: Settings
    attend_padding: bool | None = None  # of questions, see runtime.decoders; None of captions, which have no such choice

    def content(self) -> dict[str, Any]:
        asked = {} if self.attend_padding is None else {"inference": GENERATE, "attend_padding": self.attend_padding}
        return {**self.settings.content(), **asked}

    def check(self, generator: Generator, prompts: Sequence[str]) -> list[str]:
        return generator.check(prompts, self.settings)

    def answer(
        self, generator: Generator, seen: Seen, requests: Sequence[Request], on_step: Callable[[int], None]
    ) -> list[Written]:
        return generator.write(seen, requests, self.settings, on_step, bool(self.attend_padding))


@dataclass(frozen=True)
class Ranking:
    """With one of a list: BLIP alone, see runtime.rank."""

    settings: Settings  # of which the prompt counts
    answers: list[str]
    k: int  # of them that are ranked; all when there are fewer
    number: int  # of these that are kept, at most k and at most all

    def content(self) -> dict[str, Any]:
        named = {"as": self.settings.preset, "prompt": self.settings.prompt, "clean_prompt": self.settings.clean_prompt}
        return {**named, "inference": RANK, "k_test": self.k, "num_return": self.number, "answers": self.answers}

    def check(self, generator: Generator, prompts: Sequence[str]) -> list[str]:
        lines, count = generator.check_ranking(prompts, self.answers), len(self.answers)
        if self.k > count:
            lines.append(f"k_test {self.k} is larger than the list: all {count:,} answers are ranked.")
        return lines

    def answer(
        self, generator: Generator, seen: Seen, requests: Sequence[Request], on_step: Callable[[int], None]
    ) -> list[Written]:
        return generator.rank(seen, requests, self.answers, self.k, self.number, on_step)


def answered(
    how: How,
    generator: Generator,
    images: np.ndarray,
    requests: Sequence[Request],
    batchsize: int,
    on_step: Callable[[int], None],
) -> list[Written]:
    """The answers to all requests about the pictures `images` (P, 3, S, S), which are looked at once, `Request.picture` being
    their numbers among these; `batchsize` requests at a time."""
    if not requests:
        return []
    seen = generator.decoder.look(images)
    found: list[Written] = []
    for part in slices(0, len(requests), batchsize):
        found += how.answer(generator, seen, requests[part], on_step)
    return found
