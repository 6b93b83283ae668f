"""Word by word with caches that stay in ONNX Runtime: what one run gives, the next one goes on from.

Beams are sorted, and prompts dropped, by nothing but the index of the row that each goes on from. N prompts, B of them still
going, M sequences of each, L words, P words before them, V words of the vocabulary.
"""

from __future__ import annotations

import numpy as np

from runtime.begun import Begun
from runtime.onnx_session import OnnxBackend
from runtime.word_graph import WordGraph


class DynamicSteps:
    """`runtime.decoding.Steps` over one dynamic graph. The logits of a step are overwritten by the next one."""

    def __init__(self, backend: OnnxBackend, begun: Begun) -> None:
        self._graph, self._begun = WordGraph(backend, begun, caches=True), begun
        self._past = self._graph.nothing(len(begun.ids))
        self._seen = np.zeros((len(begun.ids), 0), np.int64)  # (R, P)

    def start(self) -> np.ndarray:
        ids, mask = self._begun.ids[:, None], self._begun.mask[:, None]  # (N, 1, L)
        logits = self._run(ids, mask, np.arange(len(ids))[:, None], first=True)[:, 0]
        if self._graph.shares_prompt:  # then a row of the past begins after the prompt
            self._graph.share_prompt(self._past, self._seen)
            self._past, self._seen = self._graph.nothing(len(ids)), self._seen[:, :0]
        return logits

    def step(self, ids: np.ndarray, parents: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        self._graph.leave(prompts)
        return self._run(ids[..., None], np.ones((*ids.shape, 1), np.int64), parents, first=False)

    def _run(self, ids: np.ndarray, mask: np.ndarray, parents: np.ndarray, first: bool) -> np.ndarray:
        seen = self._seen[parents]  # (B, M, P)
        logits, self._past = self._graph.run(ids, mask, parents, self._past, seen, first)
        queries = np.ones((*parents.shape, self._begun.queries if first else 0), np.int64)
        self._seen = np.concatenate([seen, queries, mask], axis=2).reshape(parents.size, -1)
        return logits
