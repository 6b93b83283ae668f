"""ROUGE-L of captions, as pycocoevalcap 1.2 has it (rouge/rouge.py): by the longest common subsequence of words.

Precision and recall are the best over the references, each by itself; recall counts more, by BETA.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from postprocess.scored import Scored

BETA = 1.2


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scored:
    """ROUGE-L of N tokenised captions, each against one or more tokenised references.

    A caption without words counts as one empty word, as in the original: it is 1.0 beside a reference without words, else 0.
    """
    each = np.array([_rouge(text, texts) for text, texts in zip(candidates, references, strict=True)], np.float64)
    return Scored(float(each.mean()), each)


def common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    One bit for each word of `first`: it is 0 where the length so far grows, and a word of `second` moves all of them at once.
    Source: Hyyro, Bit-parallel LCS-length computation revisited, 2004.
    """
    places: defaultdict[str, int] = defaultdict(int)
    for place, word in enumerate(first):
        places[word] |= 1 << place
    every = (1 << len(first)) - 1
    row = every
    for word in second:
        met = row & places[word]
        row = ((row + met) | (row - met)) & every
    return len(first) - row.bit_count()


def _rouge(candidate: str, references: Sequence[str]) -> float:
    words = candidate.split(" ")
    others = [text.split(" ") for text in references]
    found = [common(words, other) for other in others]
    precision = max(found) / len(words)
    recall = max(length / len(other) for length, other in zip(found, others, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
