"""The Q-Former: BERT whose learnt queries read a picture, whose words are BERT's, and whose self-attention both share.

Axes: B batch, Q queries, L text tokens, T image tokens, D width, H heads, K head width, P pictures (B, or 1 shared).
Parameter names are salesforce/LAVIS's (models/blip2_models/Qformer.py), so its checkpoints load unmapped. Queries stand
before the text. They alone look at the picture, in every second layer, and have feed-forward layers of their own; a text
without queries goes through BERT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.bert import Attention, Embeddings, Intermediate, KeysValues, ResidualOutput, bias_of
from models.config import QformerConfig
from models.decoder import Head


class Layer(nn.Module):
    def __init__(self, cfg: QformerConfig, image_width: int, crossing: bool, words: bool) -> None:
        super().__init__()
        self.attention = Attention(cfg, cfg.width)
        if crossing:
            self.crossattention = Attention(cfg, image_width)
        if words:
            self.intermediate = Intermediate(cfg)
            self.output = ResidualOutput(cfg.ffn, cfg.width, cfg.eps)
        self.intermediate_query = Intermediate(cfg)
        self.output_query = ResidualOutput(cfg.ffn, cfg.width, cfg.eps)

    def read_picture(self, queries: Tensor, image: KeysValues | None, shared: bool = False) -> Tensor:
        """What follows self-attention for queries (B, Q, D); `image` is None in layers that do not look."""
        if image is not None:
            queries = self.crossattention(queries, image, shared=shared)
        y: Tensor = self.output_query(self.intermediate_query(queries), queries)
        return y

    def read_text(self, text: Tensor) -> Tensor:
        """What follows self-attention for text (B, L, D)."""
        y: Tensor = self.output(self.intermediate(text), text)
        return y


class Layers(nn.Module):
    """Holds the layers under the name that the checkpoints use: `encoder.layer.N`."""

    def __init__(self, cfg: QformerConfig, image_width: int, words: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(cfg, image_width, n in cfg.cross_layers, words) for n in range(cfg.depth))

    def __iter__(self) -> Iterator[Layer]:
        return iter(cast("list[Layer]", self.layer))


class QueryEmbeddings(nn.Module):
    """What is left of the embeddings without words."""

    def __init__(self, cfg: QformerConfig) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(cfg.width, eps=cfg.eps)


class QformerBert(nn.Module):
    """The three ways through the layers, and a fourth for the words that come next. Without `words`, as in the second stage,
    only the one for pictures alone."""

    def __init__(self, cfg: QformerConfig, image_width: int, words: bool = True) -> None:
        super().__init__()
        self.cfg = cfg
        self.embeddings = Embeddings(cfg) if words else QueryEmbeddings(cfg)
        self.encoder = Layers(cfg, image_width, words)

    def image_kv(self, image_feat: Tensor) -> list[KeysValues]:
        """Keys and values of every layer that looks at the picture, for pictures (P, T, image width)."""
        layers = [layer for n, layer in enumerate(self.encoder) if n in self.cfg.cross_layers]
        return [layer.crossattention.keys_values(image_feat) for layer in layers]

    def queries(self, tokens: Tensor) -> Tensor:
        """The query tokens (B, Q, D) as they enter the first layer: normalised like words, without a position."""
        y: Tensor = self.embeddings.LayerNorm(tokens)
        return y

    def read_image(self, tokens: Tensor, image: Sequence[KeysValues]) -> tuple[Tensor, list[KeysValues]]:
        """Queries alone with a picture: query tokens (B, Q, D) to their states (B, Q, D), and to the keys and values of
        their self-attention in every layer, which `next_words` continues."""
        x, past = self.queries(tokens), []
        for layer, looked_at in zip(self.encoder, self.by_layer(image), strict=True):
            own = layer.attention.keys_values(x)
            past.append(own)
            x = layer.read_picture(layer.attention(x, own), looked_at)
        return x, past

    def read_text(self, ids: Tensor, mask: Tensor, first_only: bool = False) -> Tensor:
        """Text alone: ids, mask (B, L) to states (B, L, D), or (B, 1, D) with `first_only`, when only [CLS] is read."""
        x, bias = self.embeddings(ids), bias_of(mask)
        last = self.cfg.depth - 1
        for n, layer in enumerate(self.encoder):
            own = layer.attention.keys_values(x)
            x = layer.read_text(layer.attention(x[:, :1] if first_only and n == last else x, own, bias))
        out: Tensor = x
        return out

    def read_both(self, tokens: Tensor, ids: Tensor, mask: Tensor, image: Sequence[KeysValues], shared: bool = False) -> Tensor:
        """Queries and text together, each seeing the other: the queries' states (B, Q, D).

        Args:
            tokens: (B, Q, D) query tokens, as many as the model has.
            ids, mask: (B, L) int64; mask is 1 on text and 0 on padding.
            image: keys and values as `image_kv` gives them; with `shared` of one picture (P = 1) that all B look at.
        """
        # A number, not tokens.shape[1]: traced that is a tensor, and what F.pad makes of it the simplifier folds wrongly.
        count = self.cfg.queries
        x = torch.cat([self.queries(tokens), self.embeddings(ids)], dim=1)  # (B, Q + L, D)
        bias = F.pad(bias_of(mask), (count, 0))  # (B, 1, 1, Q + L)
        last = self.cfg.depth - 1
        for n, (layer, looked_at) in enumerate(zip(self.encoder, self.by_layer(image), strict=True)):
            own = layer.attention.keys_values(x)
            # After the last layer only the queries are read: only they are computed.
            y = layer.attention(x[:, :count] if n == last else x, own, bias)  # (B, Q or Q + L, D)
            queries = layer.read_picture(y[:, :count], looked_at, shared)  # (B, Q, D)
            x = queries if n == last else torch.cat([queries, layer.read_text(y[:, count:])], dim=1)
        return x

    def next_words(self, ids: Tensor, mask: Tensor, past: Sequence[KeysValues]) -> Tensor:
        """Text that sees the queries and what stands before it: ids, mask (B, L) and `past` of `read_image` to states
        (B, L, D). The queries were computed without the text and do not see it."""
        x = self.embeddings(ids)
        bias = F.pad(bias_of(mask, causal=True), (past[0][0].shape[2], 0))  # (B, 1, L, Q + L)
        for layer, (past_k, past_v) in zip(self.encoder, past, strict=True):
            k, v = layer.attention.keys_values(x)
            own = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)  # (B, H, Q + L, K)
            x = layer.read_text(layer.attention(x, own, bias))
        out: Tensor = x
        return out

    def by_layer(self, image: Sequence[KeysValues]) -> list[KeysValues | None]:
        """Keys and values for every layer, None where it does not look at the picture."""
        pairs = iter(image)
        return [next(pairs) if n in self.cfg.cross_layers else None for n in range(self.cfg.depth)]


class QformerModel(nn.Module):
    """The layers, under the name that the checkpoints use: `Qformer.bert`."""

    def __init__(self, cfg: QformerConfig, image_width: int, words: bool = True) -> None:
        super().__init__()
        self.bert = QformerBert(cfg, image_width, words)


class QformerWithHead(QformerModel):
    """With the head over the vocabulary, `Qformer.cls`, whose output matrix is the word embedding."""

    def __init__(self, cfg: QformerConfig, image_width: int) -> None:
        super().__init__(cfg, image_width)
        self.cls = Head(cfg)

    def next_word_logits(self, ids: Tensor, mask: Tensor, past: Sequence[KeysValues]) -> Tensor:
        """ids, mask (B, L), [DEC] first, after the queries in `past`, to logits (B, L, vocab). What stands at position n
        is said of the word at n + 1."""
        x = self.bert.next_words(ids, mask, past)  # (B, L, D)
        logits: Tensor = self.cls.predictions(x, cast(Embeddings, self.bert.embeddings).word_embeddings.weight)
        return logits
