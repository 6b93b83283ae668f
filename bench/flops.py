"""How many floating-point operations one run of a graph takes, counted from the shapes in its ONNX file.

A multiply-add counts as two. Counted are the products (MatMul, Gemm, Conv); what works element by element (norms,
softmax, GELU) is left out, as is usual: it is about 1 % of these models, and a matrix peak does not bound it.
"""

from __future__ import annotations

import math
from pathlib import Path

import onnx

from bench.shapes import Shape, bound_model, shapes_of
from models.errors import UserError
from models.spec import GraphSpec

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
    model = bound_model(path, spec)
    nodes = list(model.graph.node)
    shapes = shapes_of(model)

    def shape_of(node: onnx.NodeProto, name: str) -> tuple[int, ...]:
        found = shapes.get(name, (None,))
        if None in found:
            raise UserError(
                f"{path}: the shape of {name!r}, at the operator {node.op_type} {node.name!r}, does not follow from the inputs "
                f"({_say(found)}), so its operations cannot be counted. Export the graph with blip-export."
            )
        return tuple(int(d) for d in found if d is not None)

    counts: dict[str, int] = {}
    for node in nodes:
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


def _say(shape: Shape) -> str:
    return f"[{', '.join('?' if d is None else str(d) for d in shape)}]"
