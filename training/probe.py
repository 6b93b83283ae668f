"""The losses of a stage-1 model on a few pictures with their captions, without training: is this checkpoint what it should be?

mindformers' `model(image, ids, return_tuple=True)` says the same (docs/model_cards/blip2.md). B pairs, L tokens, S picture size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from models.blip2 import Blip2Stage1
from models.config import Blip2Config
from models.errors import Misuse
from preprocess.images import read_image
from preprocess.text import CaptionTokenizer, pre_caption
from training.data import normalised
from training.stage1 import losses_of
from training.step import Batch, Step

LENGTH = 32  # tokens of a caption in stage-1 training (salesforce/LAVIS configs/models/blip2/blip2_pretrain.yaml)


def pairs(cfg: Blip2Config, tokenizer: CaptionTokenizer, images: Sequence[Path], texts: Sequence[str]) -> Batch:
    """Pictures and the caption of each, as training would draw them; one pair will do. A picture that is named twice has
    two captions.

    Raises Misuse when a caption is missing or has no words, UserError when a picture cannot be read.
    """
    if not images or len(images) != len(texts):
        raise Misuse(f"There are {len(images)} pictures and {len(texts)} texts. Give each --image its --text, in the same order.")
    captions = [pre_caption(text, cfg.protocol.max_words) for text in texts]
    ids, mask = tokenizer.encode(captions, min(LENGTH, cfg.qformer.positions))  # (B, L)
    lengths = mask.sum(axis=1)
    for text, length in zip(texts, lengths, strict=True):
        if length == 2:  # [CLS] and [SEP]
            raise Misuse(f"The text {text!r} has no words. Write a caption.")
    pixels = [read_image(path, cfg.vision.image_size, cfg.protocol.interpolation) for path in images]  # B of (3, S, S)
    files = [path.resolve() for path in images]
    pictures = np.array([files.index(file) for file in files])
    ids, mask = ids[:, : lengths.max()], mask[:, : lengths.max()]
    return Batch(*map(torch.from_numpy, (pictures, normalised(np.stack(pixels), cfg), ids, mask)))


@torch.inference_mode()
def probe(model: Blip2Stage1, tokenizer: CaptionTokenizer, batch: Batch, seed: int) -> Step:
    """ITC, ITM and LM of a batch, as training computes them. `seed` draws the wrong pictures and captions of ITM.

    A single pair has nothing to be told apart from: its ITC is 0, and for ITM it is its own wrong pair, as in mindformers.
    """
    return losses_of(model, tokenizer, batch, torch.Generator().manual_seed(seed), True)
