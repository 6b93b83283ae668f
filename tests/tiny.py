"""The smallest model in which no two sizes are equal, so that no axis can stand for another, and weights for any model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models.blip import BlipPretrain, BlipRetrieval
from models.blip2 import Blip2Retrieval, Blip2Stage1
from models.blip2_llm import Blip2Llm
from models.captioner import BlipCaptioner
from models.config import (
    CLIP,
    EVA,
    Blip2Config,
    Blip2LlmConfig,
    BlipCaptionConfig,
    BlipConfig,
    BlipVqaConfig,
    GenerationConfig,
    Protocol,
    QformerConfig,
    TextConfig,
    VisionConfig,
)
from models.llm_config import LlamaConfig, LlmConfig, OptConfig, T5Config
from models.presets import BLIP_DEMO
from models.vqa import BlipVqa

DEMO = Path(__file__).parent.parent / "demo"

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

TINY_CAPTION = BlipCaptionConfig(TINY.vision, TextConfig(vocab=61, width=40, depth=2, heads=4, ffn=72, positions=44))
TINY_VQA = BlipVqaConfig(TINY.vision, TINY.text, TextConfig(vocab=60, width=40, depth=3, heads=5, ffn=68, positions=41))
TINY_OPT = OptConfig(vocab=70, width=56, depth=2, heads=7, ffn=76, embed=56, positions=80)
TINY_OPT_350M = OptConfig(vocab=70, width=56, depth=2, heads=7, ffn=76, embed=36, positions=80, pre_norm=False)
TINY_LLAMA = LlamaConfig(vocab=71, width=56, depth=2, heads=7, ffn=76, positions=80)
TINY_T5 = T5Config(vocab=72, width=56, depth=2, heads=6, head_width=8, ffn=76, buckets=8, farthest=20)


def tiny_llm(llm: LlmConfig) -> Blip2LlmConfig:
    """BLIP-2's second stage with `llm`."""
    return Blip2LlmConfig(TINY2.vision, TINY2.qformer, llm)


GENERATORS: dict[str, GenerationConfig] = {
    "caption": TINY_CAPTION,
    "vqa": TINY_VQA,
    "opt": tiny_llm(TINY_OPT),
    "opt-350m": tiny_llm(TINY_OPT_350M),
    "llama": tiny_llm(TINY_LLAMA),
    "t5": tiny_llm(TINY_T5),
}


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


def random_generator(config: GenerationConfig, seed: int = 0, std: float = 0.2) -> BlipCaptioner | BlipVqa | Blip2Llm:
    """A model that writes words."""
    model: BlipCaptioner | BlipVqa | Blip2Llm
    if isinstance(config, BlipCaptionConfig):
        model = BlipCaptioner(config)
    else:
        model = BlipVqa(config) if isinstance(config, BlipVqaConfig) else Blip2Llm(config)
    fill(model, seed, std)
    return model.eval().requires_grad_(False)


def save_weights(model: nn.Module, path: Path) -> None:
    """As blip-train writes them: each tensor once."""
    save_file({name: parameter.data for name, parameter in model.named_parameters()}, path)


def demo_blip() -> BlipPretrain:
    """What the demo's weights hold, all of it."""
    model = BlipPretrain(BLIP_DEMO)
    model.load_state_dict(load_file(DEMO / "weights.safetensors"), strict=False)  # what is shared stands there once
    return model
