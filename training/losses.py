"""The losses: contrastive (ITC), matching (ITM), and that of the next word (LM).

Definitions: salesforce/BLIP models/blip_pretrain.py, salesforce/LAVIS models/blip2_models/blip2_qformer.py. The contrast is
within the batch, over all processes.
Axes: B captions with their pictures in this process, N in all, L text tokens, E embedding, V words; `kv` holds keys and values
of pictures per layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.bert import KeysValues
from models.blip2 import Retrieval
from models.spec import MATCH
from training.gather import gathered, gathered_texts, mean_over_all, own_rows, processes

IGNORED = -100  # label of a position that is not learnt
SMOOTHING = 0.1
FLOOR = 1e-4  # what every negative gets on top of its probability


def itc(to_text: Tensor, to_image: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of pictures to captions and of captions to pictures, averaged.

    Args:
        to_text: (B, N) similarities of pictures to captions divided by the temperature.
        to_image: (B, N) those of captions to pictures.
        targets: (B, N) what share of the target each of the N has; rows sum to 1.
        smoothing: share of each target that goes to all N alike.
    """
    return (
        F.cross_entropy(to_text, targets, label_smoothing=smoothing)
        + F.cross_entropy(to_image, targets, label_smoothing=smoothing)
    ) / 2


def shared_targets(same: Tensor) -> Tensor:
    """(B, N) bool, true where a caption was written for a picture, to targets: such pairs share theirs."""
    targets = same.float()
    return targets / targets.sum(1, keepdim=True)


def hard_negatives(sims: Tensor, same: Tensor, generator: torch.Generator) -> Tensor:
    """For each row of `sims` (B, N) one column, drawn the likelier the more similar; -1 where all columns are `same`.

    The draw of a row is that of one process with all N rows: each process draws for all, and takes its own.
    """
    weights = (sims.detach().float().softmax(dim=1) + FLOOR).masked_fill(same, 0.0)  # (B, N)
    none = ~(weights.sum(dim=1) > 0)  # a batch of one picture, or similarities that are no numbers
    # Of exponential waits divided by their rates the shortest is drawn: as torch.multinomial does it.
    waits = torch.empty(sims.shape[1], sims.shape[1]).exponential_(generator=generator)  # (N, N)
    drawn = (weights / waits[own_rows(len(sims))].to(weights.device)).argmax(dim=1)  # (B,)
    return drawn.masked_fill(none, -1)


def itm(
    model: Retrieval,
    ids: Tensor,
    mask: Tensor,
    image_feat: Tensor,
    kv: Sequence[KeysValues],
    negative_image: Tensor,
    negative_text: Tensor,
) -> Tensor:
    """Cross-entropy of: each caption with its picture, with a wrong picture, and each picture with a wrong caption.

    Args:
        ids, mask: (B, L), [ENC] first.
        image_feat, kv: of the B pictures, and their keys and values.
        negative_image: (B,) for each caption a picture of the N that is not its own, or -1 for none.
        negative_text: (B,) for each picture a caption of the N that is not its own, or -1 for none.
    """
    own = torch.arange(len(ids), device=ids.device)
    with_image, with_text = negative_image >= 0, negative_text >= 0
    all_ids, all_mask = gathered_texts(ids), gathered_texts(mask)  # (N, L)
    first = own + own_rows(len(ids)).start  # numbers of the own rows among the N
    text = torch.cat([first, first[with_image], negative_text[with_text]])  # (P,), at most 3 B
    if processes() == 1:
        image = torch.cat([own, negative_image[with_image], own[with_text]])  # (P,)
        looked_at = [(k[image], v[image]) for k, v in kv]
    else:  # what is needed of other processes is their features; keys and values are several times as large
        wrong = model.keys_values(gathered(image_feat)[negative_image[with_image]])
        looked_at = [
            (torch.cat([k, a, k[with_text]]), torch.cat([v, b, v[with_text]])) for (k, v), (a, b) in zip(kv, wrong, strict=True)
        ]
    logits = model.itm_logits(all_ids[text], all_mask[text], looked_at)  # (P, 2)
    labels = torch.full_like(text, 1 - MATCH)
    labels[: len(own)] = MATCH
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    return mean_over_all(total, torch.tensor(float(len(labels)), device=total.device))


def lm(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of each next word, with label smoothing; `logits` (B, L, V) were computed from `ids` and `mask` (B, L)
    with [DEC] first."""
    labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORED)
    return next_word(logits[:, :-1], labels, SMOOTHING)


def next_word(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits (B, L, V) over the `labels` (B, L) that are not IGNORED, of all processes."""
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum"
    )
    return mean_over_all(total, (labels != IGNORED).sum())
