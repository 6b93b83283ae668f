"""The roof: how fast this machine multiplies large matrices of float32, by the engine's own MatMul.

A graph cannot be faster than that, so what it reaches of it says how much is left to gain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from tqdm import tqdm

from bench.measure import Timing, Work, time_loops
from runtime.onnx_session import available_provider

Product = tuple[int, int, int]  # rows, inner, columns

# A large square one, and the widest layers of ViT-B/16 at 384 for one picture and for sixteen.
PRODUCTS: tuple[Product, ...] = ((4096, 4096, 4096), (577, 768, 3072), (577, 3072, 768), (16 * 577, 768, 3072))


@dataclass(frozen=True)
class Peak:
    """The best of several products; `gflops` (1e9 operations a second) by product."""

    engine: str
    threads: int
    gflops: dict[str, float]

    @property
    def best(self) -> float:
        """What the fastest product reached: the roof that shares are of."""
        return max(self.gflops.values())

    @property
    def best_product(self) -> str:
        """The product that reached it, as rows x inner x columns."""
        return max(self.gflops, key=lambda name: self.gflops[name])

    def merged(self, other: Peak) -> Peak:
        """The better of two measurements of each product: a disturbance can only make them slower."""
        better = {name: max(value, other.gflops.get(name, 0.0)) for name, value in self.gflops.items()}
        return Peak(self.engine, self.threads, better)


def onnxruntime_peak(threads: int, provider: str, products: tuple[Product, ...] | None = None) -> Peak:
    """ONNX Runtime's, with the right side a constant of the graph, as weights are: it may reorder it beforehand."""
    return _peak("ONNX Runtime", threads, products, lambda product: _in_onnxruntime(product, threads, provider))


def torch_peak(threads: int, products: tuple[Product, ...] | None = None) -> Peak:
    """PyTorch's, as its Linear layers multiply. Sets the threads of PyTorch; needs PyTorch."""
    import torch

    torch.set_num_threads(threads)

    def work(product: Product) -> Work:
        x, w = (torch.from_numpy(a) for a in _matrices(product))
        weight = w.T.contiguous()  # (N, K), as a Linear keeps it

        def run() -> None:
            with torch.inference_mode():
                torch.nn.functional.linear(x, weight)

        return run

    return _peak("PyTorch", threads, products, work)


def _peak(engine: str, threads: int, products: tuple[Product, ...] | None, work: Callable[[Product], Work]) -> Peak:
    found = {}
    for product in tqdm(products or PRODUCTS, f"{engine} peak", unit=" products", disable=None, leave=False):
        m, k, n = product
        flops = 2 * m * k * n
        # The median call, as of the graphs: what the machine keeps up, not one lucky call. A second or two per product.
        timing: Timing = time_loops(work(product), loops=max(7, min(200, round(3e11 / flops))), warmup=2)
        found["x".join(map(str, product))] = round(flops / timing.median / 1e9, 1)
    return Peak(engine, threads, found)


def _matrices(product: Product) -> tuple[np.ndarray, np.ndarray]:
    m, k, n = product
    draw = np.random.default_rng(0)
    return draw.standard_normal((m, k), np.float32), draw.standard_normal((k, n), np.float32)


def _in_onnxruntime(product: Product, threads: int, provider: str) -> Work:
    m, _, n = product
    x, w = _matrices(product)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (m, n))],
        [numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[available_provider(provider)])
    # Both sides stay where the product is computed (its devices have the providers' names): the roof holds no copies.
    bound = session.io_binding()
    kept = (
        onnxruntime.OrtValue.ortvalue_from_numpy(x, provider, 0),
        onnxruntime.OrtValue.ortvalue_from_shape_and_type((m, n), np.float32, provider, 0),
    )
    bound.bind_ortvalue_input("x", kept[0])
    bound.bind_ortvalue_output("y", kept[1])

    def run(kept: object = kept) -> None:  # held here: older releases of ONNX Runtime keep only the addresses
        session.run_with_iobinding(bound)

    return run
