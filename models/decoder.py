"""The text decoder: the same BERT read left to right, with a head over the vocabulary.

Parameter names are salesforce/BLIP's (`text_decoder.bert.*`, `text_decoder.cls.predictions.*`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.bert import MASKED, BertEncoder, KeysValues
from models.caches import Present, bias_after, grow, last_word
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
        self.cfg = cfg
        self.bert = BertEncoder(cfg, image_width)
        self.cls = Head(cfg)

    def forward(self, ids: Tensor, mask: Tensor, kv: Sequence[KeysValues], kv_mask: Tensor | None = None) -> Tensor:
        """ids, mask (B, L) int64, [DEC] first, and the keys and values of their pictures per layer, to logits (B, L, vocab).

        What stands at position n is said of the word at n + 1. `kv_mask` (B, T) is 0 where the keys are of padding.
        """
        x = self.bert(ids, mask, kv, kv_mask, causal=True)  # (B, L, D)
        logits: Tensor = self.cls.predictions(x, self.bert.embeddings.word_embeddings.weight)
        return logits

    def next_words(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        past: Sequence[KeysValues],
        past_mask: Tensor,
        cross: Sequence[KeysValues],
        cross_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Present]]:
        """The word after `ids`, which follow those in `past`: logits (B, M, V) and the keys and values of every layer.

        B prompts, M sequences of each, L new words, P words before them, C positions that all M sequences look at.

        Args:
            ids, positions, mask: (B, M, L) int64; the last word of each row is what the logits follow. Without `mask` no new
                word is padding.
            past: keys and values (B * M, H, P, K) of every layer.
            past_mask: (B, M, P) int64, 0 where `past` is padding or not yet filled.
            cross: keys and values (B, H, C, K) of every layer: of the picture, or of the question that was read beside it.
            cross_mask: (B, C) int64, 0 on the padding of the question; None when nothing is padding.
        """
        prompts, beams, length = ids.shape
        rows = prompts * beams
        bias = bias_after(None if mask is None else mask.flatten(0, 1), length, past_mask.flatten(0, 1))  # (B * M, 1, L, P + L)
        cross_bias = None if cross_mask is None else (1.0 - cross_mask.to(torch.float32))[:, None, None, :] * MASKED
        x = self.bert.embeddings(ids.flatten(0, 1), positions.flatten(0, 1))  # (B * M, L, D)
        present = []
        for layer, before, looked_at in zip(self.bert.encoder, past, cross, strict=True):
            kept = grow(before, layer.attention.keys_values(x))
            present.append(kept)
            x = layer.attention(x, kept.all, bias)
            # All sequences of a prompt in one product with what they look at.
            together = x.reshape(prompts, beams * length, -1)  # (B, M * L, D)
            x = layer.crossattention(together, looked_at, cross_bias).reshape(rows, length, -1)  # (B * M, L, D)
            x = layer.output(layer.intermediate(x), x)
        # In rows, because a graph then multiplies by the table of words as it is, and does not hold it twice.
        logits: Tensor = self.cls.predictions(last_word(x), self.bert.embeddings.word_embeddings.weight)  # (B * M, V)
        return logits.reshape(prompts, beams, -1), present
