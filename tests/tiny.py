"""The smallest model in which no two sizes are equal, so that no axis can stand for another, and weights for any model."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from models.blip import BlipRetrieval
from models.blip2 import Blip2Retrieval, Blip2Stage1
from models.config import CLIP, EVA, Blip2Config, BlipConfig, Protocol, QformerConfig, TextConfig, VisionConfig

TINY = BlipConfig(
    VisionConfig(image_size=32, patch=8, width=48, depth=3, heads=6, mlp=112),  # 17 tokens, heads of width 8
    TextConfig(vocab=60, width=40, depth=2, heads=4, ffn=72, positions=36),  # heads of width 10
    embed=20,
    protocol=Protocol(max_length=35, k_test=5),
)

TINY2 = Blip2Config(
    VisionConfig(image_size=32, patch=8, width=48, depth=3, heads=6, mlp=112, kind=EVA),  # 17 tokens, heads of width 8
    QformerConfig(vocab=59, width=40, depth=4, heads=4, ffn=72, positions=36, queries=6),  # layers 0 and 2 look at pictures
    embed=20,
    protocol=Protocol(max_words=50, max_length=35, encode_token="[CLS]", k_test=5),
)
TINY_CLIP = dataclasses.replace(TINY2, vision=dataclasses.replace(TINY2.vision, kind=CLIP, eps=1e-5))


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


def random_blip2(config: Blip2Config = TINY2, seed: int = 0, std: float = 0.2) -> Blip2Retrieval:
    """The same of BLIP-2's first stage."""
    model = Blip2Retrieval(config)
    fill(model, seed, std)
    return model.eval().requires_grad_(False)


def random_stage1(config: Blip2Config = TINY2, seed: int = 0, std: float = 0.2) -> Blip2Stage1:
    """The same with the head over the vocabulary and the temperature, as it is trained."""
    model = Blip2Stage1(config)
    fill(model, seed, std)
    with torch.no_grad():
        model.temp.fill_(0.07)
    return model.eval().requires_grad_(False)
