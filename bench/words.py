"""What a model that writes words is given here, and one way to have it write: as many words as were asked for, no fewer.

N prompts, L tokens, W new words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.config import BlipCaptionConfig
from runtime.decode import generate
from runtime.decoding import TRANSFORMERS, Decoding, Steps
from runtime.generator import open_words
from runtime.graphs import Graphs


@dataclass(frozen=True)
class Asked:
    """Pictures, a prompt about each, and the words that would end a text."""

    pictures: np.ndarray  # (N, 3, S, S) float32
    ids: np.ndarray  # (N, L) int64
    start_id: int  # that the decoder begins with, where the prompt is read before
    stop_ids: tuple[int, ...]
    pad_id: int

    @property
    def mask(self) -> np.ndarray:
        """(N, L) int64: nothing is padding."""
        return np.ones_like(self.ids)

    @property
    def picture(self) -> np.ndarray:
        """(N,) int64: each prompt goes with the picture of its number."""
        return np.arange(len(self.ids))


def random_asked(graphs: Graphs, count: int, length: int, seed: int = 0) -> Asked:
    """`count` random pictures, each with `length` random tokens. Raises UserError when the vocabulary is not the model's."""
    config, draw, words = graphs.config, np.random.default_rng(seed), open_words(graphs)
    size = config.vision.image_size
    pictures = draw.standard_normal((count, 3, size, size), np.float32)
    ids = draw.integers(0, config.text.vocab, (count, length), dtype=np.int64)
    if isinstance(config, BlipCaptionConfig):
        ids[:, 0] = words.start_ids[0]  # [DEC], which transformers puts there whatever is given
    return Asked(pictures, ids, words.start_ids[0], words.stop_ids, words.pad_id)


def write_words(steps: Steps, asked: Asked, beams: int, new: int) -> np.ndarray:
    """(N, W) int64: the best `new` words after each prompt, by the rule of transformers; nothing ends a text before."""
    counted = np.full((len(asked.ids), 1), -1, np.int64)
    options = Decoding(max_length=1 + new, min_length=1 + new, num_beams=beams, rule=TRANSFORMERS)
    return np.array([texts[0].ids for texts in generate(steps, counted, asked.stop_ids, options)], np.int64)
