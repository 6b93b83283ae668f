"""Where graphs run, and where what they give is kept: in ONNX Runtime, or in arrays here when the graphs have fixed axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from onnxruntime import OrtValue

from models.generation_spec import CROSS, SLOTS
from models.spec import LENGTH
from runtime.batches import slices
from runtime.begun import Begun
from runtime.bound import Bound, Value, fetched, rows_of
from runtime.decoding import Steps
from runtime.dynamic_steps import DynamicSteps
from runtime.graphs import Graphs, all_sizes
from runtime.onnx_session import OnnxBackend
from runtime.session import open_session
from runtime.static_steps import PrefilledSteps, StaticSteps, refuse_longer
from runtime.whole_steps import WholeSteps


class Engine(Protocol):
    """The graphs of one model, open."""

    def read(self, name: str, feeds: Mapping[str, Value]) -> dict[str, Value]:
        """Run graph `name`; texts are padded on the right. What it gives may have padding at its end on the axis of texts."""

    def rows(self, value: Value, rows: np.ndarray) -> Value:
        """Some rows of a value, kept where it is."""

    def steps(self, begun: Begun) -> Steps:
        """The decoder over what was begun."""

    def slots(self) -> int | None:
        """How many words before the one that is read the decoder can keep; None when any number."""


class DynamicEngine:
    """Graphs of any size in ONNX Runtime, which keeps what passes between them."""

    def __init__(
        self, graphs: Graphs, names: Sequence[str], writer: str, provider: str, threads: int | None, use_past: bool
    ) -> None:
        self._open = {name: OnnxBackend(graphs.path(name), graphs.written[name], provider, threads) for name in names}
        self._writer, self._use_past = self._open[writer], use_past

    def read(self, name: str, feeds: Mapping[str, Value]) -> dict[str, Value]:
        backend = self._open[name]
        outputs = [tensor.name for tensor in backend.spec.outputs]
        graph = Bound(backend, outputs)
        graph.feed(feeds)
        return dict(zip(outputs, graph.run(), strict=True))

    def rows(self, value: Value, rows: np.ndarray) -> Value:
        return rows_of(value, rows) if isinstance(value, OrtValue) else value[rows]

    def steps(self, begun: Begun) -> Steps:
        return (DynamicSteps if self._use_past else WholeSteps)(self._writer, begun)

    def slots(self) -> int | None:
        return None


class StaticEngine:
    """Graphs of fixed size: what is fed is cut into batches and padded, what they give is kept here."""

    def __init__(
        self, graphs: Graphs, names: Sequence[str], writers: tuple[str, ...], provider: str, threads: int | None
    ) -> None:
        self._open = {name: open_session(graphs, name, provider, threads) for name in names}
        self._writers = [self._open[name] for name in writers]
        self._sizes = all_sizes(graphs, writers[-1])

    def read(self, name: str, feeds: Mapping[str, Value]) -> dict[str, Value]:
        session = self._open[name]
        whole = {}
        for tensor in session.spec.inputs:
            array = fetched(feeds[tensor.name])
            if LENGTH in tensor.shape and session.length is not None:
                refuse_longer(session, array.shape[1])
                array = np.pad(array, ((0, 0), (0, session.length - array.shape[1])))
            whole[tensor.name] = array
        count = min(len(array) for array in whole.values())
        parts = [
            session.run(**{name: array[part] for name, array in whole.items()})
            for part in slices(0, count, session.batch or count)
        ]
        return {tensor.name: np.concatenate([found[tensor.name] for found in parts]) for tensor in session.spec.outputs}

    def rows(self, value: Value, rows: np.ndarray) -> Value:
        return fetched(value)[rows]

    def steps(self, begun: Begun) -> Steps:
        if len(self._writers) > 1:
            prefill, decode = self._writers
            return PrefilledSteps(prefill, decode, self._sizes, begun)
        (decoder,) = self._writers
        if CROSS in self._sizes:  # what is looked at is as long as the graph's, its mask as the text
            mask = fetched(begun.beside["cross_mask"])
            wide = np.pad(mask, ((0, 0), (0, self._sizes[CROSS] - mask.shape[1])))
            begun = replace(begun, beside={**begun.beside, "cross_mask": wide})
        return StaticSteps(decoder, self._sizes, begun)

    def slots(self) -> int | None:
        return self._sizes[SLOTS]
