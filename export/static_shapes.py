"""The type and shape of every value of a graph once the axes of its inputs are numbers, without its weights. Imports no torch.

onnx's inference does most of it. What it leaves open is a shape that the graph computes itself; such nodes are computed here,
from the shapes found so far, until nothing more becomes known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from models.spec import GraphSpec, TensorSpec

SMALL = 1024  # elements; a larger constant is a weight, and no shape depends on it

Shape = tuple[int | None, ...] | None  # None for an axis that is not known, and for a rank that is not


@dataclass(frozen=True)
class Value:
    """What is known of a value of a graph."""

    node: str  # what makes it: "Reshape '/Reshape_1'"
    kind: str  # of onnx's TypeProto: tensor_type, sequence_type, ...; empty when nothing is known
    dtype: int  # of onnx's TensorProto; 0 when it is no tensor
    shape: Shape

    @property
    def is_static(self) -> bool:
        return self.shape is not None and None not in self.shape


@dataclass(frozen=True)
class Resolved:
    """The values of a graph, in the order they are computed, and the first contradiction that was found."""

    values: dict[str, Value]
    error: str = ""


def graphs_in(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and every graph in its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.type == onnx.AttributeProto.GRAPH else ()), *attribute.graphs):
                yield from graphs_in(inner)


def named(node: onnx.NodeProto) -> str:
    """A node as it is called in a sentence: by its operator, and its name, or that of what it makes."""
    return f"{node.op_type} {node.name or next(iter(node.output), '')!r}"


def resolve(model: onnx.ModelProto, spec: GraphSpec) -> Resolved:
    """Every value of `model` when its inputs have the shapes of `spec`; axes that are letters there stay open."""
    working, error = _weightless(model, spec), ""
    nodes = {name: named(node) for graph in graphs_in(model.graph) for node in graph.node for name in node.output if name}
    while True:
        inferred, wrong = _inferred(working)
        found, error = _values(inferred, nodes), error or wrong
        if all(value.is_static for value in found.values()) or not _fold(working, found):
            return Resolved(found, error)


def _inferred(model: onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
    """As far as it goes, and the first contradiction."""
    error = ""
    for strict in (True, False):
        try:
            return shape_inference.infer_shapes(model, strict_mode=strict, data_prop=True), error
        except (shape_inference.InferenceError, RuntimeError, ValueError) as wrong:
            error = error or str(wrong).strip().splitlines()[0]
    return model, error


def _weightless(model: onnx.ModelProto, spec: GraphSpec) -> onnx.ModelProto:
    """A copy in which weights are inputs, inputs have the axes of `spec`, and shapes that were written down are forgotten."""
    graph, small = model.graph, []
    inputs = [_input(value, spec) for value in graph.input if value.name not in {t.name for t in graph.initializer}]
    for tensor in graph.initializer:
        if np.prod(tensor.dims, dtype=np.int64) <= SMALL and tensor.data_location != TensorProto.EXTERNAL:
            small.append(tensor)
        else:
            inputs.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    outputs = [onnx.ValueInfoProto() for _ in graph.output]
    for forgotten, value in zip(outputs, graph.output, strict=True):
        forgotten.CopyFrom(value)
        forgotten.type.tensor_type.ClearField("shape")
    copied = helper.make_graph(graph.node, graph.name or "graph", inputs, outputs, small)
    return helper.make_model(
        copied, opset_imports=model.opset_import, ir_version=max(model.ir_version, 4), functions=list(model.functions)
    )


def _input(value: onnx.ValueInfoProto, spec: GraphSpec) -> onnx.ValueInfoProto:
    tensors: dict[str, TensorSpec] = {tensor.name: tensor for tensor in spec.inputs}
    if value.name not in tensors or not value.type.HasField("tensor_type"):
        return value
    return helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, tensors[value.name].shape)


def _values(model: onnx.ModelProto, nodes: dict[str, str]) -> dict[str, Value]:
    """Of everything that a node makes."""
    known: dict[str, onnx.TypeProto] = {}
    for graph in graphs_in(model.graph):
        known |= {value.name: value.type for value in (*graph.value_info, *graph.output)}
        known |= {t.name: helper.make_tensor_type_proto(t.data_type, t.dims) for t in graph.initializer}
    return {name: _value(node, known.get(name)) for name, node in nodes.items()}


def _value(node: str, kind: onnx.TypeProto | None) -> Value:
    which = kind.WhichOneof("value") if kind is not None else None
    if kind is None or which != "tensor_type":
        return Value(node, which or "", 0, None)
    tensor = kind.tensor_type
    if not tensor.HasField("shape"):
        return Value(node, which, tensor.elem_type, None)
    axes = tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in tensor.shape.dim)
    return Value(node, which, tensor.elem_type, axes)


def _fold(model: onnx.ModelProto, found: dict[str, Value]) -> bool:
    """Make constants of nodes that compute shapes and whose inputs are known; whether there were any."""
    graph, left = model.graph, []
    kept = {value.name for value in graph.output}
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    shapes = {value.name: _value("", value.type).shape for value in graph.input}
    shapes |= {name: value.shape for name, value in found.items()}
    new: dict[str, np.ndarray] = {}
    for node in graph.node:
        values = {} if kept & set(node.output) else _computed(model, node, known, shapes)
        known |= values
        new |= values
        if not values:
            left.append(node)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in new.items())
    del graph.node[:]
    graph.node.extend(left)
    return bool(new)


def _computed(
    model: onnx.ModelProto, node: onnx.NodeProto, known: dict[str, np.ndarray], shapes: dict[str, Shape]
) -> dict[str, np.ndarray]:
    """What the node makes, if that is small and follows from what is known; else nothing."""
    if node.op_type == "Shape" and not node.domain:
        shape = shapes.get(node.input[0])
        if shape is None or None in shape:
            return {}
        begin, end = (next((a.i for a in node.attribute if a.name == at), None) for at in ("start", "end"))
        return {node.output[0]: np.array(shape[begin:end], np.int64)}
    read = list(dict.fromkeys(name for name in node.input if name))
    large = any(np.prod([axis or 1 for axis in shapes.get(name) or ()]) > SMALL for name in node.output)
    if large or not known.keys() >= set(read) or any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute):
        return {}
    alone = helper.make_function("", "node", read, node.output, [node], model.opset_import)
    try:
        values = ReferenceEvaluator(alone).run(None, {name: known[name] for name in read}, attributes={})
    except Exception:  # whatever the evaluator cannot do stays open, and is reported as such
        return {}
    return {name: np.asarray(value) for name, value in zip(node.output, values, strict=True) if name}
