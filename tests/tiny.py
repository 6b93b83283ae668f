"""The smallest model in which no two sizes are equal, so that no axis can stand for another, and weights for any model."""

from __future__ import annotations

import torch
from torch import nn

from models.blip import BlipRetrieval
from models.config import BlipConfig, Protocol, TextConfig, VisionConfig

TINY = BlipConfig(
    VisionConfig(image_size=32, patch=8, width=48, depth=3, heads=6, mlp=112),  # 17 tokens, heads of width 8
    TextConfig(vocab=60, width=40, depth=2, heads=4, ffn=72, positions=36),  # heads of width 10
    embed=20,
    protocol=Protocol(max_length=35, k_test=5),
)


def fill(model: nn.Module, seed: int, std: float) -> None:
    """Give every parameter random values: norms around 1, all others around 0, so that none can be left out unnoticed."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        nn.init.trunc_normal_(parameter.data, std=std, generator=random)
        if "norm" in name.lower() and name.endswith("weight"):
            parameter.data += 1.0


def random_model(config: BlipConfig = TINY, seed: int = 0, std: float = 0.2) -> BlipRetrieval:
    """A model for inference. At the small widths here `std` 0.2 makes attention as uneven as in a trained model."""
    model = BlipRetrieval(config)
    fill(model, seed, std)
    return model.eval().requires_grad_(False)
