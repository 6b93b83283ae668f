"""The three losses of BLIP and of BLIP-2's first stage: contrastive (ITC), matching (ITM) and captioning (LM).

Definitions: salesforce/BLIP models/blip_pretrain.py, salesforce/LAVIS models/blip2_models/blip2_qformer.py. The contrast
is within the batch.
Axes: B captions with their pictures, L text tokens, E embedding; `kv` holds the keys and values of B pictures per layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.bert import KeysValues
from models.blip2 import Retrieval
from models.spec import MATCH

IGNORED = -100  # label of a padded position
SMOOTHING = 0.1
FLOOR = 1e-4  # what every negative gets on top of its probability


def itc(sims: Tensor, same: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of pictures to captions and of captions to pictures, averaged.

    Args:
        sims: (B, B) similarities divided by the temperature, pictures by captions.
        same: (B, B) bool, true where the caption was written for the picture. Such pairs share the target.
        smoothing: share of each target that goes to all B alike.
    """
    targets = same.float()
    to_text = F.cross_entropy(sims, targets / targets.sum(1, keepdim=True), label_smoothing=smoothing)
    to_image = F.cross_entropy(sims.t(), targets.t() / targets.t().sum(1, keepdim=True), label_smoothing=smoothing)
    return (to_text + to_image) / 2


def hard_negatives(sims: Tensor, same: Tensor, generator: torch.Generator) -> Tensor:
    """For each row of `sims` (B, B) one column, drawn the likelier the more similar; -1 where all columns are `same`."""
    weights = (sims.detach().float().softmax(dim=1) + FLOOR).masked_fill(same, 0.0)  # (B, B)
    none = ~(weights.sum(dim=1) > 0)  # a batch of one picture, or similarities that are no numbers
    weights[none] = 1.0  # multinomial wants something to draw from
    drawn = torch.multinomial(weights, 1, generator=generator)[:, 0]  # (B,)
    return drawn.masked_fill(none, -1)


def itm(
    model: Retrieval, ids: Tensor, mask: Tensor, kv: Sequence[KeysValues], negative_image: Tensor, negative_text: Tensor
) -> Tensor:
    """Cross-entropy of: each caption with its picture, with a wrong picture, and each picture with a wrong caption.

    Args:
        ids, mask: (B, L), [ENC] first.
        negative_image: (B,) for each caption a picture that is not its own, or -1 for none.
        negative_text: (B,) for each picture a caption that is not its own, or -1 for none.
    """
    own = torch.arange(len(ids), device=ids.device)
    with_image, with_text = negative_image >= 0, negative_text >= 0
    text = torch.cat([own, own[with_image], negative_text[with_text]])  # (N,), at most 3 B
    image = torch.cat([own, negative_image[with_image], own[with_text]])  # (N,)
    logits = model.itm_logits(ids[text], mask[text], [(k[image], v[image]) for k, v in kv])  # (N, 2)
    labels = torch.full_like(text, 1 - MATCH)
    labels[: len(own)] = MATCH
    return F.cross_entropy(logits.float(), labels)


def lm(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of each next word, with label smoothing; `logits` (B, L, vocab) were computed from `ids` and `mask`
    (B, L) with [DEC] first."""
    labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORED)
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, label_smoothing=SMOOTHING
    )
