"""FlanT5: an encoder that reads the picture and the prompt, a decoder that looks at what was read.

Axes as in models/generation_spec.py; W is width of a head. Parameter names are those of the published files
(T5ForConditionalGeneration), so they load unmapped. Scores are not scaled; positions are relative, as a number for each head
and distance that is added to the scores, the same in every layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.bert import KeysValues, bias_of
from models.caches import Present, attend, bias_after, grow, last_word
from models.llama import RmsNorm
from models.llm_config import GELU, T5Config


class Attention(nn.Module):
    """`relative_attention_bias` is there in the first layer alone, and used in all."""

    def __init__(self, cfg: T5Config, relative: bool = False) -> None:
        super().__init__()
        self.heads, self.head_width = cfg.heads, cfg.head_width
        inner = cfg.heads * cfg.head_width
        self.q = nn.Linear(cfg.width, inner, bias=False)
        self.k = nn.Linear(cfg.width, inner, bias=False)
        self.v = nn.Linear(cfg.width, inner, bias=False)
        self.o = nn.Linear(inner, cfg.width, bias=False)
        if relative:
            self.relative_attention_bias = nn.Embedding(cfg.buckets, cfg.heads)

    def keys_values(self, source: Tensor) -> KeysValues:
        return self.split(self.k(source)), self.split(self.v(source))

    def forward(self, x: Tensor, kv: KeysValues, bias: Tensor | None) -> Tensor:
        y: Tensor = self.o(attend(self.split(self.q(x)), kv, bias))
        return y

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, self.heads, self.head_width).transpose(1, 2)  # (B, H, L, W)


class SelfAttention(nn.Module):
    def __init__(self, cfg: T5Config, relative: bool) -> None:
        super().__init__()
        self.SelfAttention = Attention(cfg, relative)
        self.layer_norm = RmsNorm(cfg.width, cfg.eps)


class CrossAttention(nn.Module):
    def __init__(self, cfg: T5Config) -> None:
        super().__init__()
        self.EncDecAttention = Attention(cfg)
        self.layer_norm = RmsNorm(cfg.width, cfg.eps)


class Gated(nn.Module):
    def __init__(self, cfg: T5Config) -> None:
        super().__init__()
        self.approximate = "none" if cfg.activation == GELU else "tanh"
        self.wi_0 = nn.Linear(cfg.width, cfg.ffn, bias=False)
        self.wi_1 = nn.Linear(cfg.width, cfg.ffn, bias=False)
        self.wo = nn.Linear(cfg.ffn, cfg.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.wo(F.gelu(self.wi_0(x), approximate=self.approximate) * self.wi_1(x))
        return y


class FeedForward(nn.Module):
    def __init__(self, cfg: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = Gated(cfg)
        self.layer_norm = RmsNorm(cfg.width, cfg.eps)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.DenseReluDense(self.layer_norm(x))
        return y


class Block(nn.Module):
    """Self-attention, in the decoder cross-attention, the feed-forward layer: `layer.0`, `layer.1`, ..."""

    def __init__(self, cfg: T5Config, relative: bool, crossing: bool) -> None:
        super().__init__()
        parts: list[nn.Module] = [SelfAttention(cfg, relative)]
        if crossing:
            parts.append(CrossAttention(cfg))
        self.layer = nn.ModuleList([*parts, FeedForward(cfg)])

    def own(self) -> tuple[Attention, RmsNorm]:
        part = cast(SelfAttention, self.layer[0])
        return part.SelfAttention, part.layer_norm

    def cross(self) -> tuple[Attention, RmsNorm]:
        part = cast(CrossAttention, self.layer[1])
        return part.EncDecAttention, part.layer_norm

    def feed_forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer[-1](x)
        return y


class Stack(nn.Module):
    """The layers of the encoder, or of the decoder."""

    def __init__(self, cfg: T5Config, decodes: bool) -> None:
        super().__init__()
        self.cfg, self.decodes = cfg, decodes
        self.block = nn.ModuleList(Block(cfg, relative=n == 0, crossing=decodes) for n in range(cfg.depth))
        self.final_layer_norm = RmsNorm(cfg.width, cfg.eps)

    def blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.block))

    def position_bias(self, keys: Tensor, queries: Tensor) -> Tensor:
        """What the places of keys (B, J) and queries (B, L) add to the scores: (B, H, L, J)."""
        buckets = bucket_of(keys[:, None, :] - queries[:, :, None], self.cfg, both_sides=not self.decodes)  # (B, L, J)
        table: Tensor = self.blocks()[0].own()[0].relative_attention_bias(buckets)  # (B, L, J, H)
        return table.permute(0, 3, 1, 2)


class T5(nn.Module):
    def __init__(self, cfg: T5Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.shared = nn.Embedding(cfg.vocab, cfg.width)
        self.encoder = Stack(cfg, decodes=False)
        self.decoder = Stack(cfg, decodes=True)
        self.lm_head = nn.Linear(cfg.width, cfg.vocab, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, L) to word embeddings (B, L, D)."""
        words: Tensor = self.shared(ids)
        return words

    def encode(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Embeddings (B, L, D), of which `mask` (B, L) hides the padding, to states (B, L, D). Distances are counted over all
        places, padding too: where it stands matters, so it stands at the end, as in the original."""
        places = torch.arange(embeds.shape[1], device=embeds.device)[None]  # (1, L)
        bias = bias_of(mask) + self.encoder.position_bias(places, places)  # (B, H, L, L)
        x = embeds
        for block in self.encoder.blocks():
            attention, norm = block.own()
            y = norm(x)
            x = block.feed_forward(x + attention(y, attention.keys_values(y), bias))
        states: Tensor = self.encoder.final_layer_norm(x)
        return states

    def cross_kv(self, states: Tensor) -> list[KeysValues]:
        """States (B, C, D) to the keys and values of every layer of the decoder, (B, H, C, W) each."""
        return [block.cross()[0].keys_values(states) for block in self.decoder.blocks()]

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
        """As TextDecoder.next_words. A word in `past` stands at its number there: nothing before an answer is padding."""
        x, present = self.states(ids, positions, mask, past, past_mask, cross, cross_mask)
        return self.logits(last_word(x)).reshape(*ids.shape[:2], -1), present

    def states(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        past: Sequence[KeysValues],
        past_mask: Tensor,
        cross: Sequence[KeysValues],
        cross_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Present]]:
        """What the last layer makes of these words, (B * M, L, D), and the keys and values of every layer."""
        prompts, beams, length = ids.shape
        rows = prompts * beams
        before = torch.arange(past_mask.shape[2], device=ids.device)[None].expand(rows, -1)  # (B * M, P)
        own = positions.flatten(0, 1)  # (B * M, L)
        bias = bias_after(None if mask is None else mask.flatten(0, 1), length, past_mask.flatten(0, 1))  # (B * M, 1, L, P + L)
        bias = bias + self.decoder.position_bias(torch.cat([before, own], dim=1), own)  # (B * M, H, L, P + L)
        cross_bias = None if cross_mask is None else bias_of(cross_mask)  # (B, 1, 1, C)
        x, present = self.shared(ids.flatten(0, 1)), []
        for block, earlier, looked_at in zip(self.decoder.blocks(), past, cross, strict=True):
            attention, norm = block.own()
            y = norm(x)
            kept = grow(earlier, attention.keys_values(y))
            present.append(kept)
            x = x + attention(y, kept.all, bias)
            looking, norm = block.cross()
            # All sequences of a prompt in one product with what they look at.
            together = norm(x).reshape(prompts, beams * length, -1)  # (B, M * L, D)
            x = x + looking(together, looked_at, cross_bias).reshape(rows, length, -1)  # (B * M, L, D)
            x = block.feed_forward(x)
        return x, present

    def logits(self, states: Tensor) -> Tensor:
        """States (..., D) to logits (..., V) of the words that follow."""
        found: Tensor = self.lm_head(self.decoder.final_layer_norm(states))
        return found


def bucket_of(distance: Tensor, cfg: T5Config, both_sides: bool) -> Tensor:
    """Distances (key - query) to the numbers of their buckets: half of them for one distance each, the others wider by
    logarithm up to `farthest`. The encoder has as many again for keys that come later; the decoder sees none."""
    buckets = cfg.buckets // 2 if both_sides else cfg.buckets
    far = distance.abs() if both_sides else (-distance).clamp_min(0)
    exact = buckets // 2
    # In float32 and in this order, as the original: a bucket's edge may fall between two roundings.
    wide = torch.log(far.clamp_min(1).to(torch.float32) / exact) / math.log(cfg.farthest / exact) * (buckets - exact)
    wider = (exact + wide.to(torch.int64)).clamp_max(buckets - 1)
    found = torch.where(far < exact, far, wider)
    return found + (distance > 0).to(torch.int64) * buckets if both_sides else found
