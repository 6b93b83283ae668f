"""Captioned pictures in memory, to measure recall on.

N pictures of side S as uint8, M captions of L tokens. Decoded and tokenised once, as blip-pre does it.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.config import Config
from preprocess.annotations import read_annotations
from preprocess.images import normalise, read_image
from preprocess.text import CaptionTokenizer, pre_caption
from preprocess.workers import in_order


@dataclass(frozen=True)
class CaptionedPictures:
    """Pictures and their captions, which stand in the order of their pictures."""

    pixels: np.ndarray  # (N, 3, S, S) uint8
    ids: np.ndarray  # (M, L) int64, [CLS] first
    mask: np.ndarray  # (M, L) int64, 1 where ids is not padding
    first: np.ndarray  # (N + 1,) int64: captions first[n] to first[n + 1] - 1 are of picture n

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def image_of_text(self) -> np.ndarray:
        """(M,) int64: the picture each caption was written for."""
        return np.repeat(np.arange(len(self)), np.diff(self.first))

    def captions(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids and mask (B, l) of these captions, cut to the longest of them."""
        mask = self.mask[texts]
        length = int(mask.sum(1).max())
        return self.ids[texts, :length], mask[:, :length]


def read_pictures(
    annotations: Path, split: str, images: Path, tokenizer: CaptionTokenizer, config: Config, workers: int
) -> CaptionedPictures:
    """Read the whole set into memory. `split` chooses from Karpathy's own file, which holds several.

    Raises UserError when a file is missing, broken or malformed.
    """
    found = read_annotations(annotations, split)
    order = np.argsort(found.image_of_text, kind="stable")
    texts = [pre_caption(found.captions[t], config.protocol.max_words) for t in order]
    ids, mask = tokenizer.encode(texts, config.protocol.max_length)  # (M, L)
    size = config.vision.image_size
    pixels = np.empty((len(found.images), 3, size, size), np.uint8)
    work = partial(read_image, size=size, interpolation=config.protocol.interpolation)
    with closing(in_order(work, [images / name for name in found.images], workers)) as pictures:
        for number, picture in enumerate(tqdm(pictures, "pictures", len(pixels), unit=" pictures", disable=None)):
            pixels[number] = picture
    counts = np.bincount(found.image_of_text, minlength=len(pixels))
    return CaptionedPictures(pixels, ids, mask, np.concatenate([[0], np.cumsum(counts)]))


def normalised(pixels: np.ndarray, config: Config) -> np.ndarray:
    """(B, 3, S, S) uint8 to the float32 that the model reads."""
    return normalise(pixels, config.protocol.mean, config.protocol.std)


def led_by(ids: Tensor, token: int) -> Tensor:
    """`ids` (B, L) with another first token, such as [ENC] where a caption looks at a picture."""
    return torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], dim=1)  # (B, L)
