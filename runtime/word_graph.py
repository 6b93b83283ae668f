"""One run of a dynamic decoder: words, after whatever came before them, to the logits of the next word.

The graphs of BLIP and T5 take M sequences of each of B prompts, which share what they look at; those of language models take
rows. Both are given (B, M, ...) here. L words, P words before them, Q queries of the Q-Former, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnxruntime import OrtValue

from models.generation_spec import BEAMS, PAST, ROWS
from runtime.begun import Begun, counted_before
from runtime.bound import Bound, rows_of
from runtime.onnx_session import OnnxBackend


class WordGraph:
    """A decoder's graph over those prompts of `begun` that are still going."""

    def __init__(self, backend: OnnxBackend, begun: Begun, caches: bool) -> None:
        """`caches`: whether a run gives what the next one goes on from."""
        spec = backend.spec
        logits, *present = spec.outputs
        self._past = spec.inputs[-len(present) :]
        self._apart = BEAMS in logits.shape  # B and M are two axes
        self._vocab = int(logits.shape[-1])
        self._begun = begun
        self._beside = dict(begun.beside)
        self._going = np.arange(len(begun.ids))  # (B,) the prompts
        self._logits = np.empty((0, 0, 0), np.float32)
        self._graph = Bound(backend, [tensor.name for tensor in present] if caches else [])
        self._graph.feed(self._beside)

    def nothing(self, rows: int) -> list[OrtValue]:
        """A past of no words: (R, H, 0, K) of every layer."""
        tensors = [tensor.bind(rows, 0, **{ROWS: rows, PAST: 0}) for tensor in self._past]
        return [OrtValue.ortvalue_from_numpy(np.empty([int(dim) for dim in t.shape], t.dtype)) for t in tensors]

    def leave(self, prompts: np.ndarray) -> None:
        """Go on with these prompts alone (B,), all of them still going."""
        if len(prompts) == len(self._going):
            return
        rows = np.searchsorted(self._going, prompts)
        self._beside = {
            name: rows_of(value, rows) if isinstance(value, OrtValue) else value[rows] for name, value in self._beside.items()
        }
        self._graph.feed(self._beside)
        self._going = prompts

    def run(
        self, ids: np.ndarray, mask: np.ndarray, parents: np.ndarray, past: Sequence[OrtValue], seen: np.ndarray, first: bool
    ) -> tuple[np.ndarray, list[OrtValue]]:
        """The word after these.

        Args:
            ids, mask: (B, M, L) int64, the words, and 0 where they are padding.
            parents: (B, M) int64, the row of `past` that each sequence goes on from.
            past: (R, H, P, K) of every layer.
            seen: (B, M, P) int64, 0 where what a sequence goes on from is padding.
            first: whether nothing came before the words but the queries, where the decoder reads any.

        Returns:
            float32 logits (B, M, V), overwritten by the next run, and the past that the next run may go on from.
        """
        prompts, beams, length = ids.shape
        rows = (prompts, beams) if self._apart else (prompts * beams,)
        feeds = {
            "text_ids": ids.reshape(*rows, length),
            "text_atten_mask": mask.reshape(*rows, length),
            "past_mask": seen.reshape(*rows, seen.shape[2]),
            "beam_index": parents.reshape(rows),
        }
        before = seen.sum(axis=2, keepdims=True)  # (B, M, 1)
        if self._begun.llm_prompt is not None:
            queries = self._begun.llm_prompt[self._going, : None if first else 0]  # (B, Q or 0, E)
            feeds["llm_prompt"] = np.repeat(queries, beams, axis=0)
            before += queries.shape[1]
        feeds["positions"] = (before + counted_before(mask)).reshape(*rows, length)
        if self._logits.shape != (prompts, beams, self._vocab):
            self._logits = np.empty((prompts, beams, self._vocab), np.float32)
            self._graph.into("logits", self._logits.reshape(*rows, self._vocab))
        self._graph.feed(feeds)
        self._graph.feed({tensor.name: value for tensor, value in zip(self._past, past, strict=True)})
        return self._logits, self._graph.run()
