"""Word by word with a buffer of fixed size that is filled here: for graphs with fixed axes, which return only what is new.

N prompts, B of them still going, M sequences of each, L words, Q queries of the Q-Former, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from models.errors import UserError
from models.generation_spec import BEAMS
from runtime.batches import slices
from runtime.begun import Begun, counted_before
from runtime.bound import fetched
from runtime.session import Session
from runtime.slots import SlotGraph

Sizes = Mapping[str, int]


class StaticSteps:
    """`runtime.decoding.Steps` over a decoder that looks at something, and whose prompt is read word by word.

    The logits of a step are overwritten by the next one.
    """

    def __init__(self, session: Session, sizes: Sizes, begun: Begun) -> None:
        self._ids, self._mask = begun.ids, begun.mask  # (N, L)
        beside = {name: fetched(value) for name, value in begun.beside.items()}
        self._graph = SlotGraph(session, sizes, beside, len(begun.ids), sizes[BEAMS])
        self._going, self._beams = np.arange(len(begun.ids)), 1

    def start(self) -> np.ndarray:
        for ids, mask in zip(self._ids.T[:-1], self._mask.T[:-1], strict=True):
            self._graph.read(ids[:, None], mask[:, None])
        return self._graph.read(self._ids[:, -1:], self._mask[:, -1:])[:, 0]

    def step(self, ids: np.ndarray, parents: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        if len(prompts) < len(self._going):
            self._graph.leave(np.searchsorted(self._going, prompts))
        self._graph.go_on(*np.divmod(parents, self._beams))
        self._going, self._beams = prompts, ids.shape[1]
        return self._graph.read(ids, np.ones_like(ids))


class PrefilledSteps:
    """`runtime.decoding.Steps` over a language model: one graph reads queries and prompt at once, another word after word.

    The logits of a step are overwritten by the next one.
    """

    def __init__(self, prefill: Session, decode: Session, sizes: Sizes, begun: Begun) -> None:
        """`sizes`: those of `decode`."""
        self._prefill, self._decode, self._sizes, self._begun = prefill, decode, sizes, begun
        self._graph: SlotGraph | None = None
        self._beams = 1

    def start(self) -> np.ndarray:
        """Prompts shorter than the graph's are padded on the left, and what it gives of that padding is left out."""
        begun, (count, words) = self._begun, self._begun.ids.shape
        assert begun.llm_prompt is not None
        refuse_longer(self._prefill, words)
        short = (self._prefill.length or words) - words
        ids, mask = (np.pad(array, ((0, 0), (short, 0))) for array in (begun.ids, begun.mask))
        positions = begun.queries + counted_before(mask)
        parts = [
            self._prefill.run(
                llm_prompt=begun.llm_prompt[part], text_ids=ids[part], text_atten_mask=mask[part], positions=positions[part]
            )
            for part in slices(0, count, self._prefill.batch or count)
        ]
        used = np.delete(np.arange(begun.queries + ids.shape[1]), slice(begun.queries, begun.queries + short))
        self._first = np.concatenate([found["present"][:, :, :, used] for found in parts])  # (N, 2 * layers, H, Q + L, K)
        return np.concatenate([found["logits"] for found in parts])

    def step(self, ids: np.ndarray, parents: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        if self._graph is None:
            self._graph = SlotGraph(self._decode, self._sizes, {}, *ids.shape)
            queries = np.ones((len(self._begun.mask), self._begun.queries), np.int64)
            self._graph.fill(self._first, np.concatenate([queries, self._begun.mask], axis=1), parents)
            del self._first
        else:
            self._graph.go_on(*np.divmod(parents, self._beams))
        self._beams = ids.shape[1]
        return self._graph.read(ids, np.ones_like(ids))


def refuse_longer(session: Session, words: int) -> None:
    """Raise UserError when a prompt of that many tokens is longer than a graph of fixed length takes."""
    if session.length is not None and words > session.length:
        raise UserError(
            f"A prompt has {words} tokens, {session.spec.name} was exported for {session.length}. "
            f"Shorten it, or export the graphs with --length {words}."
        )
