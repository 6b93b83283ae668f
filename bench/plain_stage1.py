"""The losses of BLIP-2's first stage the plain way, which training/stage1.py is compared with: one pass per loss.

The image encoder sees a batch once, and gradients go back through it though nothing there is learnt. Captions are padded to one
length. The Q-Former reads the pictures for ITC, once more for each of ITM's 3 B pairs, and again for LM; nothing of one pass is
used in another. (LAVIS is less plain: there LM uses what ITC's pass has read, as here training/stage1.py does, and a frozen
encoder has no gradients.) Axes as in training/stage1.py.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from models.blip2 import Blip2Stage1
from models.spec import MATCH
from preprocess.text import CaptionTokenizer
from training import losses
from training.data import led_by
from training.stage1 import SMOOTHING, best_query
from training.step import Batch, Step


def plain_losses(model: Blip2Stage1, tokenizer: CaptionTokenizer, batch: Batch, generator: torch.Generator) -> Step:
    """Those of `training.stage1.losses_of`, from the same draws. Each picture of the batch is another one."""
    feat = model.image_feat(batch.image)  # (B, T, D)
    image_embed = model.image_embed(model.query_embed(feat))  # (B, Q, E)
    text_embed = model.text_feat_proj(model.text_feat(batch.ids, batch.mask)[:, :1])[:, 0]  # (B, E)
    to_text = best_query(image_embed, text_embed) / model.temp  # (B, B)
    same = batch.pictures[:, None] == batch.pictures[None]  # (B, B)
    itc = losses.itc(to_text, to_text.t(), losses.shared_targets(same), SMOOTHING)

    wrong_image, wrong_text = (losses.hard_negatives(sims, same, generator) for sims in (to_text.t(), to_text))  # (B,)
    ids = led_by(batch.ids, tokenizer.encode_id)
    pairs = torch.cat([ids, ids, ids[wrong_text]]), torch.cat([batch.mask, batch.mask, batch.mask[wrong_text]])  # (3 B, L)
    logits = model.itm_logits(*pairs, model.keys_values(torch.cat([feat, feat[wrong_image], feat])))  # (3 B, 2)
    labels = torch.full((len(logits),), 1 - MATCH)
    labels[: len(ids)] = MATCH
    itm = F.cross_entropy(logits, labels)

    _, past = model.Qformer.bert.read_image(model.tokens(len(ids)), model.keys_values(feat))
    words = model.Qformer.next_word_logits(led_by(batch.ids, tokenizer.decode_id), batch.mask, past)  # (B, L, vocab)
    return Step(itc, itm, losses.lm(words, batch.ids, batch.mask))
