"""The image encoder of BLIP, and EVA's of BLIP-2: a pre-norm ViT. Pictures in, one vector per patch and one for the whole out.

Axes: B batch, T tokens (class token first), D width, H heads, K head width, S picture size, P patch size.
Parameter names are salesforce/BLIP's (models/vit.py) and salesforce/LAVIS's (models/eva_vit.py), so their checkpoints load
unmapped. EVA's keys have no bias, and it has no norm at its end: BLIP-2 has its own, `ln_vision`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.bert import MASKED
from models.config import EVA, VisionConfig


class PatchEmbed(nn.Module):
    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, cfg.width, kernel_size=cfg.patch, stride=cfg.patch)

    def forward(self, image: Tensor) -> Tensor:
        x: Tensor = self.proj(image)  # (B, D, S / P, S / P)
        return x.flatten(2).transpose(1, 2)  # (B, T - 1, D)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` (B, T, D) looks at itself; `bias` (T,) is added to the scores of the tokens looked at."""
        # Written out instead of scaled_dot_product_attention: opset 13 has no such operator, and a scale folded into
        # the weights was once mistaken for another pattern by a graph fusion (silently wrong numbers).
        # Three products instead of one: taking a packed result apart costs ONNX Runtime 4 % of the whole ViT.
        q, k, v = (self.project(x, part) for part in range(3))  # (B, H, T, K)
        scores = (q * self.scale) @ k.transpose(2, 3)  # (B, H, T, T)
        weights = (scores if bias is None else scores + bias).softmax(dim=3)  # (B, H, T, T)
        y: Tensor = self.proj((weights @ v).transpose(1, 2).flatten(2))  # (B, T, D)
        return y

    def project(self, x: Tensor, part: int) -> Tensor:
        """Queries (part 0), keys (1) or values (2)."""
        width = self.width
        rows = slice(part * width, (part + 1) * width)  # a slice of a weight is folded into a weight, a chunk is not
        y = F.linear(x, self.qkv.weight[rows], self.bias(part, rows))  # (B, T, D)
        return y.reshape(x.shape[0], -1, self.heads, width // self.heads).transpose(1, 2)  # (B, H, T, K)

    def bias(self, part: int, rows: slice) -> Tensor | None:
        return self.qkv.bias[rows]


class EvaAttention(Attention):
    """Queries and values have a bias, keys have none."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def bias(self, part: int, rows: slice) -> Tensor | None:
        return (self.q_bias, None, self.v_bias)[part]


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))  # (B, T, D)
        return y


class Block(nn.Module):
    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.attn = (EvaAttention if cfg.kind == EVA else Attention)(cfg.width, cfg.heads)
        self.norm2 = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.mlp = Mlp(cfg.width, cfg.mlp)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), bias)
        x = x + self.mlp(self.norm2(x))
        return x  # (B, T, D)


class VisionTransformer(nn.Module):
    """Pictures (B, 3, S, S), normalised as the protocol says, to image_feat (B, T, D)."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(cfg)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, cfg.tokens, cfg.width))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.Identity() if cfg.kind == EVA else nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.spare = 0  # tokens that are added, and that nothing looks at: see export/rewrites.py

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embed(image)  # (B, T - 1, D)
        cls = self.cls_token.expand(patches.shape[0], -1, -1)  # (B, 1, D)
        x = torch.cat([cls, patches], dim=1) + self.pos_embed  # (B, T, D)
        tokens, bias = x.shape[1], None
        if self.spare:
            x = F.pad(x, (0, 0, 0, self.spare))  # (B, T + spare, D)
            bias = MASKED * (torch.arange(tokens + self.spare, device=x.device) >= tokens).to(x.dtype)  # (T + spare,)
        for block in self.blocks:
            x = block(x, bias)
        y: Tensor = self.norm(x[:, :tokens] if self.spare else x)  # (B, T, D)
        return y
