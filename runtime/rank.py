"""Answers chosen from a list: which of them BLIP finds most likely after a question.

Source: salesforce/BLIP models/blip_vqa.py (`rank_answer`) and models/med.py (BertLMHeadModel, the loss); LAVIS has the same in
models/blip_models/blip_vqa.py and models/med.py. It ranks with BLIP's decoder alone, not with language models.

The likeliest first words choose k answers for each question, and each of these is scored by the loss that the decoder was
trained with: the sum over its words, [SEP] with them, of the cross entropy, smoothed by 0.1 over the vocabulary. The original
reads all k answers from [DEC] on, padded to the longest answer of the list; here they share what is the same, the first word's
logits and the question's keys and values, and an answer that has ended is read no further.

N questions, A answers, k of them ranked, W words of the longest, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime.batches import slices
from runtime.decoding import Steps
from runtime.logits import log_softmax

SMOOTHING = 0.1  # label_smoothing of the loss
BLOCK_BYTES = 128 << 20  # of the logits of one step


def questions_at_once(k: int, vocab: int) -> int:
    """How many questions can be ranked together in the memory of one block."""
    return max(1, BLOCK_BYTES // (4 * k * vocab))


def rank(
    begin: Callable[[], Steps],
    answers: np.ndarray,
    lengths: np.ndarray,
    k: int,
    columns: int | None,
    on_step: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray]:
    """The k answers of each question, best first.

    Args:
        begin: gives N questions, of which the decoder has read [DEC]; called again for each `columns` answers.
        answers: (A, W) int64, the words after [DEC], [SEP] last.
        lengths: (A,) words of each, at least 1.
        k: at most A.
        columns: answers that the decoder takes at a time; None takes any number.
        on_step: told after each step how many words were scored.

    Returns:
        (N, k) int64 which answers, and (N, k) float32 their scores, log-probabilities but for the smoothing. Of answers that
        are equally likely the first of the list goes first; torch promises no order among equals.
    """
    steps = begin()
    first = log_softmax(steps.start())  # (N, V)
    chosen = np.argsort(-first[:, answers[:, 0]], axis=1, kind="stable")[:, :k]  # (N, k)
    # The longest first, so that those which go on are the first rows of the next step.
    order = np.argsort(-lengths[chosen], axis=1, kind="stable")
    chosen = np.take_along_axis(chosen, order, axis=1)
    words, left = answers[chosen], lengths[chosen]  # (N, k, W), (N, k)
    scores = _scores(first[:, None], words[..., 0])  # (N, k)
    on_step(scores.size)
    for part in slices(0, k, columns or k):
        if part.start:
            steps = begin()
            steps.start()
        scores[:, part] += _after_first(steps, words[:, part], left[:, part], on_step)
    best = np.lexsort((chosen, -scores), axis=1)
    return np.take_along_axis(chosen, best, axis=1), np.take_along_axis(scores, best, axis=1)


def _after_first(steps: Steps, words: np.ndarray, left: np.ndarray, on_step: Callable[[int], None]) -> np.ndarray:
    """What the words after the first one score: words (N, M, W) and how many there are (N, M), descending, to (N, M)."""
    scores = np.zeros(left.shape, np.float32)
    prompts, beams = np.arange(len(left)), 1  # of the call before, and its rows of each question
    for place in range(1, int(left.max())):
        going = np.flatnonzero((left > place).any(axis=1))
        rows = int((left > place).sum(axis=1).max())  # a question with fewer has answers among them that have ended
        parents = np.searchsorted(prompts, going)[:, None] * beams + np.arange(rows) * (place > 1)
        logits = steps.step(words[going, :rows, place - 1], parents, going)  # (B, M, V)
        still = left[going, :rows] > place
        scores[going, :rows] += np.where(still, _scores(log_softmax(logits), words[going, :rows, place]), 0)
        on_step(int(still.sum()))
        prompts, beams = going, rows
    return scores


def _scores(likely: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Minus the smoothed cross entropy: log-probabilities (N, M, V), M being 1 or k, at words (N, k) to (N, k) float32."""
    of_word = np.take_along_axis(np.broadcast_to(likely, (*words.shape, likely.shape[2])), words[..., None], axis=2)[..., 0]
    found: np.ndarray = (1 - SMOOTHING) * of_word + SMOOTHING * likely.mean(axis=2)
    return found.astype(np.float32)
