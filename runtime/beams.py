"""Beam search: the most likely texts, several followed at a time, under the rule of the original or of transformers 5.x.

At each step every beam could go on with every word. The candidates are the best 2 K of all these, or with S > 1 stop words the
best (1 + S) K, so that K at least have not ended. Those that end among the first K are finished texts, and the first K that
have not ended run on. That much is one for all rules; the rest is in runtime/beam_rules.py.

N prompts, B of them still going, K beams, R rows of a prompt (1 at first, then K), C candidates, V words, L ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from runtime.beam_rules import UNLIKELY, rule_for
from runtime.decoding import Decoding, Generated, Steps
from runtime.logits import forbid, likeliest, log_softmax, penalise


def search(
    steps: Steps,
    first: np.ndarray,
    counted: np.ndarray,
    stop_ids: Sequence[int],
    options: Decoding,
    on_step: Callable[[int], None],
) -> list[list[Generated]]:
    """What `runtime.decode.generate` gives for its arguments, which it has checked; `first` (N, V) is what `steps` began with."""
    (count, before), beams = counted.shape, options.num_beams
    rules = [rule_for(options, before) for _ in range(count)]
    going = np.arange(count)
    words = counted[:, None]  # (B, R, L)
    sums = np.full((count, beams), UNLIKELY, np.float32)  # (B, K)
    sums[:, 0] = 0
    logits = first[:, None]  # (B, R, V)
    while True:
        values, beam, word = _candidates(logits, words, sums, stop_ids, options)  # (B, C) each
        ended = np.isin(word, stop_ids)
        on_step(len(going))
        alive = []
        for b, n in enumerate(going):
            texts = np.column_stack([words[b, beam[b], before:], word[b]])  # (C, L)
            if not rules[n].take(values[b].tolist(), ended[b].tolist(), texts, words.shape[2] + 1):
                alive.append(b)
        if not alive:
            return [rule.best(options.num_return) for rule in rules]
        run = np.argsort(ended[alive], axis=1, kind="stable")[:, :beams]  # the first K that have not ended
        sums, beam, word = (np.take_along_axis(each[alive], run, axis=1) for each in (values, beam, word))  # (B, K) each
        row = np.array(alive)[:, None]
        parents = row * logits.shape[1] + beam
        words = np.concatenate([words[row, beam], word[..., None]], axis=2)  # (B, K, L)
        going = going[alive]
        logits = steps.step(word, parents, going)


def _candidates(
    logits: np.ndarray, words: np.ndarray, sums: np.ndarray, stop_ids: Sequence[int], options: Decoding
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best continuations of the beams of each prompt, best first: their log-probability, row (0 to R - 1) and new word.

    Penalty and minimum length act on log-probabilities, and nothing is normalised after them, in every version alike.
    """
    scores = log_softmax(logits)  # (B, R, V)
    penalise(scores, words, options.repetition_penalty)
    if words.shape[2] < options.min_length:
        forbid(scores, stop_ids)
    if scores.shape[1] < sums.shape[1]:  # the first words of all beams come from one row
        scores = np.repeat(scores, sums.shape[1], axis=1)
    scores += sums[..., None]  # (B, K, V)
    flat = scores.reshape(len(scores), -1)
    best = likeliest(flat, max(2, 1 + len(stop_ids)) * options.num_beams)  # (B, C)
    beam, word = np.divmod(best, logits.shape[2])
    return np.take_along_axis(flat, best, axis=1), beam % logits.shape[1], word
