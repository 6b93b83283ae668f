"""Keys and values of words that came before, and what a decoder may look at among them.

N rows, which are M sequences of each of B prompts; L new words, P words before them in their own row, C before these that all
sequences of a prompt share, H heads, K head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.bert import MASKED, KeysValues, bias_of


class Before(NamedTuple):
    """Keys and values of one layer before a step."""

    own: KeysValues | None = None  # (N, H, P, K)
    shared: KeysValues | None = None  # (B, H, C, K)


class Present(NamedTuple):
    """Keys and values of one layer after a step."""

    all: KeysValues  # (N, H, P + L, K): what the new words looked at, but for what is shared
    new: KeysValues  # (N, H, L, K): of the new words alone


class Bias(NamedTuple):
    """What is added to the scores of keys."""

    own: Tensor  # (N, 1, L, P + L)
    shared: Tensor | None = None  # (B, 1, 1, 1, C)


def grow(past: KeysValues | None, new: KeysValues) -> Present:
    """The new words' keys and values after those of the words before, if there are any."""
    if past is None:
        return Present(new, new)
    return Present((torch.cat([past[0], new[0]], dim=2), torch.cat([past[1], new[1]], dim=2)), new)


def bias_after(mask: Tensor | None, length: int, past_mask: Tensor | None) -> Tensor:
    """What is added to the scores of keys in a row: (N, 1, L, P + L).

    A new word sees the words before that `past_mask` (N, P) does not hide, the new ones up to itself that `mask` (N, L) does
    not hide; without `mask` none is hidden, without `past_mask` nothing came before.
    """
    if past_mask is None:
        assert mask is not None, "words that nothing came before need a mask"
        return bias_of(mask, causal=True)  # (N, 1, L, L)
    before = (1.0 - past_mask.to(torch.float32))[:, None, None, :] * MASKED  # (N, 1, 1, P)
    if mask is None:
        assert length == 1, "one word sees itself; more need a mask"
        return F.pad(before, (0, 1))  # (N, 1, 1, P + 1)
    now = bias_of(mask, causal=True)  # (N, 1, L, L)
    return torch.cat([before.expand(-1, -1, length, -1), now], dim=3)


def shared_bias(mask: Tensor) -> Tensor:
    """What is added to the scores of the keys that sequences share, of which `mask` (B, C) hides some: (B, 1, 1, 1, C)."""
    return bias_of(mask)[:, None]


def attend(q: Tensor, kept: KeysValues, bias: Tensor | None) -> Tensor:
    """Queries (N, H, L, K), scaled already, look up `kept`: (N, L, H * K)."""
    scores = q @ kept[0].transpose(2, 3)  # (N, H, L, P + L)
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(dim=3) @ kept[1]).transpose(1, 2).flatten(2)


def attend_both(q: Tensor, kept: KeysValues, bias: Bias, shared: KeysValues | None) -> Tensor:
    """Queries (N, H, L, K), scaled already, look up what the sequences of a prompt share and what is kept in their row:
    (N, L, H * K)."""
    if shared is None:
        return attend(q, kept, bias.own)
    assert bias.shared is not None
    # The rows of a prompt are an axis of their own here, so that none needs a copy of what they share.
    scores = q @ kept[0].transpose(2, 3) + bias.own  # (N, H, L, P + L)
    keys, rows = shared[0][:, None], q.reshape(shared[0].shape[0], -1, *q.shape[1:])  # (B, 1, H, C, K), (B, M, H, L, K)
    to_shared = rows @ keys.transpose(3, 4) + bias.shared  # (B, M, H, L, C)
    weights = torch.cat([to_shared.flatten(0, 1), scores], dim=3).softmax(dim=3)  # (N, H, L, C + P + L)
    count = keys.shape[3]
    of_shared = weights[..., :count].reshape(to_shared.shape) @ shared[1][:, None]  # (B, M, H, L, K)
    found = of_shared.flatten(0, 1) + weights[..., count:] @ kept[1]  # (N, H, L, K)
    return found.transpose(1, 2).flatten(2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, H * K) to (B, H, L, K)."""
    return x.reshape(x.shape[0], -1, heads, x.shape[2] // heads).transpose(1, 2)


def last_word(x: Tensor) -> Tensor:
    """(B, L, D) to (B, D)."""
    return x[:, -1]
