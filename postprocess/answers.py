"""What the model answered: the best labels of every picture, from the probability of every label for it.

N pictures, L labels. Labels are ordered by `np.argsort(-probability, kind="stable")`: of equal ones the lower number comes
first. So a model that finds all labels alike always answers the first one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import UserError
from preprocess.tensors import Tensor

TOP = 5  # labels that are kept of a picture
BLOCK_CELLS = 1 << 22  # probabilities held at once: 16 MiB
SUM_OFF = 1e-3  # of a picture's probabilities from 1; a float32 softmax over 21,843 labels is 3.4e-7 off, measured


@dataclass(frozen=True)
class Answers:
    """The best labels of each picture, best first."""

    label: np.ndarray  # (N, 1 .. TOP) int64: numbers of the labels
    score: np.ndarray  # (N, 1 .. TOP) float32: their probabilities


@dataclass(frozen=True)
class Candidate:
    """One label for a picture. `rank` counts from 1; `right` is None where nothing is known to be."""

    label: int
    rank: int
    score: float
    right: bool | None


@dataclass(frozen=True)
class Card:
    """One picture, its best labels, and the right one if it came later."""

    picture: int
    top: list[Candidate]
    late: Candidate | None

    @property
    def rank(self) -> int | None:
        """Of the right label; None where there is none."""
        return next((one.rank for one in (*self.top, self.late) if one and one.right), None)


def answers(probability: Tensor) -> Answers:
    """The TOP best labels of every picture, or all when there are fewer, from probability (N, L).

    Raises UserError when a value is not a number from 0 to 1, or when those of a picture do not add up to 1.
    """
    pictures, labels = probability.shape
    step = max(1, BLOCK_CELLS // labels)
    kept = (pictures, min(TOP, labels))
    found = Answers(np.empty(kept, np.int64), np.empty(kept, np.float32))
    for start in range(0, pictures, step):
        block = np.asarray(probability[start : start + step])  # (B, L)
        _check(block, start)
        best = np.argsort(-block, axis=1, kind="stable")[:, :TOP]  # (B, 1 .. TOP)
        found.label[start : start + step] = best
        found.score[start : start + step] = np.take_along_axis(block, best, 1)
    return found


def predictions(found: Answers, labels: list[str]) -> list[list[dict[str, Any]]]:
    """N lists of {"score", "label"}, best first: what mindformers' pipeline returns.

    A score is the shortest decimal number that is this float32, as numpy prints it: 0.99999976, not 0.9999997615814209.
    """
    return [
        [{"score": float(str(score)), "label": labels[label]} for label, score in zip(row, scores, strict=True)]
        for row, scores in zip(found.label.tolist(), found.score, strict=True)
    ]


def card(found: Answers, picture: int, probability: Tensor, target: int | None) -> Card:
    """The answers to one picture. `target` is the right label, None when there is none."""
    listed = zip(found.label[picture].tolist(), found.score[picture].tolist(), strict=True)
    top = [
        Candidate(label, rank, score, None if target is None else label == target)
        for rank, (label, score) in enumerate(listed, 1)
    ]
    if target is None or any(one.right for one in top):
        return Card(picture, top, None)
    row = np.asarray(probability[picture])  # (L,)
    rank = int(np.flatnonzero(np.argsort(-row, kind="stable") == target)[0]) + 1
    return Card(picture, top, Candidate(target, rank, float(row[target]), True))


def _check(block: np.ndarray, start: int) -> None:
    """Whatever would end in a meaningless order. `block` (B, L) begins at picture `start`."""
    hint = "Look at the checkpoint and at the precision of the graphs."
    if bad := block.size - np.count_nonzero((block >= 0) & (block <= 1)):  # neither holds for NaN
        raise UserError(
            f"{bad:,} of {block.size:,} values of probability, pictures {start} to {start + len(block) - 1}, are not numbers "
            f"from 0 to 1, so nothing can be ranked. {hint}"
        )
    total = block.sum(1, dtype=np.float64)  # (B,)
    if len(wrong := np.flatnonzero(np.abs(total - 1) > SUM_OFF)):
        raise UserError(f"The probabilities of picture {start + wrong[0]} add up to {total[wrong[0]]:.4g}, expected 1. {hint}")
