"""The text decoder: the same BERT read left to right, with a head over the vocabulary.

Parameter names are salesforce/BLIP's (`text_decoder.bert.*`, `text_decoder.cls.predictions.*`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.bert import BertEncoder, KeysValues
from models.config import TextConfig


class Transform(nn.Module):
    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(cfg.width, cfg.width)
        self.LayerNorm = nn.LayerNorm(cfg.width, eps=cfg.eps)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.LayerNorm(F.gelu(self.dense(x)))
        return y


class Predictions(nn.Module):
    """Hidden states to logits; the output matrix is the word embedding (tied by the owner)."""

    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        self.transform = Transform(cfg)
        self.bias = nn.Parameter(torch.zeros(cfg.vocab))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        return F.linear(self.transform(x), words, self.bias)  # (B, L, vocab)


class Head(nn.Module):
    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        self.predictions = Predictions(cfg)


class TextDecoder(nn.Module):
    """Captions and a picture to the logits of each next word."""

    def __init__(self, cfg: TextConfig, image_width: int) -> None:
        super().__init__()
        self.bert = BertEncoder(cfg, image_width)
        self.cls = Head(cfg)

    def forward(self, ids: Tensor, mask: Tensor, kv: Sequence[KeysValues]) -> Tensor:
        """ids, mask (B, L) int64, [DEC] first, and the keys and values of their pictures per layer, to logits (B, L, vocab).

        What stands at position n is said of the word at n + 1.
        """
        x = self.bert(ids, mask, kv, causal=True)  # (B, L, D)
        logits: Tensor = self.cls.predictions(x, self.bert.embeddings.word_embeddings.weight)
        return logits
