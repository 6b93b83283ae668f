"""BLEU of captions, from 1 to 4 words, as pycocoevalcap 1.2 has it (bleu/bleu_scorer.py, option "closest").

The counts of all captions are added before anything is divided, so the figure of all is not the mean of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from postprocess.ngrams import LONGEST, ngrams
from postprocess.scored import Scored

# The original's guards against dividing by zero. They show: a caption of one word has a Bleu_2 of 0.001 or 0.00001.
TINY = 1e-15  # added to what is counted
SMALL = 1e-9  # added to what it is divided by


@dataclass(frozen=True)
class Bleu:
    """Of N captions."""

    scores: tuple[Scored, ...]  # Bleu_1 to Bleu_4
    words: int  # of the captions
    reference_words: int  # of the references nearest in length, of two equally near ones the shorter


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Bleu:
    """BLEU of N tokenised captions, each against one or more tokenised references."""
    pairs = zip(candidates, references, strict=True)
    counts = [_count(candidate.split(), [text.split() for text in texts]) for candidate, texts in pairs]
    table = np.array(counts, np.float64)  # (N, 2 + 2 * LONGEST): words, reference words, runs, runs that are right
    each, corpus = _bleu(table), _bleu(table.sum(0, keepdims=True))  # (N, LONGEST), (1, LONGEST)
    scores = tuple(Scored(float(corpus[0, n]), each[:, n]) for n in range(LONGEST))
    return Bleu(scores, int(table[:, 0].sum()), int(table[:, 1].sum()))


def _count(words: list[str], references: list[list[str]]) -> list[int]:
    others = [ngrams(reference) for reference in references]
    right = [0] * LONGEST
    for run, count in ngrams(words).items():
        right[len(run) - 1] += min(count, max(other.get(run, 0) for other in others))
    nearest = min((abs(len(reference) - len(words)), len(reference)) for reference in references)[1]
    return [len(words), nearest, *(max(0, len(words) - n) for n in range(LONGEST)), *right]


def _bleu(table: np.ndarray) -> np.ndarray:
    words, nearest = table[:, :1], table[:, 1:2]  # (N, 1)
    runs, right = table[:, 2 : 2 + LONGEST], table[:, 2 + LONGEST :]  # (N, LONGEST)
    precision = np.cumprod((right + TINY) / (runs + SMALL), axis=1) ** (1 / np.arange(1, LONGEST + 1))
    ratio = (words + TINY) / (nearest + SMALL)
    found: np.ndarray = precision * np.exp(np.minimum(0, 1 - 1 / ratio))  # (N, LONGEST): short captions lose
    return found
