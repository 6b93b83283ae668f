"""Arithmetic on the logits of the next word, in float32 as the original's.

B prompts, M sequences of each, V words, L ids so far. Numbers agree with torch's to rounding, not to the last bit: a sum over
the vocabulary is added up in another order there, so a near tie may fall the other way. Exact ties: the lower id (and the
earlier beam) goes first here. torch.argmax does the same; torch.topk promises no order among equals.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.embed import refuse_nan

BLOCK = 256  # words; only speed depends on it


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(..., V): log-probabilities of the words, a new array. Raises UserError where a row has NaN, +inf or -inf alone."""
    highest = logits.max(axis=-1, keepdims=True)
    refuse_nan("logits", highest)  # a maximum is NaN where any number is
    found: np.ndarray = logits - highest
    for row in found.reshape(-1, found.shape[-1]):  # one at a time: what they need beside them stays in the processor's cache
        row -= np.log(np.exp(row).sum())
    return found


def penalise(scores: np.ndarray, words: np.ndarray, penalty: float) -> None:
    """Make words that were there less likely, in place: scores (B, M, V), words (B, M, L).

    A score below 0 is multiplied, another divided (transformers generation/logits_process.py). An id outside the vocabulary,
    such as -1 for padding, stands for no word.
    """
    if penalty == 1:
        return
    known = (words >= 0) & (words < scores.shape[-1])
    row, beam, _ = np.nonzero(known)
    at = (row, beam, words[known])
    seen = scores[at]
    scores[at] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))


def forbid(scores: np.ndarray, ids: Sequence[int]) -> None:
    """Give words (such as the stop words of a text that is still too short) no chance, in place: scores (B, M, V)."""
    scores[..., list(ids)] = -np.inf


def likeliest(scores: np.ndarray, number: int) -> np.ndarray:
    """Where the `number` highest of each row of scores (B, V) are: (B, number) int64, highest first, lower place among equals.

    No row is sorted: what is below the peaks of `number` blocks cannot be among the highest.
    """
    found = np.empty((len(scores), number), np.int64)
    width = max(1, min(BLOCK, scores.shape[1] // number))
    peaks = np.maximum.reduceat(scores, np.arange(0, scores.shape[1], width), axis=1)
    for row, edge, places in zip(scores, np.partition(peaks, -number, axis=1)[:, -number], found, strict=True):
        near = np.flatnonzero(row >= edge)
        places[:] = near[np.argsort(-row[near], kind="stable")[:number]]
    return found


def keep_top_k(scores: np.ndarray, number: int) -> None:
    """Leave the `number` highest of each row a chance, and what equals the last of them, in place: scores (..., V)."""
    if 0 < number < scores.shape[-1]:
        edge = np.partition(scores, -number, axis=-1)[..., -number, None]
        scores[scores < edge] = -np.inf


def keep_top_p(scores: np.ndarray, mass: float) -> None:
    """Leave the likeliest words a chance that together reach the probability `mass`, in place: scores (R, V).

    A word stays when those before it have less than `mass`; the first always does. (At exact equality transformers 4.15
    keeps one word more.) Most of the mass sits on few words, so more are looked at only where need be.
    """
    if mass == 1:
        return
    for row, chances in zip(scores, np.exp(log_softmax(scores)), strict=True):
        number, reached = 0, 0.0
        while reached < mass and number < len(row):
            number = min(max(8 * number, BLOCK), len(row))
            places = likeliest(chances[None], number)[0]
            total = np.cumsum(chances[places], dtype=np.float64)
            reached = total[-1]
        kept = places[: 1 + np.count_nonzero(total[:-1] < mass)]
        stay = row[kept]
        row[:] = -np.inf
        row[kept] = stay
