"""What one step of training is given and what it gives: a batch of captioned pictures, and its three losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from models.blip import BlipPretrain
from models.blip2 import Blip2Stage1
from models.config import Config
from preprocess.text import CaptionTokenizer
from training.data import CaptionedPictures, normalised, shifted

Trainable = BlipPretrain | Blip2Stage1
Model = TypeVar("Model", BlipPretrain, Blip2Stage1)


@dataclass(frozen=True)
class Batch:
    """B pictures and a caption of each."""

    pictures: Tensor  # (B,) int64: their numbers in the set
    image: Tensor  # (B, 3, S, S) float32
    ids: Tensor  # (B, L) int64, [CLS] first
    mask: Tensor  # (B, L) int64


@dataclass(frozen=True)
class Step:
    """The three losses of one batch."""

    itc: Tensor
    itm: Tensor
    lm: Tensor

    @property
    def total(self) -> Tensor:
        return self.itc + self.itm + self.lm


# The losses of a batch: model, tokenizer, batch, what draws the hard negatives, and whether there is a matching loss yet.
LossesOf = Callable[[Model, CaptionTokenizer, Batch, torch.Generator, bool], Step]


def draw(data: CaptionedPictures, pictures: np.ndarray, shift: int, rng: np.random.Generator, cfg: Config) -> Batch:
    """The pictures of these numbers (B,), and one caption of each."""
    pixels = shifted(data.pixels[pictures], shift, rng)
    ids, mask = data.captions(rng.integers(data.first[pictures], data.first[pictures + 1]))
    return Batch(*(torch.from_numpy(x) for x in (pictures, normalised(pixels, cfg), ids, mask)))
