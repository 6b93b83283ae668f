"""CIDEr of captions: how alike they and their references are in runs of words, rare runs counting more.

The `CIDEr` that everyone reports is that of pycocoevalcap (cider/cider_scorer.py). It computes what Vedantam et al., CIDEr:
Consensus-based Image Description Evaluation (2015), call CIDEr-D: a run counts at most as often as the reference has it, and a
difference in length costs by a Gaussian of 6 words. So both names stand for this one figure here; the paper's plain CIDEr,
without the two, is not computed. (The paper counts length in words, the code in pairs of words. The differences are the same
but beside a text without words, which scores 0 either way.)

How rare a run is, is counted in the references of the pictures at hand: the figure of a part of a data set is not comparable
with that of the whole, and a single picture always scores 0. Perfect is 10, not 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from postprocess.ngrams import LONGEST, Ngram, ngrams
from postprocess.scored import Scored

SIGMA = 6.0  # words
SCALE = 10.0


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scored:
    """CIDEr, which is CIDEr-D, of N tokenised captions, each against one or more tokenised references."""
    words = [[text.split() for text in texts] for texts in references]
    counted = [[ngrams(text) for text in texts] for texts in words]
    pictures: Counter[Ngram] = Counter()  # in the references of how many each run occurs
    for texts in counted:
        pictures.update(set().union(*texts))
    unseen = math.log(len(references))
    rarity = {run: math.log(len(references) / count) for run, count in pictures.items()}
    each = np.empty(len(candidates), np.float64)
    for number, (candidate, others, texts) in enumerate(zip(candidates, words, counted, strict=True)):
        own = candidate.split()
        weights = {run: count * rarity.get(run, unseen) for run, count in ngrams(own).items()}
        norm = _norm(weights)
        total = 0.0
        for other, runs in zip(others, texts, strict=True):
            total += _likeness(weights, norm, runs, rarity) * _gaussian(len(own) - len(other))
        each[number] = SCALE * total / len(texts)
    return Scored(float(each.mean()), each)


def _likeness(weights: dict[Ngram, float], norm: list[float], runs: Counter[Ngram], rarity: dict[Ngram, float]) -> float:
    """The cosine of a caption and a reference, the mean over the lengths of runs; what the caption has too often is cut."""
    product, squares = [0.0] * LONGEST, [0.0] * LONGEST
    for run, count in runs.items():
        weight, place = count * rarity[run], len(run) - 1
        squares[place] += weight * weight
        if run in weights:
            product[place] += min(weights[run], weight) * weight
    cosines = (
        value / (own * math.sqrt(other)) for value, own, other in zip(product, norm, squares, strict=True) if own and other
    )
    return sum(cosines) / LONGEST


def _norm(weights: dict[Ngram, float]) -> list[float]:
    """The norm of a caption, for each length of runs."""
    squares = [0.0] * LONGEST
    for run, weight in weights.items():
        squares[len(run) - 1] += weight * weight
    return [math.sqrt(square) for square in squares]


def _gaussian(difference: int) -> float:
    return math.exp(-(difference**2) / (2 * SIGMA**2))
