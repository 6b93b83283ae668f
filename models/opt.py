"""OPT: words left to right, with learnt positions.

Axes as in models/generation_spec.py; N rows. Parameter names are those of the published files (facebook/opt-*: OPTForCausalLM),
so they load unmapped.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from models.caches import Before, Bias, Present, attend_both, grow, last_word, split_heads
from models.llm_config import OptConfig
from models.stored import in_float32

OFFSET = 2  # rows of the position table that no word uses


class Attention(nn.Module):
    def __init__(self, cfg: OptConfig) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.scale = (cfg.width // cfg.heads) ** -0.5
        self.q_proj = nn.Linear(cfg.width, cfg.width)
        self.k_proj = nn.Linear(cfg.width, cfg.width)
        self.v_proj = nn.Linear(cfg.width, cfg.width)
        self.out_proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x: Tensor, bias: Bias, past: Before) -> tuple[Tensor, Present]:
        kept = grow(past.own, (split_heads(self.k_proj(x), self.heads), split_heads(self.v_proj(x), self.heads)))
        q = split_heads(self.q_proj(x) * self.scale, self.heads)  # (N, H, L, K)
        return self.out_proj(attend_both(q, kept.all, bias, past.shared)), kept


class Layer(nn.Module):
    """Norms stand before attention and feed-forward layer, in opt-350m after the sums."""

    def __init__(self, cfg: OptConfig) -> None:
        super().__init__()
        self.pre_norm = cfg.pre_norm
        self.self_attn = Attention(cfg)
        self.self_attn_layer_norm = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.fc1 = nn.Linear(cfg.width, cfg.ffn)
        self.fc2 = nn.Linear(cfg.ffn, cfg.width)
        self.final_layer_norm = nn.LayerNorm(cfg.width, eps=cfg.eps)

    def forward(self, x: Tensor, bias: Bias, past: Before) -> tuple[Tensor, Present]:
        before, between, after = self.norms()
        y, kept = self.self_attn(before(x), bias, past)
        x = between(x + y)
        inner = self.final_layer_norm(x) if self.pre_norm else x
        x = after(x + self.fc2(F.relu(self.fc1(inner))))
        return x, kept

    def norms(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Before attention, after its sum, after the last sum."""
        none = nn.Identity()
        return (
            (self.self_attn_layer_norm, none, none) if self.pre_norm else (none, self.self_attn_layer_norm, self.final_layer_norm)
        )


class Decoder(nn.Module):
    def __init__(self, cfg: OptConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab, cfg.embed)
        self.embed_positions = nn.Embedding(cfg.positions + OFFSET, cfg.width)
        same = cfg.embed == cfg.width
        self.project_in = nn.Identity() if same else nn.Linear(cfg.embed, cfg.width, bias=False)
        self.project_out = nn.Identity() if same else nn.Linear(cfg.width, cfg.embed, bias=False)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.depth))
        self.final_layer_norm = nn.LayerNorm(cfg.width, eps=cfg.eps) if cfg.pre_norm else nn.Identity()


class OptModel(nn.Module):
    def __init__(self, cfg: OptConfig) -> None:
        super().__init__()
        self.decoder = Decoder(cfg)


class Opt(nn.Module):
    """The logits are products with the word embeddings: there is no head of its own."""

    def __init__(self, cfg: OptConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = OptModel(cfg)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (N, L) to word embeddings (N, L, E)."""
        words: Tensor = self.model.decoder.embed_tokens(ids)
        return words

    def forward(self, embeds: Tensor, positions: Tensor, bias: Bias, past: Sequence[Before]) -> tuple[Tensor, list[Present]]:
        """Embeddings (N, L, E) at `positions` (N, L), after `past`, to logits (N, V) of the word that follows the last of them,
        and the keys and values of every layer; `bias` hides what must not be seen."""
        x, present = self.states(embeds, positions, bias, past)
        return self.logits(last_word(x)), present

    def states(self, embeds: Tensor, positions: Tensor, bias: Bias, past: Sequence[Before]) -> tuple[Tensor, list[Present]]:
        """What the last layer makes of these words (N, L, D), and the keys and values of every layer."""
        decoder = self.model.decoder
        x = decoder.project_in(embeds) + decoder.embed_positions(positions + OFFSET)  # (N, L, D)
        present = []
        for layer, before in zip(decoder.layers, past, strict=True):
            x, kept = layer(x, bias, before)
            present.append(kept)
        return x, present

    def logits(self, states: Tensor) -> Tensor:
        """States (..., D) to logits (..., V) of the words that follow."""
        decoder = self.model.decoder
        y = decoder.project_out(decoder.final_layer_norm(states))  # (..., E)
        return F.linear(y, in_float32(decoder.embed_tokens.weight))
