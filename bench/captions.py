"""The captions that two implementations are compared on: real ones, or invented lengths when none are given.

How long captions are decides what keeping short ones short is worth, so real ones should be used. C captions, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.config import Config
from preprocess.annotations import read_annotations
from preprocess.text import CaptionTokenizer, pre_caption, with_first
from runtime.graphs import Graphs

# Tokens with [CLS] and [SEP], about as in COCO, for want of captions.
MEAN, SPREAD, SHORTEST = 12.0, 2.5, 8


@dataclass(frozen=True)
class Captions:
    """Captions as the graphs take them, padded to one length as the original pads them."""

    source: str  # what they are, for the reader of the numbers
    ids: np.ndarray  # (C, L) int64, [CLS] first
    mask: np.ndarray  # (C, L) int64
    encode_id: int

    @property
    def itm_ids(self) -> np.ndarray:
        """(C, L) int64, as the ITM graphs take them: of BLIP with [ENC] first; of BLIP-2 the same again."""
        return with_first(self.ids, self.encode_id)

    def first(self, count: int) -> Captions:
        """The first `count`: a random sample, since the captions are in random order."""
        return Captions(self.source, self.ids[:count], self.mask[:count], self.encode_id)

    def describe(self) -> str:
        """How many, of what, how long: a ratio of speeds depends on it."""
        lengths = self.mask.sum(axis=1)
        return f"{len(lengths)} {self.source}, {lengths.mean():.1f} tokens on average, {lengths.max()} at most"


def choose_captions(graphs: Graphs, annotations: Path | None, count: int, length: int, seed: int = 0) -> Captions:
    """`count` captions of at most `length` tokens, drawn at random from an annotation file; all of them when it has fewer.
    Raises UserError, see preprocess.annotations, when it cannot be read."""
    return captions_of(graphs.config, CaptionTokenizer.load(graphs.tokenizer, graphs.config), annotations, count, length, seed)


def captions_of(
    config: Config, tokenizer: CaptionTokenizer, annotations: Path | None, count: int, length: int, seed: int = 0
) -> Captions:
    """The same for a model that is no graphs yet."""
    draw = np.random.default_rng(seed)
    if annotations is None:
        return _invented(config, tokenizer, count, length, draw)
    texts = read_annotations(annotations).captions
    chosen = draw.permutation(len(texts))[:count]
    cleaned = [pre_caption(texts[n], config.protocol.max_words) for n in chosen]
    ids, mask = tokenizer.encode(cleaned, length)
    return Captions(f"captions of {annotations.name}", ids, mask, tokenizer.encode_id)


def _invented(config: Config, tokenizer: CaptionTokenizer, count: int, longest: int, draw: np.random.Generator) -> Captions:
    lengths = np.rint(draw.normal(MEAN, SPREAD, (count, 1))).clip(min(SHORTEST, longest), longest)  # (C, 1)
    mask = (np.arange(longest) < lengths).astype(np.int64)  # (C, L)
    ids = draw.integers(0, config.text.vocab, mask.shape, dtype=np.int64)
    ids[mask == 0] = tokenizer.pad_id
    return Captions("random captions of invented length (give real ones with --captions)", ids, mask, tokenizer.encode_id)
