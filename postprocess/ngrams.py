"""Runs of one to four words, counted: what BLEU and CIDEr compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

LONGEST = 4  # words

Ngram = tuple[str, ...]


def ngrams(words: Sequence[str]) -> Counter[Ngram]:
    """How often each run of 1 to LONGEST words occurs."""
    runs: list[Ngram] = []
    for length in range(1, LONGEST + 1):
        runs.extend(zip(*(words[start:] for start in range(length)), strict=False))
    return Counter(runs)
