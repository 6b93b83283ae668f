"""What the tests ask of a written graph: how far it is from its module, what it consists of; and a wrong one to be found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from export import parity
from export.graphs import module_for
from export.sizes import Sizes
from models.blip2 import Retrieval
from models.spec import GraphSpec

# What the graphs for ATC consist of. Each is registered for opset 8 to 18 in CANN's ONNX plugin (hicann/ge), but for
# LayerNormalization (17 on). Not here, on purpose: ReduceL2, which ends at 17, and Range, GatherND, Loop, Scan and If.
ATC_OPS = {
    *("Add", "Cast", "Clip", "Concat", "Conv", "Div", "Erf", "Flatten", "Gather", "Gemm", "LayerNormalization", "MatMul"),
    *("Mul", "Pad", "Pow", "ReduceMean", "ReduceSum", "Reshape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Squeeze"),
    *("Sub", "Transpose", "Unsqueeze"),
}
LARGEST_HALF = 65504.0  # of float16, in which ATC computes unless it is told otherwise

# Bound of the product: 5e-5 of the largest value of an output. Measured here, on random weights: at most 2.1e-6.
MEASURED = 5e-6


def rows(model: Retrieval, spec: GraphSpec, path: Path, cases: Sequence[tuple[int, int]]) -> list[parity.Parity]:
    """The differences of the graph in `path` from its module."""
    return parity.measure(model, module_for(spec.name, model), spec, path, [Sizes(*case) for case in cases])


def constants(model: onnx.ModelProto) -> Iterator[np.ndarray]:
    """Every number written in a graph."""
    yield from (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    for node in model.graph.node:
        yield from (numpy_helper.to_array(a.t) for a in node.attribute if a.type == onnx.AttributeProto.TENSOR)


def scale_a_weight(path: Path, factor: float = 1.01) -> None:
    """What a wrong fusion does: one weight matrix of a written graph multiplied."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 2)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    onnx.save(model, path)
