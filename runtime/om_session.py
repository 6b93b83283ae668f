"""Running a graph compiled for an NPU, through the Python interface of Ascend's ais_bench, as it was in 2023 and as it is now.

ais_bench compares byte counts alone: a wrong dtype of the right size would give numbers that look like results. So all that a
file says of itself is compared with its manifest when it is opened, and what is fed before each run.
"""

from __future__ import annotations

import importlib
import inspect
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import UserError
from models.om import DYNAMIC_BATCH, DYNAMIC_DIMS, FIXED
from models.spec import Dim, GraphSpec, TensorSpec
from runtime.ais_bench_look import DTYPES

FLOAT, HALF = "float32", "float16"
MEND = "Compile the graph again with blip-atc."


class OmBackend:
    """One .om file on one NPU. It is to be run in the thread that opened it: ais_bench of 2023 keeps the NPU by thread."""

    def __init__(self, path: Path, spec: GraphSpec, device: int, dynamic: str = FIXED) -> None:
        """`spec`: every axis a number, float16 where the file is fed it or gives it; `dynamic`: one of models.om.DYNAMIC, for a
        file that takes other batches, too. Raises UserError when ais_bench is not there, when the file cannot be loaded on NPU
        `device`, or is not this graph."""
        self.spec, self._path, self._device, self._dynamic = spec, path, device, dynamic
        made = infer_session()
        try:
            session = made(device, str(path))
            if dynamic == DYNAMIC_BATCH:
                session.set_dynamic_batchsize(int(spec.inputs[0].shape[0]))
            elif dynamic == DYNAMIC_DIMS:
                session.set_dynamic_dims(_dims([described.name for described in session.get_inputs()], spec))
            takes, gives = list(session.get_inputs()), list(session.get_outputs())
        except Exception as error:  # RuntimeError of aclruntime, and whatever ais_bench's checks of the path raise
            raise UserError(
                f"{path} cannot be loaded on NPU {device}: {_first_line(error)} It must be compiled for this NPU (npu-smi info); "
                "ais_bench takes paths of plain letters, no links, and files of this user or group that nobody else can write."
            ) from error
        self._session = session
        self._released = weakref.finalize(self, _release, session)
        try:
            self._takes = self._inputs(takes)
            self._order = self._outputs(gives)
        except UserError:
            self.close()
            raise
        self.notes = self._pruned()
        # infer() of today would take the batch back that was set.
        self._run = session.infer if dynamic == FIXED else session.run
        # The infer() of 2023 gives arrays and knows no other way.
        self._asked = {"out_array": True} if "out_array" in inspect.signature(self._run).parameters else {}

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Arrays by name, float32 where the file takes float16, to the outputs in the order of the spec, widened to float32.

        Raises UserError when an array is not what the file takes, when the NPU fails, or gives something else.
        """
        given = [self._fed(tensor, feeds[tensor.name]) for tensor in self._takes]
        try:
            found = self._run(given, **self._asked)  # a list: nothing else is taken today
        except Exception as error:
            raise UserError(
                f"{self.spec.name} failed on NPU {self._device} ({self._path}): {_first_line(error)} "
                "CANN's log, in ~/ascend/log, says more."
            ) from error
        return [self._given(tensor, found[index]) for tensor, index in zip(self.spec.outputs, self._order, strict=True)]

    def npu_ms(self) -> list[float]:
        """How long each run took on the NPU, in ms: copies to it and from it left out."""
        if not self._released.alive:
            return []
        summary = getattr(self._session, "summary", None) or self._session.sumary
        # In 2023 a number for each run, today when it began and when it ended.
        return [float(time[1] - time[0] if isinstance(time, Sequence) else time) for time in summary().exec_time_list]

    def close(self) -> None:
        """Give the NPU's memory back, as is done when nobody holds this any more."""
        self._released()
        self._session = self._run = None

    def _inputs(self, found: list[Any]) -> list[TensorSpec]:
        """What the file takes, in its order, which may be another, and without inputs that the compiler found unused."""
        ours = {tensor.name: tensor for tensor in self.spec.inputs}
        for described in found:
            if described.name not in ours:
                raise self._not_ours(f"takes an input {described.name!r}; expected {', '.join(ours)}")
            self._compare("takes", ours[described.name], described)
        return [ours[described.name] for described in found]

    def _outputs(self, found: list[Any]) -> list[int]:
        """Where the spec's outputs stand in those of the file: by name, which ATC writes as node:index:name, else by place."""
        ours = [tensor.name for tensor in self.spec.outputs]
        names = [str(described.name).rpartition(":")[2] for described in found]
        if len(found) != len(ours):
            raise self._not_ours(f"gives {len(found)} outputs, {', '.join(names)}; expected {', '.join(ours)}")
        order = [names.index(name) for name in ours] if sorted(names) == sorted(ours) else list(range(len(ours)))
        if odd := [name for n, name in enumerate(names) if name in ours and order[ours.index(name)] != n]:
            raise self._not_ours(f"gives {', '.join(names)}; expected {', '.join(ours)}, and {odd[0]} is in another place")
        for tensor, index in zip(self.spec.outputs, order, strict=True):
            self._compare("gives", tensor, found[index])
        return order

    def _compare(self, verb: str, tensor: TensorSpec, described: Any) -> None:
        dtype, shape = DTYPES.get(int(described.datatype), f"aclDataType {described.datatype}"), tuple(described.shape)
        widened = verb == "gives" and (dtype, tensor.dtype) == (HALF, FLOAT)
        if dtype != tensor.dtype and not widened:
            raise self._not_ours(f"{verb} {tensor.name} as {dtype}; expected {tensor.dtype}")
        given_by_run = self._dynamic != FIXED and verb == "gives"  # what it says before may be the largest, or nothing
        fits = len(shape) == len(tensor.shape) and all(
            found in (dim, -1 if self._dynamic != FIXED else dim) for found, dim in zip(shape, tensor.shape, strict=True)
        )
        if not fits and not given_by_run:
            raise self._not_ours(f"{verb} {tensor.name} of shape {list(shape)}; expected {list(tensor.shape)}")
        if (size := _bytes(tensor.shape, dtype)) != described.realsize and not given_by_run:
            raise self._not_ours(f"{verb} {tensor.name} in {described.realsize:,} bytes; expected {size:,}")

    def _pruned(self) -> list[str]:
        """What is to be said of inputs that the file does not take."""
        there = {tensor.name for tensor in self._takes}
        pruned = [tensor.name for tensor in self.spec.inputs if tensor.name not in there]
        return [f"{self._path} does not take {name}: the compiler found it unused, it is not fed." for name in pruned]

    def _fed(self, tensor: TensorSpec, array: np.ndarray) -> np.ndarray:
        """`array` as the file takes it: checked, float16 if it is to be, and contiguous, since its bytes are read in a row."""
        if (str(array.dtype), tensor.dtype) == (FLOAT, HALF):
            with np.errstate(over="ignore"):
                half = array.astype(np.float16)
            if np.isinf(half).any() and np.isfinite(array).all():
                raise UserError(
                    f"{self.spec.name}: {tensor.name} holds {np.abs(array).max():.4g}, beyond float16, in which {self._path} "
                    "takes it. Compile the graph so that it takes float32."
                )
            array = half
        size = _bytes(tensor.shape, tensor.dtype)
        if array.dtype != np.dtype(tensor.dtype) or array.shape != tensor.shape or array.nbytes != size:
            raise UserError(
                f"{self.spec.name}: {tensor.name} is {array.dtype} {list(array.shape)}, {array.nbytes:,} bytes; {self._path} "
                f"takes {tensor.dtype} {list(tensor.shape)}, {size:,} bytes."
            )
        return np.ascontiguousarray(array)

    def _given(self, tensor: TensorSpec, array: np.ndarray) -> np.ndarray:
        wanted = FLOAT if tensor.dtype == HALF else tensor.dtype
        if str(array.dtype) not in (HALF, wanted) or array.shape != tensor.shape:
            raise self._not_ours(
                f"gave {tensor.name} as {array.dtype} {list(array.shape)}; expected {wanted} {list(tensor.shape)}"
            )
        return array.astype(wanted, copy=False)

    def _not_ours(self, found: str) -> UserError:
        return UserError(f"{self.spec.name}: {self._path} {found}. {MEND}")


