"""One run of a dynamic decoder: words, after whatever came before them, to the logits of the next word.

The graphs take M sequences of each of B prompts, which share what they look at: keys and values of the picture or of what was
read; those of language models the prompt's own. R rows of the past, L words, P words before them in their row, C places that
are shared, Q queries of the Q-Former, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnxruntime import OrtValue

from models.generation_spec import CROSS, PAST, PROMPT_KV, PROMPT_MASK, ROWS
from models.spec import TensorSpec
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
        self._prompt_kv = [tensor for tensor in spec.inputs if tensor.name.startswith(PROMPT_KV)]
        self._vocab = int(logits.shape[-1])
        self._begun = begun
        self._beside = dict(begun.beside)
        self._going = np.arange(len(begun.ids))  # (B,) the prompts
        self._shared = np.zeros((len(begun.ids), 0), np.int64)  # (N, C) what of the prompt is shared, 0 where it is padding
        self._logits = np.empty((0, 0, 0), np.float32)
        self._graph = Bound(backend, [tensor.name for tensor in present] if caches else [])
        if self.shares_prompt:
            none = [tensor.bind(len(begun.ids), 0, **{CROSS: 0}) for tensor in self._prompt_kv]
            self._share(_empty(none), self._shared)
        self._graph.feed(self._beside)

    @property
    def shares_prompt(self) -> bool:
        """Whether sequences can look at what was kept of their prompt without a copy for each."""
        return bool(self._prompt_kv)

    def share_prompt(self, present: Sequence[OrtValue], seen: np.ndarray) -> None:
        """From now on have all sequences of each of the N prompts look at this: (N, H, C, K) of every layer, of which
        `seen` (N, C) is no padding. Before the first prompt has ended."""
        self._share(present, seen)
        self._graph.feed(self._beside)

    def _share(self, kept: Sequence[OrtValue], seen: np.ndarray) -> None:
        self._shared = seen
        named = {tensor.name: value for tensor, value in zip(self._prompt_kv, kept, strict=True)}
        self._beside |= {PROMPT_MASK: seen, **named}

    def nothing(self, rows: int) -> list[OrtValue]:
        """A past of no words: (R, H, 0, K) of every layer."""
        return _empty([tensor.bind(rows, 0, **{ROWS: rows, PAST: 0}) for tensor in self._past])

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
            past: (R, H, P, K) of every layer, but for what is shared.
            seen: (B, M, P) int64, 0 where what a sequence goes on from is padding.
            first: whether nothing came before the words but the queries, where the decoder reads any.

        Returns:
            float32 logits (B, M, V), overwritten by the next run, and the past that the next run may go on from.
        """
        prompts, beams, _ = ids.shape
        feeds = {"text_ids": ids, "text_atten_mask": mask, "past_mask": seen, "beam_index": parents}
        before = seen.sum(axis=2, keepdims=True) + self._shared[self._going].sum(axis=1)[:, None, None]  # (B, M, 1)
        if self._begun.llm_prompt is not None:
            queries = self._begun.llm_prompt[self._going, None, : None if first else 0]  # (B, 1, Q or 0, E)
            feeds["llm_prompt"] = np.repeat(queries, beams, axis=1)
            before += queries.shape[2]
        feeds["positions"] = before + counted_before(mask)
        if self._logits.shape != (prompts, beams, self._vocab):
            self._logits = np.empty((prompts, beams, self._vocab), np.float32)
            self._graph.into("logits", self._logits)
        self._graph.feed(feeds)
        self._graph.feed({tensor.name: value for tensor, value in zip(self._past, past, strict=True)})
        return self._logits, self._graph.run()


def _empty(tensors: Sequence[TensorSpec]) -> list[OrtValue]:
    return [OrtValue.ortvalue_from_numpy(np.empty([int(dim) for dim in t.shape], t.dtype)) for t in tensors]
