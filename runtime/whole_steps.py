"""Without caches: at each step all words from the first one are read again. For comparison; it gives the same words.

N prompts, B of them still going, M sequences of each, L words.
"""

from __future__ import annotations

import numpy as np

from runtime.begun import Begun
from runtime.onnx_session import OnnxBackend
from runtime.word_graph import WordGraph


class WholeSteps:
    """`runtime.decoding.Steps` over one dynamic graph. The logits of a step are overwritten by the next one."""

    def __init__(self, backend: OnnxBackend, begun: Begun) -> None:
        self._graph = WordGraph(backend, begun, caches=False)
        self._nothing = self._graph.nothing(1)  # one row, which all sequences go on from
        self._ids, self._mask = begun.ids, begun.mask  # (R, L)

    def start(self) -> np.ndarray:
        return self._run(self._ids[:, None], self._mask[:, None])[:, 0]

    def step(self, ids: np.ndarray, parents: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        self._graph.leave(prompts)
        words = np.concatenate([self._ids[parents], ids[..., None]], axis=2)  # (B, M, L)
        mask = np.concatenate([self._mask[parents], np.ones((*ids.shape, 1), np.int64)], axis=2)
        self._ids, self._mask = words.reshape(ids.size, -1), mask.reshape(ids.size, -1)
        return self._run(words, mask)

    def _run(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        parents, seen = np.zeros(ids.shape[:2], np.int64), np.zeros((*ids.shape[:2], 0), np.int64)
        return self._graph.run(ids, mask, parents, self._nothing, seen, first=True)[0]
