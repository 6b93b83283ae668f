"""Whole texts, timed in the runtime's own decoder: a picture in, its first logits out, and then word after word.

A step reads one word of each sequence and chooses the next ones. B pictures with a prompt each, W new words: W - 1 steps.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.forms import Load, Writing
from bench.measure import Timing, time_loops
from bench.traffic import step_bytes
from bench.words import Asked, random_asked, write_words
from runtime.decoders import Decoder, open_decoder
from runtime.decoding import Steps
from runtime.graphs import Graphs


@dataclass(frozen=True)
class Generation:
    """One way to write, measured."""

    beams: int
    use_past: bool
    batch: int
    prompt: int  # tokens
    new: int  # words
    first: Timing  # pictures in, first logits out
    rest: Timing  # all words chosen and W - 1 steps
    step_bytes: float  # read by a step, on average

    @property
    def step_s(self) -> float:
        """Seconds of one step, in the median loop."""
        return self.rest.median / (self.new - 1)

    @property
    def token_ms(self) -> float:
        """Of one word of one text."""
        return 1e3 * self.step_s / self.batch

    @property
    def tokens_per_s(self) -> float:
        """Of all texts together, after the first word."""
        return self.batch / self.step_s

    @property
    def token_bytes(self) -> float:
        """Read for one word of one text."""
        return self.step_bytes / self.batch

    @property
    def gb_per_s(self) -> float:
        """1e9 bytes a second."""
        return self.step_bytes / self.step_s / 1e9

    def record(self, bandwidth: float) -> dict[str, Any]:
        """As a record keeps it. `bandwidth`: that the machine reads with, in 1e9 bytes a second."""
        return {
            "num_beams": self.beams,
            "use_past": self.use_past,
            "batch": self.batch,
            "prompt_tokens": self.prompt,
            "new_tokens": self.new,
            "loops": len(self.rest.seconds),
            "first_token_ms": round(1e3 * self.first.median, 4),
            "token_ms": round(self.token_ms, 4),
            "tokens_per_s": round(self.tokens_per_s, 3),
            "token_bytes": round(self.token_bytes),
            "step_bytes": round(self.step_bytes),
            "gb_per_s": round(self.gb_per_s, 3),
            "of_bandwidth": round(self.gb_per_s / bandwidth, 4),
            "first_seconds": [round(s, 6) for s in self.first.seconds],
            "rest_seconds": [round(s, 6) for s in self.rest.seconds],
        }


class Watched:
    """Steps that note when the first logits came."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self.first = 0.0

    def start(self) -> np.ndarray:
        logits = self._steps.start()
        self.first = time.perf_counter()
        return logits

    def step(self, ids: np.ndarray, parents: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        return self._steps.step(ids, parents, prompts)


def time_generation(graphs: Graphs, load: Load, writing: Writing) -> list[Generation]:
    """Texts of `writing.new_tokens` words about random pictures, with each number of beams, with caches and without, with a
    progress bar. Raises UserError when a graph that writing needs is missing."""
    asked = random_asked(graphs, load.batchsize, load.length)
    found = []
    with tqdm(total=len(writing.use_past) * len(writing.num_beams), desc="texts", disable=None, leave=False) as bar:
        for use_past in writing.use_past:
            decoder = open_decoder(graphs, load.provider, load.threads, use_past)
            for beams in writing.num_beams:
                first, rest = _time_texts(decoder, asked, beams, writing.new_tokens, load)
                read = step_bytes(graphs, load, beams, writing.new_tokens, use_past)
                sizes = (beams, use_past, load.batchsize, load.length, writing.new_tokens)
                found.append(Generation(*sizes, first, rest, read))
                bar.update()
    return found


def _time_texts(decoder: Decoder, asked: Asked, beams: int, new: int, load: Load) -> tuple[Timing, Timing]:
    """Seconds to the first logits, and from there to the last word, of every timed loop."""
    first: list[float] = []
    rest: list[float] = []

    def write() -> None:
        began = time.perf_counter()
        steps = Watched(decoder.begin(decoder.look(asked.pictures), asked.picture, asked.ids, asked.mask))
        write_words(steps, asked, beams, new)
        first.append(steps.first - began)
        rest.append(time.perf_counter() - steps.first)

    time_loops(write, load.loops, load.warmup)
    return Timing(tuple(first[load.warmup :])), Timing(tuple(rest[load.warmup :]))
