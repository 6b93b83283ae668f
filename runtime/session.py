"""One graph, ready to run: named arrays in, named arrays out, each checked against the GraphSpec.

A graph with fixed axes is padded here and the padding is cut off here: callers never see it. Of a graph that is there for several
text lengths the shortest that holds the texts is run. On several devices a batch has rows for each of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np

from models.errors import UserError
from models.spec import BATCH, LENGTH, GraphSpec, TensorSpec
from runtime.graphs import Graphs, fixed_sizes

PROVIDERS = ("cpu", "cuda", "cann")


class Backend(Protocol):
    """What runs a graph: arrays by name in, arrays in the order of the graph's outputs out."""

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]: ...


class Session:
    """A graph of a graphs/ or om/ folder on a backend."""

    def __init__(
        self,
        spec: GraphSpec,
        backend: Backend,
        batch: int | None,
        length: int | None,
        devices: int = 1,
        shorter: Mapping[int, Backend] = MappingProxyType({}),
    ) -> None:
        """`batch` and `length`: fixed, or None when any will do; `devices`: how many the backend has, for a batch each;
        `shorter`: backends of the same graph and batch for shorter texts, by their length."""
        self.spec = spec  # symbolic
        self.batch = None if batch is None else batch * devices  # the most rows of a run, None when any number will do
        self.each = batch  # rows of one device: always as many
        self.length = length  # the most tokens of a text, None when any number will do
        self._by_length: dict[int | None, Backend] = {**{held: shorter[held] for held in sorted(shorter)}, length: backend}

    def filled(self, rows: int) -> int:
        """How many rows a run is fed when so many, or more, are to go through it: whole batches, for as many devices as it
        takes."""
        return rows if self.each is None else min(self.batch or rows, -(-rows // self.each) * self.each)

    def npu_ms(self) -> list[float]:
        """How long each run took on the NPUs alone, in ms, those of all devices, and of all text lengths from the shortest on,
        one after the other; none elsewhere."""
        measured: list[Callable[[], list[float]]] = [getattr(each, "npu_ms", list) for each in self._by_length.values()]
        return [time for times in measured for time in times()]

    def run(self, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        """Run the graph on one batch.

        Args:
            feeds: one array per input of the spec, by name; batches up to `batch` and texts up to `length`.

        Returns:
            One array per output of the spec, with as many rows as the batch fed, and texts as long as those fed.

        Raises:
            UserError: a name, dtype or shape is not the graph's.
        """
        sizes = check_feeds(self.spec, feeds)
        rows, length = sizes.get(BATCH, 1), sizes.get(LENGTH, 1)
        if rows > (self.batch or rows) or length > (self.length or length):
            form = f"{self.batch or 'any number of'} rows of length {self.length or 'any'}"
            raise UserError(f"{self.spec.name} was exported for {form}; it was fed {rows} rows of length {length}.")
        fitting = next((held for held in self._by_length if held is not None and held >= length), self.length)
        padded = {t.name: self._padded(t, feeds[t.name], fitting) for t in self.spec.inputs}
        found = self._by_length[fitting].run(padded)
        return {t.name: _cut(array, t.bind(rows, length)) for t, array in zip(self.spec.outputs, found, strict=True)}

    def _padded(self, spec: TensorSpec, array: np.ndarray, length: int | None) -> np.ndarray:
        """Fill the fixed axes: empty text positions up to `length` with 0 (mask 0), empty rows with copies of the last one."""
        for axis, dim in enumerate(spec.shape):
            fixed = {BATCH: self.filled(array.shape[axis]), LENGTH: length}.get(str(dim))
            if fixed and (short := fixed - array.shape[axis]):
                before_after = [(0, short if at == axis else 0) for at in range(array.ndim)]
                array = np.pad(array, before_after, mode="edge" if dim == BATCH else "constant")
        return np.ascontiguousarray(array)


def _cut(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """The part of a graph's output that is not padding, as a view."""
    return array[tuple(slice(dim) if isinstance(dim, int) else slice(None) for dim in spec.shape)]


def check_feeds(spec: GraphSpec, feeds: dict[str, np.ndarray]) -> dict[str, int]:
    """Raise UserError unless `feeds` are the inputs of `spec`; returns the sizes of the symbolic axes."""
    wanted = [t.name for t in spec.inputs]
    if set(feeds) != set(wanted):
        raise UserError(f"{spec.name} takes {', '.join(wanted)}; it was fed {', '.join(sorted(feeds)) or 'nothing'}.")
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        array = feeds[tensor.name]
        if array.dtype != np.dtype(tensor.dtype):
            raise UserError(f"{spec.name}: {tensor.name} is {array.dtype}, the graph takes {tensor.dtype}.")
        fits = array.ndim == len(tensor.shape)
        for dim, found in zip(tensor.shape, array.shape, strict=False):
            fits = fits and (sizes.setdefault(dim, found) if isinstance(dim, str) else dim) == found
        if not fits:
            raise UserError(f"{spec.name}: {tensor.name} has shape {list(array.shape)}, the graph takes {list(tensor.shape)}.")
    return sizes


def open_session(graphs: Graphs, name: str, provider: str = "cpu", threads: int | None = None) -> Session:
    """Load graph `name`: of an om/ folder on its NPUs, else on `provider`. Raises UserError when the provider, the NPU or the
    graph cannot be used; warns of what is odd in the graph and does no harm."""
    # Imported here, so that reading outputs needs no engine.
    if graphs.is_om:
        from runtime.devices import open_om

        # All at once: one that cannot be loaded is to be known before hours of work.
        entries = (graphs.oms[name], *graphs.shorter[name])
        longest, *others = (open_om(graphs.source.folder, entry, graphs.symbolic[name], graphs.devices) for entry in entries)
        for note in (note for om in (longest, *others) for note in om.notes):
            warnings.warn(note, stacklevel=2)
        shorter = {int(entry.length or 0): om for entry, om in zip(graphs.shorter[name], others, strict=True)}
        return Session(graphs.symbolic[name], longest, *fixed_sizes(graphs, name), len(graphs.devices), shorter)
    from runtime.onnx_session import OnnxBackend

    backend = OnnxBackend(graphs.path(name), graphs.written[name], provider, threads)
    return Session(graphs.symbolic[name], backend, *fixed_sizes(graphs, name))
