"""LLaMA, and Vicuna and Baichuan-7B, which are built like it.

Axes as in models/generation_spec.py; N rows. Parameter names are those of the published files (LlamaForCausalLM), so they load
unmapped; Baichuan packs queries, keys and values in one matrix, which loading takes apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.caches import Before, Bias, Present, attend_both, grow, last_word, split_heads
from models.llm_config import LlamaConfig

Turns = tuple[Tensor, Tensor]  # cosine and sine of every position, (N, 1, L, K / 2)


class RmsNorm(nn.Module):
    """Divides by the root of the mean square; nothing is subtracted or added."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # In the order of operations that ONNX Runtime turns into one kernel.
        return x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, cfg: LlamaConfig) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.scale = (cfg.width // cfg.heads) ** -0.5
        self.q_proj = nn.Linear(cfg.width, cfg.width, bias=False)
        self.k_proj = nn.Linear(cfg.width, cfg.width, bias=False)
        self.v_proj = nn.Linear(cfg.width, cfg.width, bias=False)
        self.o_proj = nn.Linear(cfg.width, cfg.width, bias=False)

    def forward(self, x: Tensor, turns: Turns, bias: Bias, past: Before) -> tuple[Tensor, Present]:
        k = rotated(split_heads(self.k_proj(x), self.heads), turns)
        kept = grow(past.own, (k, split_heads(self.v_proj(x), self.heads)))
        q = rotated(split_heads(self.q_proj(x), self.heads), turns) * self.scale  # (N, H, L, K)
        return self.o_proj(attend_both(q, kept.all, bias, past.shared)), kept


class Mlp(nn.Module):
    def __init__(self, cfg: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.width, cfg.ffn, bias=False)
        self.up_proj = nn.Linear(cfg.width, cfg.ffn, bias=False)
        self.down_proj = nn.Linear(cfg.ffn, cfg.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Layer(nn.Module):
    def __init__(self, cfg: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(cfg)
        self.mlp = Mlp(cfg)
        self.input_layernorm = RmsNorm(cfg.width, cfg.eps)
        self.post_attention_layernorm = RmsNorm(cfg.width, cfg.eps)

    def forward(self, x: Tensor, turns: Turns, bias: Bias, past: Before) -> tuple[Tensor, Present]:
        y, kept = self.self_attn(self.input_layernorm(x), turns, bias, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class LlamaModel(nn.Module):
    def __init__(self, cfg: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab, cfg.width)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.depth))
        self.norm = RmsNorm(cfg.width, cfg.eps)


class Llama(nn.Module):
    def __init__(self, cfg: LlamaConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = LlamaModel(cfg)
        self.lm_head = nn.Linear(cfg.width, cfg.vocab, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (N, L) to word embeddings (N, L, D)."""
        words: Tensor = self.model.embed_tokens(ids)
        return words

    def forward(self, embeds: Tensor, positions: Tensor, bias: Bias, past: Sequence[Before]) -> tuple[Tensor, list[Present]]:
        """As of Opt: embeddings (N, L, D) to logits (N, V) of the word that follows, and the keys and values of every layer."""
        x, present = self.states(embeds, positions, bias, past)
        return self.logits(last_word(x)), present

    def states(self, embeds: Tensor, positions: Tensor, bias: Bias, past: Sequence[Before]) -> tuple[Tensor, list[Present]]:
        """What the last layer makes of these words (N, L, D), and the keys and values of every layer."""
        x, present = embeds, []
        turns = turns_of(positions, self.cfg)
        for layer, before in zip(self.model.layers, past, strict=True):
            x, kept = layer(x, turns, bias, before)
            present.append(kept)
        return x, present

    def logits(self, states: Tensor) -> Tensor:
        """States (..., D) to logits (..., V) of the words that follow."""
        found: Tensor = self.lm_head(self.model.norm(states))
        return found


def turns_of(positions: Tensor, cfg: LlamaConfig) -> Turns:
    """By how much a position (N, L) turns each pair of numbers: the n-th of K / 2 by position / theta^(2n / K)."""
    half = cfg.width // cfg.heads // 2
    slower = [cfg.theta ** (-n / half) for n in range(half)]
    angles = positions[:, None, :, None].to(torch.float32) * torch.tensor(slower, device=positions.device)  # (N, 1, L, K / 2)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, turns: Turns) -> Tensor:
    """Turn the pairs (x_n, x_{n + K/2}) of x (N, H, L, K): the order in which LLaMA's weights were published for transformers."""
    half = x.shape[3] // 2
    first, second = x[..., :half], x[..., half:]  # (N, H, L, K / 2)
    cos, sin = turns
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=3)
