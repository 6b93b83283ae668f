"""The losses of a stage-1 model on a few pictures with their captions, without training: is this checkpoint what it should be?

mindformers' `model(image, ids, return_tuple=True)` says the same (docs/model_cards/blip2.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from models.blip2 import Blip2Stage1
from models.errors import Misuse
from preprocess.images import normalise, read_image
from preprocess.text import CaptionTokenizer, pre_caption
from training.stage1 import losses_of
from training.step import Batch, Step

LENGTH = 32  # tokens of a caption in stage-1 training (salesforce/LAVIS configs/models/blip2/blip2_pretrain.yaml)


@torch.inference_mode()
def probe(model: Blip2Stage1, tokenizer: CaptionTokenizer, images: Sequence[Path], texts: Sequence[str], seed: int = 0) -> Step:
    """ITC, ITM and LM of these pairs, as training computes them of a batch.

    Args:
        images, texts: pictures and the caption of each; one pair will do. A picture that is named twice has two captions.
        seed: of the wrong pictures and captions that ITM draws.

    A single pair has nothing to be told apart from: its ITC is 0, and for ITM it is its own wrong pair, as in mindformers.
    Raises Misuse when a caption is missing or has no words, UserError when a picture cannot be read.
    """
    if not images or len(images) != len(texts):
        raise Misuse(
            f"There are {len(images)} pictures and {len(texts)} texts. Give each --image its own --text, in the same order."
        )
    cleaned = [pre_caption(text, model.cfg.protocol.max_words) for text in texts]
    if empty := [text for text, words in zip(texts, cleaned, strict=True) if not words]:
        raise Misuse(f"The text {empty[0]!r} has no words. Write a caption.")
    ids, mask = tokenizer.encode(cleaned, min(LENGTH, model.cfg.qformer.positions))  # (B, L)
    length = int(mask.sum(axis=1).max())
    vision, protocol = model.cfg.vision, model.cfg.protocol
    pixels = np.stack([read_image(path, vision.image_size, protocol.interpolation) for path in images])  # (B, 3, S, S)
    names = list(dict.fromkeys(images))
    batch = Batch(
        torch.tensor([names.index(path) for path in images]),
        torch.from_numpy(normalise(pixels, protocol.mean, protocol.std)),
        torch.from_numpy(ids[:, :length].copy()),
        torch.from_numpy(mask[:, :length].copy()),
    )
    return losses_of(model, tokenizer, batch, torch.Generator().manual_seed(seed), True)
