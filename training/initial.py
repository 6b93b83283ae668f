"""Weights to start from. The published models start from BERT and a trained ViT; a small model starts from nothing.

Matrices are scaled by their widths, which BERT's fixed 0.02 is too small for here. Positions start as sines of about the
size that a patch's colours have, so that both are seen from the first step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.blip import BlipPretrain
from models.vit import PatchEmbed

WORDS = 0.02  # standard deviation of the embeddings, as BERT's
POSITIONS = 0.7  # amplitude of the sines
WAVELENGTH = 100.0  # ratio of the longest to the shortest


def initialise(model: BlipPretrain, seed: int) -> None:
    """Fill the model at random, the same for the same seed."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, PatchEmbed):
            nn.init.xavier_uniform_(module.proj.weight.data.flatten(1))  # a view
            assert module.proj.bias is not None
            nn.init.zeros_(module.proj.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=WORDS)
    vision = model.cfg.vision
    with torch.no_grad():
        nn.init.normal_(model.visual_encoder.cls_token, std=WORDS)
        model.visual_encoder.pos_embed.zero_()
        model.visual_encoder.pos_embed[0, 1:] = POSITIONS * sines(vision.image_size // vision.patch, vision.width)


def sines(side: int, width: int) -> Tensor:
    """(side * side, width): a quarter each for sine and cosine of the column and of the row; what is left over is zero."""
    rates = WAVELENGTH ** -(torch.arange(width // 4) / max(width // 4, 1))  # (width / 4,)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [f(at.flatten()[:, None] * rates) for at in (column, row) for f in (torch.sin, torch.cos)]
    return torch.nn.functional.pad(torch.cat(waves, dim=1), (0, width % 4))  # (side * side, width)
