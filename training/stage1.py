"""The losses of BLIP-2's first stage. Definitions: salesforce/LAVIS models/blip2_models/blip2_qformer.py (`forward`).

Axes: B pictures of one batch and a caption of each, N of all processes, Q queries, E embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.blip2 import Blip2Stage1
from preprocess.text import CaptionTokenizer
from training import losses
from training.data import led_by
from training.gather import gathered, own_rows, processes
from training.step import Batch, Step, image_feat

SMOOTHING = 0.1  # share of the contrastive target that goes to all alike


def losses_of(model: Blip2Stage1, tokenizer: CaptionTokenizer, batch: Batch, generator: torch.Generator, matching: bool) -> Step:
    """The losses of a batch; hard negatives are drawn by `generator`. Without `matching` ITM is left out, and 0.

    The similarity is that of the query that fits the caption best. In a batch that holds no wrong picture or caption (a
    batch of one) a pair is its own negative, as in mindformers (models/blip2/blip2_qformer.py); LAVIS fails there.
    """
    feat = image_feat(model, batch.image)  # (B, T, D)
    kv = model.keys_values(feat)
    tokens = model.tokens(len(batch.pictures))
    query_embed, past = model.Qformer.bert.read_image(tokens, kv)  # (B, Q, D)
    image_embed, text_embed = model.image_embed(query_embed), model.text_embed(batch.ids, batch.mask)  # (B, Q, E), (B, E)
    to_text = best_query(image_embed, gathered(text_embed)) / model.temp  # (B, N)
    to_image = to_text.t() if processes() == 1 else best_query(gathered(image_embed), text_embed).t() / model.temp  # (B, N)
    same = batch.pictures[:, None] == gathered(batch.pictures)[None]  # (B, N)
    itm = torch.zeros((), device=same.device)
    if matching:
        own = torch.arange(same.shape[1], device=same.device)[own_rows(len(same))]  # (B,) numbers among the N
        wrong_image, wrong_text = (losses.hard_negatives(sims, same, generator) for sims in (to_image, to_text))
        wrong_image, wrong_text = (torch.where(wrong < 0, own, wrong) for wrong in (wrong_image, wrong_text))
        itm = losses.itm(model, led_by(batch.ids, tokenizer.encode_id), batch.mask, feat, kv, wrong_image, wrong_text)
    logits = model.Qformer.next_word_logits(led_by(batch.ids, tokenizer.decode_id), batch.mask, past)  # (B, L, vocab)
    itc = losses.itc(to_text, to_image, losses.shared_targets(same), SMOOTHING)
    return Step(itc, itm, losses.lm(logits, batch.ids, batch.mask))


def best_query(image_embed: Tensor, text_embed: Tensor) -> Tensor:
    """Pictures (I, Q, E) and captions (J, E) to similarities (I, J): that of the query which fits the caption best."""
    return torch.einsum("iqe,je->ijq", image_embed, text_embed).amax(dim=2)
