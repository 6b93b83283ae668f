"""Rows of unequal length as one array. N rows, the longest has L tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def right_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, both (N, L) int64: each row, then `pad_id` where the mask is 0."""
    ids = np.full((len(rows), max(map(len, rows), default=0)), pad_id, np.int64)  # (N, L)
    mask = np.zeros_like(ids)  # (N, L)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = row
        mask[n, : len(row)] = 1
    return ids, mask


def left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, both (N, L) int64: `pad_id` where the mask is 0, then each row. All rows end together, so that the next
    word of each stands in the same column."""
    ids, mask = right_padded([row[::-1] for row in rows], pad_id)
    return np.ascontiguousarray(ids[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])
