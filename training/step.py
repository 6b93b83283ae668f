"""What one step of training is given and what it gives: a batch of pictures, or what is kept of them, and the losses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from models.blip import BlipPretrain
from models.blip2 import Blip2Stage1
from models.blip2_llm import Blip2Llm

Trainable = BlipPretrain | Blip2Stage1


@dataclass(frozen=True)
class Batch:
    """B pictures and a caption of each."""

    pictures: Tensor  # (B,) int64: their numbers in the set
    image: Tensor  # (B, 3, S, S) float32, or features that are kept: (B, T, D) float32
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


def image_feat(model: Blip2Stage1 | Blip2Llm, image: Tensor) -> Tensor:
    """Pictures (B, 3, S, S), or what is kept of them (B, T, D), to the features that the Q-Former looks at (B, T, D)."""
    if image.dim() == 4:
        return model.image_feat(image)
    feat: Tensor = model.ln_vision(image)
    return feat
