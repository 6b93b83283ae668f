"""Whole evaluations of retrieval that others publish, by name: `--as`. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.errors import Misuse

ASCEND_MODELZOO = "ascend-modelzoo"


@dataclass(frozen=True)
class Recipe:
    """What an evaluation is done with, by the names that models.config.Protocol and the options have for it."""

    interpolation: str
    max_words: int
    max_length: int  # tokens
    k_test: int
    keys: str  # how the metrics are called, one of blip-post --keys


# Ascend/ModelZoo-PyTorch, ACL_PyTorch/contrib/cv/image_retrieval/BLIP: BLIP_preprocess.py resizes with torchvision's usual
# filter, cuts captions to 30 words and pads them to 35 tokens; BLIP_postprocess.py has the 20 in its code, and text_r1 ...
RECIPES = {ASCEND_MODELZOO: Recipe("bilinear", 30, 35, 20, "ascend")}


def recipe(name: str) -> Recipe:
    """Raises Misuse for a name that is not in RECIPES."""
    if name not in RECIPES:
        raise Misuse(f"There is no evaluation {name!r} to follow; there is: {', '.join(RECIPES)}.")
    return RECIPES[name]


def wanted(name: str | None, setting: str, asked: Any) -> Any:
    """The value of `setting`, a field of Recipe: what was `asked`, else that of the recipe `name`; None when neither says.

    Raises Misuse for an unknown name.
    """
    if name is None or asked is not None:
        return asked
    return getattr(recipe(name), setting)


def departures(name: str | None, used: Mapping[str, Any]) -> list[str]:
    """A sentence for each setting in `used` that the recipe `name` has otherwise; what is used stays. None of no recipe.

    Raises Misuse for an unknown name.
    """
    theirs = dataclasses.asdict(recipe(name)) if name is not None else {}
    return [
        f"Warning: {setting} is {used[setting]}, which is not as {name} has it, {value}."
        for setting, value in theirs.items()
        if setting in used and used[setting] != value
    ]
