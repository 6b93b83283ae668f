"""What a metric says of captions: a figure for all of them and one for each, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scored:
    """N captions."""

    corpus: float
    each: np.ndarray  # (N,) float64, in the order in which the captions were given


@dataclass(frozen=True)
class Absent:
    """No figure."""

    reason: str  # a sentence: what is missing, and how to get it
