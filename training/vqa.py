"""The loss of BLIP's VQA. Definition: salesforce/BLIP models/blip_vqa.py (`forward`), models/med.py.

B questions about pictures, K answers to all of them together, L tokens of a question, A of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.vqa import BlipVqa
from training.gather import mean_over_all
from training.losses import IGNORED, SMOOTHING


@dataclass(frozen=True)
class Questions:
    """B questions, and how each was answered: every answer once, with the share of people who gave it."""

    image: Tensor  # (B, 3, S, S) float32
    ids: Tensor  # (B, L) int64, [ENC] first
    mask: Tensor  # (B, L) int64
    answer: Tensor  # (K, A) int64, [DEC] first, those of a question one after the other
    answer_mask: Tensor  # (K, A) int64
    question: Tensor  # (K,) int64: the question that each answers
    weight: Tensor  # (K,) float32


def answers_loss(model: BlipVqa, batch: Questions) -> Tensor:
    """Cross-entropy of the words of an answer, with label smoothing, added up over its words, times its weight, added up over
    the answers of a question; the mean over the questions."""
    states = model.question_states(batch.ids, batch.mask, model.image_feat(batch.image))  # (B, L, D)
    kv = [(k[batch.question], v[batch.question]) for k, v in model.cross_kv(states)]
    logits = model.text_decoder(batch.answer, batch.answer_mask, kv, batch.mask[batch.question])  # (K, A, V)
    labels = batch.answer[:, 1:].masked_fill(batch.answer_mask[:, 1:] == 0, IGNORED)  # (K, A - 1)
    words = F.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), labels, ignore_index=IGNORED, label_smoothing=SMOOTHING, reduction="none"
    )  # (K, A - 1)
    total = (words.sum(dim=1) * batch.weight).sum()
    return mean_over_all(total, torch.tensor(float(len(batch.ids)), device=total.device))
