"""CLIP's image encoder as BLIP-2 has it: without its last block and without its last norm.

Axes as in models/vit.py. Parameter names are salesforce/LAVIS's (models/clip_vit.py).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import VisionConfig


class Attention(nn.Module):
    """torch's MultiheadAttention, written out: opset 13 has no scaled_dot_product_attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.project(x, part) for part in range(3))  # (B, H, T, K)
        weights = ((q * self.scale) @ k.transpose(2, 3)).softmax(dim=3)  # (B, H, T, T)
        y: Tensor = self.out_proj((weights @ v).transpose(1, 2).flatten(2))  # (B, T, D)
        return y

    def project(self, x: Tensor, part: int) -> Tensor:
        """Queries (part 0), keys (1) or values (2)."""
        width = x.shape[2]
        rows = slice(part * width, (part + 1) * width)
        y = F.linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])  # (B, T, D)
        return y.reshape(x.shape[0], -1, self.heads, width // self.heads).transpose(1, 2)  # (B, H, T, K)


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


class Block(nn.Module):
    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.attn = Attention(cfg.width, cfg.heads)
        self.ln_1 = nn.LayerNorm(cfg.width, eps=cfg.eps)
        layers = [("c_fc", nn.Linear(cfg.width, cfg.mlp)), ("gelu", QuickGelu()), ("c_proj", nn.Linear(cfg.mlp, cfg.width))]
        self.mlp = nn.Sequential(OrderedDict[str, nn.Module](layers))
        self.ln_2 = nn.LayerNorm(cfg.width, eps=cfg.eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x  # (B, T, D)


class Blocks(nn.Module):
    """Holds the blocks under the name that the checkpoints use: `transformer.resblocks.N`."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class ClipVisionTransformer(nn.Module):
    """Pictures (B, 3, S, S), normalised as the protocol says, to image features (B, T, D) before BLIP-2's norm."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, cfg.width, kernel_size=cfg.patch, stride=cfg.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(cfg.width))
        self.positional_embedding = nn.Parameter(torch.zeros(cfg.tokens, cfg.width))
        self.ln_pre = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.transformer = Blocks(cfg)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.conv1(image).flatten(2).transpose(1, 2)  # (B, T - 1, D)
        cls = self.class_embedding.expand(patches.shape[0], 1, -1)  # (B, 1, D)
        x = torch.cat([cls, patches], dim=1) + self.positional_embedding  # (B, T, D)
        y: Tensor = self.transformer(self.ln_pre(x))  # (B, T, D)
        return y
