"""One graph, ready to run: named arrays in, named arrays out, each checked against the GraphSpec.

A graph with fixed axes is padded here and the padding is cut off here: callers never see it.
"""

from __future__ import annotations

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
    """A graph of a graphs/ folder on a backend."""

    def __init__(self, spec: GraphSpec, backend: Backend, batch: int | None, length: int | None) -> None:
        self.spec = spec  # symbolic
        self.batch = batch  # the fixed batch, None when any will do
        self.length = length  # the fixed text length, None when any will do
        self._backend = backend

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
        padded = {t.name: self._padded(t, feeds[t.name]) for t in self.spec.inputs}
        found = self._backend.run(padded)
        return {t.name: _cut(array, t.bind(rows, length)) for t, array in zip(self.spec.outputs, found, strict=True)}

    def _padded(self, spec: TensorSpec, array: np.ndarray) -> np.ndarray:
        """Fill the fixed axes: empty text positions with 0 (mask 0), empty rows with copies of the last one."""
        for axis, dim in enumerate(spec.shape):
            fixed = {BATCH: self.batch, LENGTH: self.length}.get(str(dim))
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
    """Load graph `name` on `provider`. Raises UserError when the provider or the graph cannot be used."""
    # Imported here, so that reading outputs needs no engine.
    from runtime.onnx_session import OnnxBackend

    backend = OnnxBackend(graphs.path(name), graphs.written[name], provider, threads)
    return Session(graphs.symbolic[name], backend, *fixed_sizes(graphs, name))
