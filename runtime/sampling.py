"""One word at a time for each sequence by itself: the likeliest, or one that is drawn.

All rules agree here. Of drawing, the distribution is that of transformers (repetition penalty, minimum length, temperature,
top-k, top-p, in this order), the random numbers are not: each sequence has its own, from the seed, the number of its prompt
and its own number. So a sequence depends neither on the batch that its prompt is in, nor on how many are drawn beside it.

N prompts, B of them still going, M sequences of each, R rows of logits of a prompt (1 at first, then M), V words, L ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from runtime.decoding import Decoding, Generated, Steps
from runtime.embed import refuse_nan
from runtime.logits import forbid, keep_top_k, keep_top_p, log_softmax, penalise

GOING = np.iinfo(np.int64).max  # where a sequence ends that has no stop word yet


def follow(
    steps: Steps,
    first: np.ndarray,
    counted: np.ndarray,
    stop_ids: Sequence[int],
    options: Decoding,
    numbers: Sequence[int],
    on_step: Callable[[int], None],
) -> list[list[Generated]]:
    """What `runtime.decode.generate` gives for its arguments, which it has checked; `first` (N, V) is what `steps` began with."""
    (count, before), each = counted.shape, options.num_return
    dice = [
        [np.random.default_rng([options.seed, number, m]) for m in range(each)]
        for _, number in zip(counted, numbers, strict=True)
    ]  # (N, M)
    words = np.repeat(counted[:, None], each, axis=1)  # (N, M, L)
    score = np.zeros((count, each))
    end = np.full((count, each), GOING)  # where the stop word is
    going = np.arange(count)
    logits = first[:, None]  # (B, R, V): the sequences of a prompt begin as one
    while True:
        shaped = _shaped(logits, words[going, : logits.shape[1]], stop_ids, options)
        still = end[going] == GOING  # (B, M)
        chosen = _drawn(shaped, still, [dice[n] for n in going]) if options.do_sample else _likeliest(shaped)  # (B, M)
        score[going] += np.where(still, _of(log_softmax(logits), chosen), 0)
        end[going] = np.where(still & np.isin(chosen, stop_ids), words.shape[2], end[going])
        new = np.zeros((count, each, 1), np.int64)
        new[going, :, 0] = chosen
        words = np.concatenate([words, new], axis=2)
        on_step(int(still.sum()))
        alive = np.flatnonzero((end[going] == GOING).any(axis=1))
        if words.shape[2] == options.max_length or not len(alive):
            prompts = zip(words, score, end, strict=True)
            return [[_text(*sequence, before) for sequence in zip(*prompt, strict=True)] for prompt in prompts]
        rows = logits.shape[1]
        parents = alive[:, None] * rows + np.arange(each) % rows
        going = going[alive]
        logits = steps.step(chosen[alive], parents, going)


def _shaped(logits: np.ndarray, words: np.ndarray, stop_ids: Sequence[int], options: Decoding) -> np.ndarray:
    """What is chosen from: logits (B, R, V) and words (B, R, L) to scores (B, R, V), a new array."""
    scores = logits.copy()
    penalise(scores, words, options.repetition_penalty)
    if words.shape[2] < options.min_length:
        forbid(scores, stop_ids)
    if options.do_sample:
        scores /= np.float32(options.temperature)
        keep_top_k(scores, options.top_k)
        keep_top_p(scores.reshape(-1, scores.shape[-1]), options.top_p)
    return scores


def _likeliest(scores: np.ndarray) -> np.ndarray:
    chosen: np.ndarray = scores.argmax(axis=-1)
    refuse_nan("logits", _of(scores, chosen))
    return chosen


def _drawn(scores: np.ndarray, still: np.ndarray, dice: list[list[np.random.Generator]]) -> np.ndarray:
    """(B, M): a word for each sequence that still goes, by the chances that scores (B, R, V) give; 0 for the others."""
    cumulated = np.cumsum(np.exp(log_softmax(scores)), axis=-1, dtype=np.float64)  # (B, R, V)
    chosen = np.zeros(still.shape, np.int64)
    for b, m in np.argwhere(still):
        line = cumulated[b, m % len(cumulated[b])]
        at = min(dice[b][m].random() * line[-1], np.nextafter(line[-1], 0))
        chosen[b, m] = np.searchsorted(line, at, side="right")  # never a word without a chance: its line does not rise
    return chosen


def _of(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """scores (B, R, V) at the chosen words (B, M): (B, M)."""
    found: np.ndarray = np.take_along_axis(np.broadcast_to(scores, (*chosen.shape, scores.shape[-1])), chosen[..., None], -1)
    return found[..., 0]


def _text(words: np.ndarray, score: float, end: int, before: int) -> Generated:
    return Generated(tuple(words[before:end].tolist()), float(score), bool(end != GOING))
