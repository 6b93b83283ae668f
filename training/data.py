"""Captioned pictures in memory, to measure recall on.

N pictures of side S as uint8, M captions of L tokens. Decoded and tokenised once, as blip-pre does it.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.config import Config
from preprocess.images import normalise, read_image
from preprocess.text import CaptionTokenizer, pre_caption
from preprocess.workers import in_order
from training.gather import rank
from training.sources import Samples


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


def read_pictures(samples: Samples, tokenizer: CaptionTokenizer, config: Config, workers: int) -> CaptionedPictures:
    """Read the set, each picture with all its captions, into memory. Raises UserError when a picture is missing or broken."""
    files = [samples.pictures[number] for number in samples.picture]
    texts = [pre_caption(text, config.protocol.max_words) for captions in samples.texts for text in captions]
    ids, mask = tokenizer.encode(texts, config.protocol.max_length)  # (M, L)
    size = config.vision.image_size
    pixels = np.empty((len(files), 3, size, size), np.uint8)
    work = partial(read_image, size=size, interpolation=config.protocol.interpolation)
    with closing(in_order(work, files, workers)) as pictures:
        for number, picture in enumerate(
            tqdm(pictures, "pictures", len(pixels), unit=" pictures", disable=None if rank() == 0 else True)
        ):
            pixels[number] = picture
    return CaptionedPictures(pixels, ids, mask, np.cumsum([0, *map(len, samples.texts)]))


def normalised(pixels: np.ndarray, config: Config) -> np.ndarray:
    """(B, 3, S, S) uint8 to the float32 that the model reads."""
    return normalise(pixels, config.protocol.mean, config.protocol.std)


def led_by(ids: Tensor, token: int) -> Tensor:
    """`ids` (B, L) with another first token, such as [ENC] where a caption looks at a picture."""
    return torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], dim=1)  # (B, L)
