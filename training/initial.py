"""Weights to start from. The published models start from BERT and a trained ViT; a small model starts from nothing.

Matrices are scaled by their widths, which BERT's fixed 0.02 is too small for here. Positions start as sines of about the
size that a patch's colours have, so that both are seen from the first step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.blip2 import Blip2Stage1
from models.blip2_llm import Blip2Llm
from models.fit import Generator
from models.vit import PatchEmbed, VisionTransformer
from training.pretrain import BlipFinetune
from training.step import Trainable

WORDS = 0.02  # standard deviation of the embeddings, as BERT's
POSITIONS = 0.7  # amplitude of the sines
WAVELENGTH = 100.0  # ratio of the longest to the shortest


def initialise(model: Trainable | BlipFinetune | Generator, seed: int) -> None:
    """Fill the model at random, the same for the same seed."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:  # EVA's packed queries, keys and values keep theirs apart
                nn.init.zeros_(module.bias)
        elif isinstance(module, PatchEmbed):
            nn.init.xavier_uniform_(module.proj.weight.data.flatten(1))  # a view
            assert module.proj.bias is not None
            nn.init.zeros_(module.proj.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=WORDS)
    with torch.no_grad():
        if isinstance(model.visual_encoder, VisionTransformer):  # CLIP's is never trained from nothing
            vision = model.cfg.vision
            nn.init.normal_(model.visual_encoder.cls_token, std=WORDS)
            model.visual_encoder.pos_embed.zero_()
            model.visual_encoder.pos_embed[0, 1:] = POSITIONS * sines(vision.image_size // vision.patch, vision.width)
        if isinstance(model, Blip2Stage1 | Blip2Llm):
            nn.init.normal_(model.query_tokens, std=WORDS)
        if isinstance(model, Blip2Stage1):
            start_queries_as_text(model)


def start_queries_as_text(model: Blip2Stage1) -> None:
    """The queries' feed-forward layers start as copies of the text's (salesforce/LAVIS blip2_models/blip2_qformer.py)."""
    for layer in model.Qformer.bert.encoder:
        layer.intermediate_query.load_state_dict(layer.intermediate.state_dict())
        layer.output_query.load_state_dict(layer.output.state_dict())


def sines(side: int, width: int) -> Tensor:
    """(side * side, width): a quarter each for sine and cosine of the column and of the row; what is left over is zero."""
    rates = WAVELENGTH ** -(torch.arange(width // 4) / max(width // 4, 1))  # (width / 4,)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [f(at.flatten()[:, None] * rates) for at in (column, row) for f in (torch.sin, torch.cos)]
    return torch.nn.functional.pad(torch.cat(waves, dim=1), (0, width % 4))  # (side * side, width)
