"""Keys and values of words that came before, and what a decoder may look at among them.

B rows, L new words, P words before them, H heads, K head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.bert import MASKED, KeysValues, bias_of


class Present(NamedTuple):
    """Keys and values of one layer after a step."""

    all: KeysValues  # (B, H, P + L, K): what the new words looked at
    new: KeysValues  # (B, H, L, K): of the new words alone


def grow(past: KeysValues | None, new: KeysValues) -> Present:
    """The new words' keys and values after those of the words before, if there are any."""
    if past is None:
        return Present(new, new)
    return Present((torch.cat([past[0], new[0]], dim=2), torch.cat([past[1], new[1]], dim=2)), new)


def bias_after(mask: Tensor | None, length: int, past_mask: Tensor | None) -> Tensor:
    """What is added to the scores of keys: (B, 1, L, P + L).

    A new word sees the words before that `past_mask` (B, P) does not hide, the new ones up to itself that `mask` (B, L) does
    not hide; without `mask` none is hidden, without `past_mask` nothing came before.
    """
    if past_mask is None:
        assert mask is not None, "words that nothing came before need a mask"
        return bias_of(mask, causal=True)  # (B, 1, L, L)
    before = (1.0 - past_mask.to(torch.float32))[:, None, None, :] * MASKED  # (B, 1, 1, P)
    if mask is None:
        assert length == 1, "one word sees itself; more need a mask"
        return F.pad(before, (0, 1))  # (B, 1, 1, P + 1)
    now = bias_of(mask, causal=True)  # (B, 1, L, L)
    return torch.cat([before.expand(-1, -1, length, -1), now], dim=3)


def attend(q: Tensor, kept: KeysValues, bias: Tensor | None) -> Tensor:
    """Queries (B, H, L, K), scaled already, look up `kept`: (B, L, H * K)."""
    scores = q @ kept[0].transpose(2, 3)  # (B, H, L, P + L)
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(dim=3) @ kept[1]).transpose(1, 2).flatten(2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, H * K) to (B, H, L, K)."""
    return x.reshape(x.shape[0], -1, heads, x.shape[2] // heads).transpose(1, 2)


def last_word(x: Tensor) -> Tensor:
    """(B, L, D) to (B, D)."""
    return x[:, -1]
