"""A graph whose inputs stay bound from run to run and whose outputs stay on its device (ONNX Runtime's I/O binding)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from onnxruntime import OrtValue

from runtime.onnx_session import OnnxBackend, failure

Value: TypeAlias = np.ndarray | OrtValue  # an array here, or one where the graphs run


class Bound:
    """One use of a graph: what was fed last is fed again, until it is fed anew."""

    def __init__(self, backend: OnnxBackend, kept: Sequence[str]) -> None:
        """`kept`: the outputs that stay on the device. Those that are neither kept nor sent `into` an array are not fetched."""
        self._backend, self._kept = backend, tuple(kept)
        self._binding = backend.session.io_binding()
        self._written: dict[str, OrtValue] = {}
        for name in self._kept:  # first, so that they are the first outputs
            self._binding.bind_output(name, backend.device)

    def feed(self, feeds: Mapping[str, Value]) -> None:
        """Bind inputs. Arrays are not copied where the graph runs on the CPU: they must stay as they are until it has run.

        Raises UserError when ONNX Runtime does not take one, for its name or dtype.
        """
        try:
            for name, value in feeds.items():
                if isinstance(value, OrtValue):
                    self._binding.bind_ortvalue_input(name, value)
                else:
                    self._binding.bind_cpu_input(name, np.ascontiguousarray(value))
        except Exception as error:
            raise failure(self._backend.spec, error) from error

    def into(self, name: str, array: np.ndarray) -> None:
        """Have output `name` written to `array` by each run, until another array is named: it must have that shape."""
        self._written[name] = OrtValue.ortvalue_from_numpy(array)  # kept: the binding alone would not keep the array alive
        self._binding.bind_ortvalue_output(name, self._written[name])

    def run(self) -> list[OrtValue]:
        """The outputs kept, in order. Raises UserError when ONNX Runtime fails."""
        try:
            for name in self._kept:  # anew, since what is bound to the last run's outputs would have their shapes
                self._binding.bind_output(name, self._backend.device)
            self._backend.session.run_with_iobinding(self._binding)
        except Exception as error:
            raise failure(self._backend.spec, error) from error
        return list(self._binding.get_outputs()[: len(self._kept)])


def rows_of(value: OrtValue, rows: np.ndarray) -> OrtValue:
    """These rows of a value, on its device; the value itself when they are all of it, in order."""
    if np.array_equal(rows, np.arange(value.shape()[0])):
        return value
    return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[rows]), value.device_name())


def fetched(value: Value) -> np.ndarray:
    """A value as an array here. Of one that ONNX Runtime keeps it is a copy: its own array does not keep it alive."""
    if not isinstance(value, OrtValue):
        return value
    copy: np.ndarray = value.numpy().copy()
    return copy
