"""Numbers written in a graph that fp16 does not hold, in which ATC computes unless it is told otherwise. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.lint_files import place
from export.lint_rules import Case
from export.static_shapes import graphs_in, named

LARGEST = 65504.0  # of fp16
VANISHING = 2.0**-25  # half of its smallest number above 0; it and all below become 0
MASK = "A mask of -10000 does the same."
INTEGERS = (TensorProto.INT32, TensorProto.INT64, TensorProto.UINT32, TensorProto.UINT64)
# Operators that pass whole numbers on, and the inputs that they are read from: a size or a place, such as the end of a Slice,
# is none of them. None: all.
PASSING: dict[str, tuple[int, ...] | None] = {
    **dict.fromkeys(("Cast", "Expand", "Flatten", "Gather", "Identity", "Neg", "Pad", "Reshape"), (0,)),
    **dict.fromkeys(("Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"), (0,)),
    **dict.fromkeys(("Add", "Concat", "Max", "Min", "Mul", "Sub")),
    "Where": (1, 2),
}
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
CHUNK = 2**24  # elements of a weight that are looked at together


def fp16(case: Case) -> Iterator[str]:
    """No constant, mask value or weight beyond fp16: it becomes infinite, and a row of a mask that is all -inf becomes NaN; nor a
    whole number that a Cast makes such a value of. And none that is 0 there and not here, such as the 1e-12 that guards a
    division."""
    for graph in graphs_in(case.model.graph):
        readers = _readers(graph)
        for name, tensor in _constants(graph):
            if tensor.data_type not in (*FLOATS, *INTEGERS):
                continue
            users = readers.get(name, [])
            said = f"the constant {name!r} of {', '.join(map(named, users[:2])) or 'no node'}"
            largest = _largest(tensor, case.file)
            if tensor.data_type in INTEGERS:
                if largest > LARGEST and (cast := _cast(name, readers)) is not None:
                    yield f"{said} holds {largest:.6g}, of which {named(cast)} makes a float beyond fp16's {LARGEST:.0f}. {MASK}"
                continue
            if not largest <= LARGEST:  # NaN too
                yield f"{said} holds {largest:.6g}, beyond fp16's {LARGEST:.0f}. {MASK}"
            elif 0 < largest <= VANISHING and not (users and all(_is_norm(graph, node, name) for node in users)):
                yield f"{said} is {largest:.3g}, which is 0 in fp16. Take 1e-6, or keep the node in float32 (--keep_dtype)."


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, TensorProto]]:
    yield from ((tensor.name, tensor) for tensor in graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield node.output[0], attribute.t
            elif node.op_type == "Constant" and attribute.type in (onnx.AttributeProto.FLOAT, onnx.AttributeProto.FLOATS):
                numbers = [attribute.f] if attribute.type == onnx.AttributeProto.FLOAT else list(attribute.floats)
                yield node.output[0], numpy_helper.from_array(np.array(numbers, np.float32))
            elif node.op_type == "Constant" and attribute.type in (onnx.AttributeProto.INT, onnx.AttributeProto.INTS):
                whole = [attribute.i] if attribute.type == onnx.AttributeProto.INT else list(attribute.ints)
                yield node.output[0], numpy_helper.from_array(np.array(whole, np.int64))


def _largest(tensor: TensorProto, file: Path | None) -> float:
    """The largest magnitude; NaN if one is not a number. 0 of weights that are not there: that is another rule's."""
    if tensor.data_location != TensorProto.EXTERNAL:
        values = numpy_helper.to_array(tensor)
    else:
        at = place(tensor, file)
        if at is None:
            return 0.0
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        values = np.memmap(at.file, dtype, "r", at.offset, (at.length // dtype.itemsize,)) if at.length else np.zeros(0, dtype)
    flat, largest = values.reshape(-1), 0.0
    for begin in range(0, flat.size, CHUNK):
        part = flat[begin : begin + CHUNK]
        largest = max(abs(float(part.max())), abs(float(part.min())), largest)  # max keeps a NaN that comes first
        if np.isnan(largest):
            break
    return largest


def _cast(name: str, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> onnx.NodeProto | None:
    """The Cast to floating point that the whole numbers in `name` come to, as they are or computed with; None for none."""
    seen, left = {name}, [name]
    while left:
        read = left.pop()
        for node in readers.get(read, []):
            if node.op_type == "Cast" and any(a.name == "to" and a.i in FLOATS for a in node.attribute):
                return node
            places = PASSING.get(node.op_type, ())
            if any(at == read and (places is None or n in places) for n, at in enumerate(node.input)):
                left += [made for made in node.output if made not in seen]
                seen.update(node.output)
    return None


def _readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            found.setdefault(name, []).append(node)
    return found


def _is_norm(graph: onnx.GraphProto, add: onnx.NodeProto, eps: str) -> bool:
    """Whether `add` adds the eps of a layer norm in pieces, ReduceMean, Sub, Pow, ReduceMean, Add, Sqrt, Div, of which ATC's
    LayerNormONNXFusionPass (documented in hicann/ops-nn) makes one operator that has this eps as an attribute."""
    makers = {name: node for node in graph.node for name in node.output}
    readers = _readers(graph)

    def maker(node: onnx.NodeProto | None, *operators: str) -> onnx.NodeProto | None:
        found = [makers[name] for name in (node.input if node is not None else ()) if name in makers and name != eps]
        return next((made for made in found if made.op_type in operators), None)

    def reader(node: onnx.NodeProto | None, operator: str) -> onnx.NodeProto | None:
        found = readers.get(node.output[0], []) if node is not None else []
        return next((read for read in found if read.op_type == operator), None)

    square = maker(maker(add, "ReduceMean"), "Pow", "Mul")
    centred = maker(maker(square, "Cast") or square, "Sub")
    divided = reader(reader(add, "Sqrt"), "Div")
    return add.op_type == "Add" and centred is not None and divided is not None and centred.output[0] in divided.input
