"""Position embeddings for another picture size than they were learnt at."""

from __future__ import annotations

from math import isqrt
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from models.config import CLIP, VisionConfig
from models.errors import UserError
from models.weights_file import is_plain

NAMES = ("visual_encoder.pos_embed", "visual_encoder.positional_embedding")  # of all encoders but CLIP's, and of CLIP's


def fit_positions(positions: Tensor, vision: VisionConfig, path: Path) -> tuple[Tensor, tuple[int, int] | None]:
    """Position embeddings (1, T, D), or CLIP's (T, D), for the picture size of `vision`, and the sizes in pixels when they
    had another one.

    The class token's stays; the patches' are a picture that is resized, bicubic: with align_corners=False in salesforce/BLIP
    (models/vit.py) and for EVA (salesforce/LAVIS models/eva_vit.py), with True for CLIP (models/clip_vit.py). Raises
    UserError when they are of no square picture.
    """
    clip = vision.kind == CLIP
    if positions.dim() != (2 if clip else 3) or not is_plain(positions) or positions.shape[-2] == vision.tokens:
        return positions, None  # what else may be wrong is reported with all the others
    side, wanted = side_of(positions), vision.image_size // vision.patch
    if side is None:
        raise UserError(
            f"{path}: the position embeddings are for {positions.shape[-2]} tokens, expected a square of patches and the "
            f"class token ({vision.image_size} pixels have {vision.tokens}). Give a checkpoint of BLIP."
        )
    table = positions.to(torch.float32).reshape(-1, *positions.shape[-2:])  # (1, T, D)
    cls, patches = table[:, :1], table[:, 1:]
    grid = patches.reshape(len(patches), side, side, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
    grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=clip)  # (1, D, wanted, wanted)
    fitted = torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)  # (1, T, D)
    return fitted[0] if clip else fitted, (side * vision.patch, vision.image_size)


def side_of(positions: Tensor) -> int | None:
    """Patches along one side of the picture that position embeddings (..., T, D) are for, or None when it is no square."""
    tokens = positions.shape[-2]
    side = isqrt(max(tokens - 1, 0))
    return side if side and side * side + 1 == tokens else None
