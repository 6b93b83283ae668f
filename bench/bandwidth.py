"""The other roof: how fast this machine reads float32 from memory.

A decoder that writes one word reads all its weights for it, and does little with each: it cannot be faster than they come.
Two ways to read, on the same threads; what the faster one reaches is the roof.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from tqdm import tqdm

from bench.measure import Work, time_loops
from runtime.onnx_session import available_provider

LOOPS = 7
COLUMNS = 4096  # of what is read: ONNX Runtime gives each thread some rows
LEAST, MOST = 1 << 29, 1 << 32  # bytes of it
CACHES = 4  # times the largest cache, so that little of it stays there from one loop to the next
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Bandwidth:
    """What several ways to read reach; `gb_per_s` (1e9 bytes a second) by way."""

    threads: int
    bytes: int  # read by each loop
    gb_per_s: dict[str, float]

    @property
    def best(self) -> float:
        """What the fastest way reached: the roof that shares are of."""
        return max(self.gb_per_s.values())

    @property
    def best_way(self) -> str:
        return max(self.gb_per_s, key=lambda name: self.gb_per_s[name])

    def merged(self, other: Bandwidth) -> Bandwidth:
        """The better of two measurements of each way: a disturbance can only make them slower."""
        better = {name: max(value, other.gb_per_s.get(name, 0.0)) for name, value in self.gb_per_s.items()}
        return Bandwidth(self.threads, self.bytes, better)


def read_bandwidth(threads: int, provider: str, size: int | None = None) -> Bandwidth:
    """The sum of an array of `size` bytes (None: several times the caches): by ONNX Runtime where the graphs run, and, where
    that is the processor, by numpy, a part of it in each of as many threads."""
    rows = (size or beyond_caches()) // (4 * COLUMNS)
    array = np.ones((rows, COLUMNS), np.float32)  # written, so that the system has given it memory
    ways: dict[str, Callable[[], Work]] = {"ONNX Runtime ReduceSum": lambda: _in_onnxruntime(array, threads, provider)}
    if provider == "cpu":
        ways["numpy sum"] = lambda: _in_numpy(array, threads)
    found = {}
    for name, work in tqdm(ways.items(), "read bandwidth", unit=" ways", disable=None, leave=False):
        # The median loop, as of the graphs: what the machine keeps up, not one lucky loop.
        found[name] = round(array.nbytes / time_loops(work(), LOOPS, warmup=2).median / 1e9, 2)
    return Bandwidth(threads, array.nbytes, found)


def beyond_caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes that the caches hold only a small part of."""
    largest = max((_bytes(path.read_text("ascii").strip()) for path in folder.glob("index*/size")), default=0)
    return min(max(LEAST, CACHES * largest), MOST)


def _bytes(said: str) -> int:
    """48K, 32768K; 0 for what is no size."""
    number, unit = said[:-1], said[-1:]
    return int(number) * UNITS[unit] if number.isdecimal() and unit in UNITS else 0


def _in_numpy(array: np.ndarray, threads: int) -> Work:
    parts = np.array_split(array, threads)
    pool = ThreadPoolExecutor(threads)  # sums of numpy run side by side: they let go of the interpreter's lock
    return lambda: sum(pool.map(np.sum, parts))


def _in_onnxruntime(array: np.ndarray, threads: int, provider: str) -> Work:
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)],
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, array.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, array.shape[:1])],
        [numpy_helper.from_array(np.array([1]), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[available_provider(provider)])
    bound = session.io_binding()
    kept = (
        onnxruntime.OrtValue.ortvalue_from_numpy(array, provider, 0),
        onnxruntime.OrtValue.ortvalue_from_shape_and_type(array.shape[:1], np.float32, provider, 0),
    )
    bound.bind_ortvalue_input("x", kept[0])
    bound.bind_ortvalue_output("y", kept[1])

    def run(kept: object = kept) -> None:  # held here: older releases of ONNX Runtime keep only the addresses
        session.run_with_iobinding(bound)

    return run
