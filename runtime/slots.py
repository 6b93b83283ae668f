"""A decoder of fixed shape and its buffer: what came before fills it slot by slot, and the slots of each row move with it.

B prompts, M sequences of each, which the graph may have columns to spare for; R rows, one for each column; S slots, N layers'
keys and values, H heads, K head width, V words of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from models.errors import UserError
from models.generation_spec import BEAMS, SLOTS
from runtime.session import Session


class SlotGraph:
    """A static decoder over `count` prompts, in as many runs a step as it takes."""

    def __init__(self, session: Session, sizes: Mapping[str, int], beside: Mapping[str, np.ndarray], count: int, columns: int):
        """`sizes`: what the graph was exported for; `beside`: inputs that stay the same, a row for each prompt; `columns`: the
        rows that each prompt has, M at most."""
        self._session, self._columns, self._slots = session, columns, sizes[SLOTS]
        self._sequences = (sizes[BEAMS],) if BEAMS in sizes else ()  # of a prompt, where they are an axis of their own
        self._each = session.each or 1  # prompts that a run has a multiple of; without that axis, rows
        self._beside = {name: whole_runs(array, self._each) for name, array in beside.items()}
        rows_at_least = self._each * math.prod(self._sequences)
        rows = -(-count * columns // rows_at_least) * rows_at_least
        *_, past = session.spec.inputs
        _, layers, heads, _, width = past.shape
        logits = session.spec.output("logits")
        self._kept = np.zeros((rows, int(layers), int(heads), self._slots, int(width)), np.float32)  # (R, N, H, S, K)
        self._seen = np.zeros((rows, self._slots), np.int64)  # (R, S)
        self._logits = np.empty((rows, int(logits.shape[-1])), np.float32)  # (R, V)
        self._used = 0

    def fill(self, keys_values: np.ndarray, mask: np.ndarray, sources: np.ndarray) -> None:
        """Begin with what a prefill gave, (prompts, N, H, P, K) and mask (prompts, P): sequence (b, m) with the row that
        `sources` (B, M) says."""
        self._used = mask.shape[1]
        self._refuse_overflow()
        rows = self._places(*sources.shape)
        self._kept[rows, :, :, : self._used] = keys_values[sources]
        self._seen[rows, : self._used] = mask[sources]

    def leave(self, places: np.ndarray) -> None:
        """Go on with those prompts alone that stand at `places` (B,)."""
        if self._beside:
            self._beside = {name: whole_runs(array[places], self._each) for name, array in self._beside.items()}

    def go_on(self, prompts: np.ndarray, sequences: np.ndarray) -> None:
        """Let sequence (b, m) go on from that of the prompt which stood at prompts[b, m], number sequences[b, m]: (B, M) each."""
        rows, sources = self._places(*prompts.shape), prompts * self._columns + sequences
        moved = rows != sources
        to, whence = rows[moved], sources[moved]
        self._kept[to, :, :, : self._used] = self._kept[whence, :, :, : self._used]
        self._seen[to] = self._seen[whence]

    def read(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """One more word of each sequence: ids (B, M), and mask 0 where it is padding, to logits (B, M, V) of the next.

        The logits are overwritten by the next word. Raises UserError when no slot was left for the word before this one.
        """
        self._refuse_overflow()
        count, beams = ids.shape
        rows, free = self._places(count, beams), self._used < self._slots
        words = np.zeros(len(self._kept), np.int64)
        words[rows] = ids
        positions = self._seen.sum(axis=1)
        whole = count * self._columns // math.prod(self._sequences)  # prompts; or rows, where the graph has one axis for both
        for first in range(0, whole, self._session.batch or whole):
            prompts = slice(first, first + self._session.filled(whole - first))
            shape = (prompts.stop - first, *self._sequences)
            part = slice(first * math.prod(self._sequences), prompts.stop * math.prod(self._sequences))
            found = self._session.run(
                text_ids=words[part].reshape(*shape, 1),
                positions=positions[part].reshape(*shape, 1),
                past_mask=self._seen[part].reshape(*shape, -1),
                past=self._kept[part],
                **{name: array[prompts] for name, array in self._beside.items()},
            )
            self._logits[part] = found["logits"].reshape(part.stop - part.start, -1)
            if free:
                self._kept[part, :, :, self._used] = found["present"][:, :, :, 0]
        if free:
            self._seen[rows, self._used] = mask
        self._used += 1
        return self._logits[: count * self._columns].reshape(count, self._columns, -1)[:, :beams]

    def _places(self, prompts: int, beams: int) -> np.ndarray:
        """The rows of the first `beams` sequences of each prompt: (B, M)."""
        if beams > self._columns:
            raise UserError(
                f"{self._session.spec.name} was exported for {self._columns} sequences of a prompt, asked were {beams}. "
                f"Export it with --beams {beams}, or ask for fewer beams."
            )
        places: np.ndarray = np.arange(prompts)[:, None] * self._columns + np.arange(beams)
        return places

    def _refuse_overflow(self) -> None:
        if self._used > self._slots:
            raise UserError(
                f"The buffer of {self._session.spec.name} is full: it was exported for {self._slots} words. "
                "Ask for fewer new words (--max-length), or export it with more --slots."
            )


def whole_runs(array: np.ndarray, size: int) -> np.ndarray:
    """Rows (N, ...) filled up to a multiple of `size` with copies of the last one, contiguous."""
    short = -len(array) % size
    return np.ascontiguousarray(np.concatenate([array, np.repeat(array[-1:], short, axis=0)]) if short else array)
