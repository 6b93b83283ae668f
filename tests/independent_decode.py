"""The original's beam search a second time, plainly: what runtime/beams.py is held against.

Written from what transformers 4.15 and 4.33 do (generation_utils.py `beam_search`, generation_beam_search.py), for one prompt,
with lists, one text at a time, every candidate sorted; log-probabilities are torch's. It shares no line with the product.
`exhaustive` searches nothing: it scores every text there can be.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

Next = Callable[[list[int]], np.ndarray]  # the new words so far to logits (V,)


class Found(NamedTuple):
    score: float
    ids: list[int]
    stopped: bool


def log_probabilities(logits: np.ndarray, text: list[int], stop_ids: list[int], penalty: float, short: bool) -> torch.Tensor:
    """(V,) after the repetition penalty for the words of `text`; a text that is still too short may not stop."""
    row = torch.log_softmax(torch.from_numpy(logits), dim=0)
    for word in set(text):
        row[word] = row[word] * penalty if row[word] < 0 else row[word] / penalty
    if short:
        row[stop_ids] = float("-inf")
    return row


def original(
    following: Next,
    counted: list[int],
    stop_ids: list[int],
    beams: int,
    max_length: int,
    min_length: int = 0,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
    early_stopping: bool | str = False,
    version: str = "4.33",
) -> list[Found]:
    """All `beams` texts that the search ends with, best first."""
    live: list[tuple[float, list[int]]] = [(0.0, [])] + [(-1e9, [])] * (beams - 1)
    kept: list[Found] = []

    def finish(total: float, ids: list[int], stopped: bool) -> None:
        score = total / len(counted + ids) ** length_penalty
        if len(kept) == beams and score <= min(text.score for text in kept):
            return
        kept.append(Found(score, ids, stopped))
        if len(kept) > beams:
            kept.remove(min(kept, key=lambda text: text.score))

    length = len(counted)
    while True:
        everything = []
        for number, (total, ids) in enumerate(live):
            row = log_probabilities(following(ids), counted + ids, stop_ids, repetition_penalty, length < min_length)
            row = row + torch.tensor(total)
            everything += [(-value, number, word) for word, value in enumerate(row.tolist())]
        everything = sorted(everything)[: max(2, 1 + len(stop_ids)) * beams]
        going = []
        for rank, (loss, number, word) in enumerate(everything):
            ids = live[number][1]
            if word not in stop_ids:
                going.append((-loss, [*ids, word]))
            elif rank < beams:
                finish(-loss, ids, True)
            if len(going) == beams:
                break
        live = going
        length += 1
        best = -everything[0][0]
        reached = {"4.15": length - 1, "4.33": length}[version]
        if early_stopping == "never" and length_penalty > 0:
            reached = max_length
        if len(kept) == beams and (early_stopping is True or min(text.score for text in kept) >= best / reached**length_penalty):
            break
        if length >= max_length:
            for total, ids in live:
                finish(total, ids, False)
            break
    return sorted(kept, key=lambda text: text.score)[::-1]


def exhaustive(following: Next, counted: list[int], stop_id: int, max_length: int, length_penalty: float) -> Found:
    """The text that scores best of all, by trying each."""
    vocabulary = [word for word in range(len(following([]))) if word != stop_id]
    room = max_length - len(counted)
    best = Found(-np.inf, [], False)
    for length in range(room + 1):
        for text in itertools.product(vocabulary, repeat=length):
            words = [*text, stop_id] if length < room else list(text)
            rows = [torch.log_softmax(torch.from_numpy(following(words[:at])), dim=0) for at in range(len(words))]
            total = sum(float(row[word]) for row, word in zip(rows, words, strict=True))
            score = total / (len(counted) + length) ** length_penalty
            if score > best.score:
                best = Found(score, list(text), length < room)
    return best
