"""How many floating-point operations one run of a graph takes, counted from the shapes in its ONNX file.

A multiply-add counts as two. Counted are the products (MatMul, Gemm, Conv); what works element by element (norms,
softmax, GELU) is left out, as is usual: it is about 1 % of these models, and a matrix peak does not bound it.
"""

from __future__ import annotations

import math
from pathlib import Path

import onnx

from models.errors import UserError
from models.spec import GraphSpec

Shape = tuple[int | None, ...]

LARGE = 1024  # bytes; the tensors that say a shape are smaller than any weight
# Operators that multiply and that no graph of ours has. Passing over one would make a graph look fast.
UNCOUNTED = {"Attention", "ConvTranspose", "DeformConv", "Einsum", "GRU", "LSTM", "RNN"}
UNCOUNTED |= {"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"}


def count_flops(path: Path, spec: GraphSpec) -> dict[str, int]:
    """Operations of one run, by operator.

    Args:
        path: the .onnx file; weights in a file beside it are not read.
        spec: its inputs with every axis a number (`GraphSpec.bind`).

    Raises:
        UserError: a shape that is needed does not follow from the inputs, or the graph has an operator that multiplies
            but is not counted here.
    """
    model = onnx.load(str(path), load_external_data=False)
    shapes = _shapes(model, spec)

    def shape_of(node: onnx.NodeProto, name: str) -> tuple[int, ...]:
        found = shapes.get(name, (None,))
        if None in found:
            raise UserError(
                f"{path}: the shape of {name!r}, at the operator {node.op_type} {node.name!r}, does not follow from the inputs "
                f"({_say(found)}), so its operations cannot be counted. Export the graph with blip-export."
            )
        return tuple(int(d) for d in found if d is not None)

    counts: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type in UNCOUNTED or node.domain not in ("", "ai.onnx") or any(a.HasField("g") for a in node.attribute):
            raise UserError(
                f"{path} has the operator {node.op_type}, whose operations are not counted; export the graph with blip-export."
            )
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            made, left, right = (shape_of(node, name) for name in (node.output[0], *node.input[:2]))
            counts[node.op_type] = counts.get(node.op_type, 0) + 2 * math.prod(made) * _terms(node, left, right)
    return counts


def _terms(node: onnx.NodeProto, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """How many products are summed in one element of the output."""
    if node.op_type == "Conv":
        return math.prod(right[1:])  # the weight is (out, in / group, kernel height, kernel width)
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return left[0] if transposed else left[-1]


def _shapes(model: onnx.ModelProto, spec: GraphSpec) -> dict[str, Shape]:
    """The shape of every tensor, as onnx infers it from the inputs of `spec`."""
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
    inferred = _inferred(model)
    while completed := [value for value in _completed(inferred) if value.name not in {noted.name for noted in graph.value_info}]:
        graph.value_info.extend(completed)
        inferred = _inferred(model)
    return _known(inferred)


def _inferred(model: onnx.ModelProto) -> onnx.GraphProto:
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph


def _known(inferred: onnx.GraphProto) -> dict[str, Shape]:
    """The shape of every tensor that has one."""
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
    return shapes


def _completed(inferred: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The outputs of Reshape with one size that onnx left open, which it does where a graph adds two sizes: the tokens of
    queries and of a caption. As many elements come out as go in."""
    shapes, reshapes = _known(inferred), {node.output[0]: node for node in inferred.node if node.op_type == "Reshape"}
    found = []
    for value in inferred.value_info:
        if value.name not in reshapes or (made := shapes.get(value.name, ())).count(None) != 1:
            continue
        taken = shapes.get(reshapes[value.name].input[0], (None,))
        if None not in taken:
            value.type.tensor_type.shape.dim[made.index(None)].dim_value = _product(taken) // _product(made)
            found.append(value)
    return found


def _product(shape: Shape) -> int:
    """Of the sizes that are known."""
    return math.prod(d for d in shape if d is not None)


def _say(shape: Shape) -> str:
    return f"[{', '.join('?' if d is None else str(d) for d in shape)}]"
