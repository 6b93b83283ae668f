"""The losses of BLIP's pre-training, and of its fine-tuning for retrieval, which has no captions to write.

Definitions: salesforce/BLIP models/blip_pretrain.py, models/blip_retrieval.py. There the contrast of each process is with its
own batch and the queue; here it is with the batches of all processes, so that many give what one would.
Axes: B pictures of one batch and a caption of each, N of all processes, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.blip import BlipPretrain, BlipRetrieval
from models.config import BlipConfig
from preprocess.text import CaptionTokenizer
from training import losses
from training.data import led_by
from training.gather import gathered, own_rows, processes
from training.momentum import Momentum
from training.step import Batch, Step


class BlipFinetune(BlipRetrieval):
    """BLIP for retrieval as it is fine-tuned: with the temperature."""

    def __init__(self, cfg: BlipConfig) -> None:
        super().__init__(cfg)
        self.temp = nn.Parameter(torch.tensor(0.07))


@dataclass(frozen=True)
class Slow:
    """The copies that follow slowly, and how much what they find counts at this step."""

    momentum: Momentum
    alpha: float


def losses_of(
    model: BlipPretrain | BlipFinetune,
    tokenizer: CaptionTokenizer,
    batch: Batch,
    generator: torch.Generator,
    matching: bool,
    slow: Slow | None = None,
    own_negatives: bool = False,
) -> Step:
    """The losses of a batch.

    Args:
        generator: draws the hard negatives.
        matching: without it ITM is left out, and 0.
        slow: without it the contrast is within the batch.
        own_negatives: ITM's wrong pairs are from this process (train_retrieval.py with negative_all_rank False).
    """
    feat = model.image_feat(batch.image)  # (B, T, D)
    image_embed, text_embed = model.image_embed(feat), model.text_embed(batch.ids, batch.mask)  # (B, E)
    same = batch.pictures[:, None] == gathered(batch.pictures)[None]  # (B, N)
    if slow is None:
        to_text, to_image = _within(model, image_embed, text_embed)
        itc = losses.itc(to_text, to_image, losses.shared_targets(same))
    else:
        to_text, to_image, itc = _with_momentum(model, batch, image_embed, text_embed, slow)
    if slow is not None and isinstance(model, BlipFinetune):  # there negatives are what the model itself takes for similar
        to_text, to_image = _within(model, image_embed, text_embed)
    kv = model.keys_values(feat)
    itm = torch.zeros((), device=same.device)
    if matching:
        refused = same
        if own_negatives:
            refused = same.clone()
            others = torch.ones(same.shape[1], dtype=torch.bool, device=same.device)
            others[own_rows(len(same))] = False
            refused[:, others] = True
        negative_image = losses.hard_negatives(to_image, refused, generator)
        negative_text = losses.hard_negatives(to_text, refused, generator)
        itm = losses.itm(model, led_by(batch.ids, tokenizer.encode_id), batch.mask, feat, kv, negative_image, negative_text)
    if not isinstance(model, BlipPretrain):
        return Step(itc, itm, torch.zeros((), device=same.device))
    logits = model.text_decoder(led_by(batch.ids, tokenizer.decode_id), batch.mask, kv)  # (B, L, vocab)
    return Step(itc, itm, losses.lm(logits, batch.ids, batch.mask))


def _within(model: BlipPretrain | BlipFinetune, image_embed: Tensor, text_embed: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities (B, N) within the batch, of pictures to captions and the other way."""
    to_text = image_embed @ gathered(text_embed).t() / model.temp
    return to_text, to_text.t() if processes() == 1 else text_embed @ gathered(image_embed).t() / model.temp


def _with_momentum(
    model: BlipPretrain | BlipFinetune, batch: Batch, image_embed: Tensor, text_embed: Tensor, slow: Slow
) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities (B, N) to what the copies made of this batch, of pictures to captions and the other way, and ITC with them
    and the queue. The copies have followed and the queue has moved on after it."""
    momentum = slow.momentum
    momentum.follow(model)
    slow_image, slow_text = momentum.embed(model, batch.image, batch.ids, batch.mask)
    found = momentum.contrast(image_embed, text_embed, slow_image, slow_text, model.temp, batch.pictures, slow.alpha)
    momentum.enqueue(slow_image, slow_text, batch.pictures)
    count = len(batch.pictures) * processes()
    return found.to_text[:, :count], found.to_image[:, :count], found.loss()
