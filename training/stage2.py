"""The loss of BLIP-2's second stage: what a language model that stays as it is says after the queries.

Definitions: salesforce/LAVIS models/blip2_models/blip2_opt.py, blip2_t5.py (`forward`). mindformers' labels
(models/blip2/blip2_llm.py), one place to the left of these, count the same words.
Axes: B pictures of one batch with a text each, Q queries, L tokens of a text, A of an answer, E width of words, V words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.blip2_llm import Blip2Llm
from models.caches import Before, Bias, bias_after
from models.t5 import T5
from training.losses import IGNORED, next_word
from training.step import image_feat

START_OF_T5 = 0  # decoder_start_token_id of google/flan-t5-*: the padding


@dataclass(frozen=True)
class Told:
    """B pictures, and what is said of each: the words of one text, padded on the right."""

    image: Tensor  # (B, 3, S, S) float32, or features that are kept: (B, T, D) float32
    ids: Tensor  # (B, L) int64
    mask: Tensor  # (B, L) int64, 0 on padding
    learnt: Tensor  # (B, L) int64, 1 on the words that are to be foretold: not on the prompt


@dataclass(frozen=True)
class Answered:
    """B pictures with a prompt each, which an encoder reads, and what is to be answered."""

    image: Tensor  # (B, 3, S, S) float32, or features that are kept: (B, T, D) float32
    ids: Tensor  # (B, L) int64, the prompt
    mask: Tensor  # (B, L) int64
    answer: Tensor  # (B, A) int64
    answer_mask: Tensor  # (B, A) int64


def told_loss(model: Blip2Llm, batch: Told) -> Tensor:
    """Cross-entropy of each word that is learnt, after the queries and the words before it. Not of T5."""
    llm = model.llm_model
    assert not isinstance(llm, T5)
    prompt = model.llm_prompt(model.query_embed(image_feat(model, batch.image)))  # (B, Q, E)
    count = prompt.shape[1]
    embeds = torch.cat([prompt, llm.embed(batch.ids)], dim=1)  # (B, Q + L, E)
    mask = F.pad(batch.mask, (count, 0), value=1)  # (B, Q + L)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    states, _ = llm.states(embeds, positions, Bias(bias_after(mask, mask.shape[1], None)), [Before()] * llm.cfg.depth)
    # The last query foretells the first word, each word the next one.
    logits = llm.logits(states[:, count - 1 : -1])  # (B, L, V)
    return next_word(logits, batch.ids.masked_fill(batch.learnt * batch.mask == 0, IGNORED))


def answered_loss(model: Blip2Llm, batch: Answered) -> Tensor:
    """Of T5: cross-entropy of each word of the answer, after the queries and the prompt, which its encoder reads."""
    t5 = model.llm_model
    assert isinstance(t5, T5)
    prompt = model.llm_prompt(model.query_embed(image_feat(model, batch.image)))  # (B, Q, E)
    cross = t5.cross_kv(model.encode(prompt, batch.ids, batch.mask))
    seen = F.pad(batch.mask, (prompt.shape[1], 0), value=1)  # (B, Q + L)
    said = F.pad(batch.answer[:, :-1], (1, 0), value=START_OF_T5)[:, None]  # (B, 1, A), the word before each
    none = [(k[:, :, :0], v[:, :, :0]) for k, v in cross]
    places = torch.arange(said.shape[2], device=said.device).expand_as(said)
    states, _ = t5.states(said, places, torch.ones_like(said), none, said[:, :, :0], cross, seen)  # (B, A, D)
    return next_word(t5.logits(states), batch.answer.masked_fill(batch.answer_mask == 0, IGNORED))
