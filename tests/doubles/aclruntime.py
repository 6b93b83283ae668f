"""A stand-in for Ascend's aclruntime: runs an ONNX file that is called .om in ONNX Runtime.

It follows what is known of the real one: byte counts are compared and nothing else, pointers are read raw, outputs are called
node:index:name, times come as numbers (2023) or as pairs (2025), and the NPU is a thread's (2023) or a session's (2025). Which
of the two it is, GENERATION in the environment says.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from models.engine import DISABLED_OPTIMIZERS

GENERATION = "AIS_BENCH_GENERATION"
NUMBERS = {
    **{"float": 0, "float16": 1, "int8": 2, "int32": 3, "uint8": 4, "int16": 6, "uint16": 7, "uint32": 8},
    **{"int64": 9, "uint64": 10, "double": 11, "bool": 12},
}
NUMPY = {0: "float32", 1: "float16", 2: "int8", 3: "int32", 4: "uint8", 6: "int16", 7: "uint16", 8: "uint32", 9: "int64"}
NUMPY |= {10: "uint64", 11: "float64", 12: "bool"}
FAILED = "[-1][ACL: general failure] "

loaded: weakref.WeakSet[InferenceSession] = weakref.WeakSet()  # whose model is on the NPU
runs: list[int] = []  # the NPU of each run of this process
ran: list[str] = []  # and its file
_of_thread = threading.local()
_ended: list[bool] = []  # finalize() was called


def generation() -> int:
    """2023 or 2025."""
    return int(os.environ.get(GENERATION, "2025"))


class session_options:  # noqa: N801
    def __init__(self) -> None:
        self.log_level, self.loop, self.acl_json_path = 2, 1, ""


class infer_options:  # noqa: N801
    pass


class MemorySummary:
    H2D_time_list: list[float] = []  # noqa: RUF012
    D2H_time_list: list[float] = []  # noqa: RUF012

    def reset(self) -> None:
        self.H2D_time_list.clear()
        self.D2H_time_list.clear()


class BaseTensor:
    """A pointer: what it points to is read when a session runs."""

    def __init__(self, buf: int, size: int) -> None:
        self.buf, self.size = buf, size

    def data(self) -> bytes:
        return ctypes.string_at(self.buf, self.size)


class Tensor:
    """An array, here or on an NPU."""

    def __init__(self, array: np.ndarray) -> None:
        self._array, self.device = np.array(array), -1
        self.shape, self.dtype, self.size = list(array.shape), array.dtype, array.nbytes

    def to_device(self, device: int) -> None:
        self.device = device

    def to_host(self) -> None:
        self.device = -1

    def data(self) -> bytes:
        return self._array.tobytes()

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        assert self.device == -1, "the tensor is on the NPU"
        return self._array


class InferenceSession:
    """One model on one NPU."""

    def __init__(self, path: str, device: int, options: session_options) -> None:
        if _ended:
            raise RuntimeError("[1003][ACL: repeat initialize] ")
        try:
            self._session = onnxruntime.InferenceSession(path, _one_thread(), disabled_optimizers=DISABLED_OPTIMIZERS["cpu"])
        except Exception as error:
            print(f"[ERROR] load model from file failed, model file is {path}")
            raise RuntimeError(FAILED) from error
        self._path, self._device, self._options, self._times = path, device, options, list[Any]()
        self._inputs = [_described(v, v.name) for v in self._session.get_inputs()]
        self._shapes = [wanted.shape for wanted in self._inputs]
        self._outputs = [_described(v, f"Node_{n}:0:{v.name}") for n, v in enumerate(self._session.get_outputs())]
        _of_thread.device = device
        loaded.add(self)

    def get_inputs(self) -> list[Any]:
        return self._inputs

    def get_outputs(self) -> list[Any]:
        return self._outputs

    def options(self) -> session_options:
        return self._options

    def run(self, names: list[str], feeds: list[BaseTensor | Tensor]) -> list[Tensor]:
        self.set_context()
        for n, (feed, wanted) in enumerate(zip(feeds, self._inputs, strict=False)):
            if feed.size != wanted.realsize:
                print(f"[ERROR] Check i:{n} name:{wanted.name} in size:{feed.size} needsize:{wanted.realsize} not match")
                raise RuntimeError(FAILED)
        if len(feeds) != len(self._inputs):
            print(f"[WARN] intensors in:{len(feeds)} need:{len(self._inputs)} not match")
            raise RuntimeError(FAILED)
        given = {
            wanted.name: np.frombuffer(feed.data(), NUMPY[wanted.datatype]).reshape(shape)
            for feed, wanted, shape in zip(feeds, self._inputs, self._shapes, strict=True)
        }
        found: list[np.ndarray] = []
        for _ in range(self._options.loop):
            began = time.perf_counter() * 1000
            try:
                found = self._session.run(None, given)
            except Exception as error:
                print("[ERROR] acl execute failed:507018")
                raise RuntimeError(FAILED) from error
            ended = time.perf_counter() * 1000
            self._times.append((began, ended) if generation() == 2025 else ended - began)
        runs.append(self._device)
        ran.append(self._path)
        by_name = {described.name: array for described, array in zip(self._outputs, found, strict=True)}
        tensors = [Tensor(by_name[name]) for name in names]
        for tensor in tensors:
            tensor.to_device(self._device)
        return tensors

    def sumary(self) -> Any:
        return SimpleNamespace(exec_time_list=self._times)

    def reset_sumaryinfo(self) -> None:
        self._times.clear()

    def set_staticbatch(self) -> None:
        """Take back what was set: a model with open axes cannot be run then."""
        self.set_context()
        self._shapes = [wanted.shape for wanted in self._inputs]
        for wanted in self._inputs:
            wanted.realsize = wanted.size

    def set_dynamic_batchsize(self, batch: int) -> None:
        self._set([[batch if dim < 0 else dim for dim in wanted.shape] for wanted in self._inputs])

    def set_dynamic_dims(self, dims: str) -> None:
        shapes = {name: [int(dim) for dim in shape.split(",")] for name, shape in (part.split(":") for part in dims.split(";"))}
        self._set([shapes[wanted.name] for wanted in self._inputs])

    def _set(self, shapes: list[list[int]]) -> None:
        """Of a model with open axes: from now on they are these."""
        if all(dim > 0 for wanted in self._inputs for dim in wanted.shape):
            print("[ERROR] check failed dym gearcount:0")
            raise RuntimeError(FAILED)
        self._shapes = shapes
        for wanted, shape in zip(self._inputs, shapes, strict=True):
            wanted.realsize = int(np.prod(shape)) * np.dtype(NUMPY[wanted.datatype]).itemsize

    def _refused(self, *asked: Any) -> None:
        raise RuntimeError(FAILED)

    set_dynamic_hw = set_dynamic_shape = _refused

    def set_custom_outsize(self, sizes: list[int]) -> None:
        """Of models whose outputs may have any size."""

    def create_tensor_from_fileslist(self, described: Any, files: list[str]) -> Tensor:
        """The bytes of the files, one after the other."""
        data = b"".join(np.fromfile(file, np.uint8).tobytes() for file in files)
        if len(data) > described.realsize:
            raise RuntimeError(FAILED)
        array = np.frombuffer(data.ljust(described.realsize, b"\0"), NUMPY[described.datatype]).reshape(described.shape)
        tensor = Tensor(array)
        tensor.to_device(self._device)
        return tensor

    def set_context(self) -> None:
        """Of 2023 an NPU is its thread's alone: that of the session that was made last in it."""
        if _ended or self not in loaded:
            raise RuntimeError(FAILED)
        if generation() == 2025:
            _of_thread.device = self._device
        if getattr(_of_thread, "device", None) != self._device:
            print("[ERROR] create inputdataset failed:107002")
            raise RuntimeError(FAILED)

    def get_dym_aipp_input_exist(self) -> int:
        return 0

    def check_dym_aipp_input_exist(self) -> None:
        pass

    def get_max_dym_batchsize(self) -> int:
        return 0

    def free_resource(self) -> None:
        loaded.discard(self)

    @staticmethod
    def finalize() -> None:
        """Of one session (2023) or of the class (2025): in both it ends all of them."""
        _ended.append(True)
        loaded.clear()


def _one_thread() -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return options


def _described(value: Any, name: str) -> Any:
    number = NUMBERS[value.type.removeprefix("tensor(").removesuffix(")")]
    shape = [dim if isinstance(dim, int) else -1 for dim in value.shape]
    size = int(np.prod(shape)) * np.dtype(NUMPY[number]).itemsize if min(shape, default=1) > 0 else 0
    return SimpleNamespace(name=name, shape=shape, datatype=number, format=2, size=size, realsize=size)
