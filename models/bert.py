"""The text encoder: BERT that can read a picture through cross-attention in every layer.

Axes: B batch, L text tokens, T image tokens, D width, H heads, K head width, P pictures (B, or 1 shared by the batch).
Parameter names are salesforce/BLIP's (models/med.py), so its checkpoints load unmapped. The masks are built without
Range or GatherND and with a finite -1e4, which survives fp16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import TextConfig

MASKED = -10000.0  # what the original adds to the score of a padded position

KeysValues = tuple[Tensor, Tensor]  # (P, H, T, K) each


def bias_of(mask: Tensor, causal: bool = False) -> Tensor:
    """What is added to the scores of keys under `mask` (B, L): (B, 1, 1, L); with `causal` (B, 1, L, L), by query too."""
    bias = (1.0 - mask.to(torch.float32))[:, None, None, :] * MASKED  # (B, 1, 1, L)
    if causal:
        places = torch.arange(mask.shape[1], device=mask.device)  # (L,)
        # Compared, because before opset 14 there is no operator for a triangle.
        later = (places > places[:, None]).to(torch.float32)  # (L, L)
        bias = bias + later * MASKED  # (B, 1, L, L)
    return bias


class Projections(nn.Module):
    """Query, key and value of one attention; keys and values may come from another width."""

    def __init__(self, width: int, source_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)


class ResidualOutput(nn.Module):
    """Linear, add, norm: how every BERT sub-layer ends."""

    def __init__(self, in_width: int, width: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(in_width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)

    def forward(self, y: Tensor, residual: Tensor) -> Tensor:
        x: Tensor = self.LayerNorm(self.dense(y) + residual)
        return x


class Attention(nn.Module):
    """`attention` (text to text) and `crossattention` (text to picture) of one layer."""

    def __init__(self, cfg: TextConfig, source_width: int) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.scale = (cfg.width // cfg.heads) ** -0.5
        self.dropout = 0.0  # share of the weights that is left out while it learns: see training/dropout.py
        self.self = Projections(cfg.width, source_width)
        self.output = ResidualOutput(cfg.width, cfg.width, cfg.eps)

    def keys_values(self, source: Tensor) -> KeysValues:
        """`source` (P, T, source width) to what the queries look up."""
        return self.split(self.self.key(source)), self.split(self.self.value(source))

    def forward(self, x: Tensor, kv: KeysValues, bias: Tensor | None = None, shared: bool = False) -> Tensor:
        """`x` (B, L, D) looks up `kv`; with `shared` all B captions look up the one picture in `kv`."""
        k, v = kv  # (P, H, T, K)
        q = self.self.query(x) * self.scale  # (B, L, D)
        if shared:
            # All captions in the rows of one product per head: B times fewer, B times larger products.
            q = q.flatten(0, 1).unsqueeze(0)  # (1, B * L, D)
        scores = self.split(q) @ k.transpose(2, 3)  # (P, H, L, T)
        if bias is not None:
            scores = scores + bias
        weights = scores.softmax(dim=3)  # (P, H, L, T)
        if self.dropout and self.training:
            weights = F.dropout(weights, self.dropout)
        y = (weights @ v).transpose(1, 2).flatten(2)  # (P, L, D)
        if shared:
            y = y.reshape(x.shape)  # (B, L, D)
        out: Tensor = self.output(y, x)
        return out

    def split(self, x: Tensor) -> Tensor:
        # reshape, because opset 11 has no unflatten.
        return x.reshape(x.shape[0], -1, self.heads, x.shape[2] // self.heads).transpose(1, 2)  # (B, H, L, K)


class Intermediate(nn.Module):
    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(cfg.width, cfg.ffn)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))  # (B, L, ffn)


class Layer(nn.Module):
    def __init__(self, cfg: TextConfig, image_width: int) -> None:
        super().__init__()
        self.attention = Attention(cfg, cfg.width)
        self.crossattention = Attention(cfg, image_width)
        self.intermediate = Intermediate(cfg)
        self.output = ResidualOutput(cfg.ffn, cfg.width, cfg.eps)

    def forward(
        self, x: Tensor, bias: Tensor, kv: KeysValues | None, shared: bool, first_only: bool, image_bias: Tensor | None
    ) -> Tensor:
        own = self.attention.keys_values(x)
        # When only the first position is read after this layer, only that one is computed.
        query = x[:, :1] if first_only else x  # (B, 1 or L, D)
        x = self.attention(query, own, bias)
        if kv is not None:
            x = self.crossattention(x, kv, image_bias, shared)
        y: Tensor = self.output(self.intermediate(x), x)
        return y


class Embeddings(nn.Module):
    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(cfg.vocab, cfg.width)
        self.position_embeddings = nn.Embedding(cfg.positions, cfg.width)
        self.LayerNorm = nn.LayerNorm(cfg.width, eps=cfg.eps)

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """ids (B, L), at `positions` (B, L) or from the first one on, to (B, L, D)."""
        table = self.position_embeddings
        places = table.weight[: ids.shape[1]] if positions is None else table(positions)
        x: Tensor = self.word_embeddings(ids) + places  # (B, L, D)
        y: Tensor = self.LayerNorm(x)
        return y


class Layers(nn.Module):
    """Holds the layers under the name that the checkpoints use: `encoder.layer.N`."""

    def __init__(self, cfg: TextConfig, image_width: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(cfg, image_width) for _ in range(cfg.depth))

    def __iter__(self) -> Iterator[Layer]:
        return iter(cast("list[Layer]", self.layer))


class BertEncoder(nn.Module):
    """Captions to hidden states, alone or looking at a picture."""

    def __init__(self, cfg: TextConfig, image_width: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(cfg)
        self.encoder = Layers(cfg, image_width)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        image: Sequence[KeysValues] | None = None,
        image_mask: Tensor | None = None,
        *,
        shared: bool = False,
        causal: bool = False,
        first_only: bool = False,
    ) -> Tensor:
        """Hidden states (B, L, D), or (B, 1, D) with `first_only`.

        Args:
            ids, mask: (B, L) int64; mask is 1 on text and 0 on padding.
            image: keys and values per layer as `image_kv` gives them; None leaves cross-attention out.
            image_mask: (P, T) int64, 0 where what is looked at is padding, as that of a question; None when nothing is.
            shared: the keys and values are of one picture (P = 1), which all captions look at.
            causal: a position sees only what stands before it (the decoder).
            first_only: the last layer computes only position 0.
        """
        bias = bias_of(mask, causal)
        image_bias = None if image_mask is None else bias_of(image_mask)  # (P, 1, 1, T)
        x = self.embeddings(ids)
        last = len(self.encoder.layer) - 1
        for n, layer in enumerate(self.encoder):
            x = layer(x, bias, None if image is None else image[n], shared, first_only and n == last, image_bias)
        out: Tensor = x
        return out

    def image_kv(self, image_feat: Tensor) -> list[KeysValues]:
        """Keys and values of every cross-attention layer for pictures `image_feat` (P, T, D)."""
        return [layer.crossattention.keys_values(image_feat) for layer in self.encoder]