def infer_session() -> Any:
    """ais_bench's InferSession. Raises UserError when it is not installed, or CANN's libraries are not found."""
    try:
        return importlib.import_module("ais_bench.infer.interface").InferSession
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"Files compiled for an NPU run through Ascend's ais_bench, and it cannot be imported ({_first_line(error)[:-1]}). "
            "Source CANN's set_env.sh in this shell, and install the wheels aclruntime and ais_bench of Ascend's tools "
            "(ais-bench_workload); PyPI has neither of them."
        ) from error


def _bytes(shape: tuple[Dim, ...], dtype: str) -> int:
    return math.prod(int(dim) for dim in shape) * np.dtype(dtype).itemsize


def _dims(names: list[str], spec: GraphSpec) -> str:
    """The shapes of the inputs as ais_bench writes them: "a:1,35;b:1"."""
    shapes = {tensor.name: ",".join(map(str, tensor.shape)) for tensor in spec.inputs}
    return ";".join(f"{name}:{shapes.get(name, '')}" for name in names)


def _release(session: Any) -> None:
    """Free what a session holds on the NPU. That of 2023 does so when it is deleted: its finalize() would end the runtime for
    every other session, too."""
    if hasattr(session, "free_resource"):
        session.free_resource()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0].rstrip(". ") + "."
