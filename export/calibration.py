"""What graphs are fed when float16 is tried on them: random inputs, or what the model makes of pictures of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from export.random_inputs import random_inputs
from export.random_scene import Model
from export.sizes import Sizes
from models.blip2 import Retrieval
from models.blip2_llm import Blip2Llm
from models.config import Config
from models.errors import UserError
from models.stored import compute_in_float32
from preprocess.images import FORMATS, normalise, read_image

SEEDS = (0, 1)  # of the random inputs: a buffer that is filled in part, and a full one
PICTURES = 4  # that are read of a folder; more hardly show other extremes, and all tensors of all of them are looked at
SUFFIXES = tuple(f".{each.lower()}" for each in ("JPG", *FORMATS))


def read_pictures(folder: Path, config: Config) -> Tensor:
    """(N, 3, S, S) of the first PICTURES by name, as blip-pre makes them. Raises UserError for a folder without pictures, and for
    one that cannot be decoded."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; --calibration takes one of pictures.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[:PICTURES]
    if not files:
        raise UserError(f"{folder} holds no pictures (.jpg, .png, ...); --calibration takes some like those that will be run.")
    protocol, size = config.protocol, config.vision.image_size
    pixels = np.stack([read_image(path, size, protocol.interpolation) for path in files])
    return torch.from_numpy(normalise(pixels, protocol.mean, protocol.std))


@torch.no_grad()
def feeds_for(name: str, model: Model, sizes: Sizes, pictures: Tensor | None = None) -> list[dict[str, np.ndarray]]:
    """Feeds of graph `name` at these sizes. With `pictures` (N, 3, S, S), what stands for pictures is made of them, in as many
    feeds as that takes; a decoder's keys and values are always of random ones."""
    with compute_in_float32(model):
        if pictures is None:
            return [_random(name, model, sizes, seed) for seed in SEEDS]
        starts = range(0, len(pictures), sizes.batch)
        return [_real(_random(name, model, sizes, n % 2), model, _rows(pictures, n, sizes.batch)) for n in starts]


def _random(name: str, model: Model, sizes: Sizes, seed: int) -> dict[str, np.ndarray]:
    found = random_inputs(name, model, sizes.batch, sizes.length, seed, **sizes.others)
    return {key: value.numpy() for key, value in found.items()}


def _real(feeds: dict[str, np.ndarray], model: Model, pictures: Tensor) -> dict[str, np.ndarray]:
    """`feeds` with what is made of `pictures` (B, 3, S, S) in the place of what was made of random ones."""
    if "input_image" in feeds:
        return {**feeds, "input_image": pictures.numpy()}
    if not {"image_feat", "llm_prompt"} & feeds.keys() and not (isinstance(model, Retrieval) and "cross_kv" in feeds):
        return feeds
    features = model.image_feat(pictures)
    made = {"image_feat": features}
    if "llm_prompt" in feeds:
        made["llm_prompt"] = cast(Blip2Llm, model).llm_prompt(cast(Blip2Llm, model).query_embed(features))
    if "cross_kv" in feeds and isinstance(model, Retrieval):
        made["cross_kv"] = model.image_kv(features[:1])
    return {key: made[key].numpy() if key in made else value for key, value in feeds.items()}


def _rows(pictures: Tensor, start: int, count: int) -> Tensor:
    """`count` of them from `start` on, the last one again where there are no more."""
    places: Sequence[int] = [min(start + n, len(pictures) - 1) for n in range(count)]
    return pictures[list(places)]
