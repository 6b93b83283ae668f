"""The losses of BLIP's pre-training, without its momentum model and its queue of past embeddings.

Definitions: salesforce/BLIP models/blip_pretrain.py.
"""

from __future__ import annotations

import torch

from models.blip import BlipPretrain
from preprocess.text import CaptionTokenizer
from training import losses
from training.data import led_by
from training.gather import gathered, processes
from training.step import Batch, Step


def losses_of(model: BlipPretrain, tokenizer: CaptionTokenizer, batch: Batch, generator: torch.Generator, matching: bool) -> Step:
    """The losses of a batch; hard negatives are drawn by `generator`. Without `matching` ITM is left out, and 0."""
    feat = model.image_feat(batch.image)  # (B, T, D)
    image_embed, text_embed = model.image_embed(feat), model.text_embed(batch.ids, batch.mask)  # (B, E)
    to_text = image_embed @ gathered(text_embed).t() / model.temp  # (B, N)
    to_image = to_text.t() if processes() == 1 else text_embed @ gathered(image_embed).t() / model.temp  # (B, N)
    same = batch.pictures[:, None] == gathered(batch.pictures)[None]  # (B, N)
    kv = model.keys_values(feat)
    itm = torch.zeros(())
    if matching:
        negative_image = losses.hard_negatives(to_image, same, generator)
        negative_text = losses.hard_negatives(to_text, same, generator)
        itm = losses.itm(model, led_by(batch.ids, tokenizer.encode_id), batch.mask, feat, kv, negative_image, negative_text)
    logits = model.text_decoder(led_by(batch.ids, tokenizer.decode_id), batch.mask, kv)  # (B, L, vocab)
    itc = losses.itc(to_text, to_image, losses.shared_targets(same))
    return Step(itc, itm, losses.lm(logits, batch.ids, batch.mask))
