"""What a decoder starts from: the words that it reads first, and what it looks at beside them.

N prompts, L words, Q queries of the Q-Former (0 where the decoder reads none).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from runtime.bound import Value


@dataclass(frozen=True)
class Begun:
    """N prompts that are ready to go on."""

    ids: np.ndarray  # (N, L) int64
    mask: np.ndarray  # (N, L) int64, 0 where a word is padding, which stands on the left
    beside: Mapping[str, Value]  # inputs that stay the same from word to word, by name; a row for each prompt
    llm_prompt: np.ndarray | None = None  # (N, Q, E): what stands before the words, where the decoder reads queries

    @property
    def queries(self) -> int:
        """How many places are taken before the words."""
        return 0 if self.llm_prompt is None else self.llm_prompt.shape[1]


def counted_before(mask: np.ndarray) -> np.ndarray:
    """How many words before each are no padding: mask (..., L) to (..., L) int64."""
    found: np.ndarray = mask.cumsum(axis=-1) - mask
    return found
