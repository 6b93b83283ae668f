"""The shape of every tensor of a graph, once the sizes of its inputs are known: without running it, and without its weights.

onnx infers shapes, but it follows no size that a graph computes, such as the words before plus the new ones. Those are
computed here, operator by operator, and handed back to it as constants until nothing more is learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from models.spec import GraphSpec

Shape = tuple[int | None, ...]

LARGE = 1024  # bytes; the tensors that say a shape are smaller than any weight


def bound_model(path: Path, spec: GraphSpec) -> onnx.ModelProto:
    """The graph in `path` with the sizes of `spec` at its inputs, and without the numbers of its weights."""
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    wanted = {t.name: t.shape for t in spec.inputs}
    for value in graph.input:
        for axis, size in zip(value.type.tensor_type.shape.dim, wanted[value.name], strict=True):
            axis.dim_value = int(size)
    # What the exporter noted holds its symbols, which would hide the numbers.
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    for tensor in graph.initializer:
        if len(tensor.raw_data) > LARGE:
            tensor.ClearField("raw_data")  # weights: half a gigabyte that would be copied for nothing
    return model


def shapes_of(model: onnx.ModelProto) -> dict[str, Shape]:
    """The shape of every tensor of a model whose inputs have sizes; None where it does not follow from them. The sizes that the
    graph computes become constants of it."""
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if 0 < len(t.raw_data) <= LARGE}
    while True:
        shapes = _known(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph)
        found = _computed(model, shapes, values)
        if not found:
            return shapes
        values |= found
        left = [node for node in model.graph.node if node.output[0] not in found]
        del model.graph.node[:]
        model.graph.node.extend(left)
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in found.items())


def _computed(model: onnx.ModelProto, shapes: dict[str, Shape], values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What follows from shapes and small `values` alone, and is small itself."""
    found: dict[str, np.ndarray] = {}
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        if len(node.output) != 1 or node.output[0] in outputs:
            continue
        if node.op_type == "Shape":
            if None not in (shape := shapes.get(node.input[0], (None,))):
                limits = {a.name: a.i for a in node.attribute}
                found[node.output[0]] = np.array(shape[limits.get("start", 0) : limits.get("end")], np.int64)
        elif all(name in values or name in found for name in node.input if name):
            value = _run(node, model.opset_import, values | found)
            if value.nbytes <= LARGE:
                found[node.output[0]] = value
    return found


def _run(node: onnx.NodeProto, opsets: Sequence[onnx.OperatorSetIdProto], values: dict[str, np.ndarray]) -> np.ndarray:
    read = list(dict.fromkeys(name for name in node.input if name))
    alone = helper.make_function("", "node", read, node.output, [node], opsets)
    (value,) = ReferenceEvaluator(alone).run(None, {name: values[name] for name in read}, attributes={})
    return np.asarray(value)


def _known(inferred: onnx.GraphProto) -> dict[str, Shape]:
    """The shape of every tensor that has one."""
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
    return shapes
