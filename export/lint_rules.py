"""What ATC, fp16 and ais_bench ask of a graph: each rule once, a function that says what is wrong. Imports no torch.

The grounds: ATC's ONNX parser looks every operator up at the opset of the model; static shapes are what the chip runs fast and
what ais_bench feeds. The numbers in a graph are looked at in export/lint_numbers.py, what stands beside it in lint_files.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from export.cann import OPSETS_READ
from export.op_table import OpTable
from export.static_shapes import Resolved, graphs_in, named
from export.targets import ASCEND
from models.spec import BATCH, GraphSpec, TensorSpec

LARGE = 2**16  # elements of an int64 tensor that is no shape, no mask of one row and no list of ids
# Operators that give numbers another place, or another type, and do no arithmetic.
MOVING = {
    *("Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Shape", "Slice", "Split", "Squeeze"),
    *("Tile", "Transpose", "Unsqueeze"),
}
PRODUCTS = {"Conv", "Gemm", "MatMul"}  # which the chip has for floating point and int8 alone
NO_TENSORS = {"sequence_type": "a sequence", "optional_type": "an optional", "map_type": "a map", "sparse_tensor_type": "sparse"}
NO_NUMBERS = {TensorProto.STRING: "strings", TensorProto.COMPLEX64: "complex numbers", TensorProto.COMPLEX128: "complex numbers"}


@dataclass(frozen=True)
class Asked:
    """The graph at one batch and one text length."""

    spec: GraphSpec
    found: Resolved


@dataclass(frozen=True)
class Case:
    """A graph and all that is asked of it."""

    model: onnx.ModelProto  # without the weights that lie beside it
    spec: GraphSpec  # as it is written down; its batch and its text length may be letters
    cann: int
    table: OpTable
    file: Path | None  # of the graph
    asked: Sequence[Asked]

    @property
    def opset(self) -> int:
        return next((entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")), 0)

    def nodes(self) -> Iterator[onnx.NodeProto]:
        """Every node, those of branches too."""
        for graph in graphs_in(self.model.graph):
            yield from graph.node


Rule = Callable[[Case], Iterator[str]]


def domain(case: Case) -> Iterator[str]:
    """ATC refuses a graph of several domains (E16005), and has parsers for ai.onnx only."""
    foreign = dict.fromkeys(entry.domain for entry in case.model.opset_import if entry.domain not in ("", "ai.onnx"))
    foreign |= dict.fromkeys(node.domain for node in case.nodes() if node.domain not in ("", "ai.onnx"))
    for name in foreign:
        node = next((f": {named(node)}" for node in case.nodes() if node.domain == name), "")
        yield f"the graph is of the domain {name!r} too{node}; ATC takes ai.onnx alone. Export it without such operators."
    if not case.opset:
        yield "the graph names no opset of ai.onnx."


def opset(case: Case) -> Iterator[str]:
    """Each CANN release has its range."""
    read = OPSETS_READ[case.cann]
    if case.opset and case.opset not in read:
        yield (
            f"the graph has opset {case.opset}, CANN {case.cann} reads {read[0]} to {read[-1]}. "
            f"Export it again with --opset {min(read[-1], 17)}."
        )


def operator(case: Case) -> Iterator[str]:
    """Each operator has a parser at exactly the opset of the graph (else E16002, of older releases E19010)."""
    in_range = case.opset in OPSETS_READ[case.cann]
    used: dict[str, list[onnx.NodeProto]] = {}
    for node in case.nodes():
        if node.domain in ("", "ai.onnx") and not _branches(node):
            used.setdefault(node.op_type, []).append(node)
    for name, nodes in used.items():
        known = case.table.said(name)
        where = named(nodes[0]) + (f" and {len(nodes) - 1} more" if len(nodes) > 1 else "")
        if not known:
            yield f"ATC has no parser for {name}: {where}. Export it as simpler operators."
        elif in_range and not case.table.has(name, case.opset):
            yield f"ATC has a parser for {name} at opset {known}, the graph has {case.opset}: {where}. Choose another --opset."


def control_flow(case: Case) -> Iterator[str]:
    """If is the only operator with graphs in it that ATC reads."""
    for node in case.nodes():
        if _branches(node) and node.op_type != "If":
            yield f"{named(node)} holds a graph of its own; of such ATC reads If alone. Unroll it before the export."


def function(case: Case) -> Iterator[str]:
    """ATC has no parser for functions that the model defines."""
    for written in case.model.functions:
        yield f"the graph defines a function of its own, {written.name}, which ATC does not read. Inline it (onnx.inliner)."


def tensors(case: Case) -> Iterator[str]:
    """Tensors of numbers only: no strings, no sequences."""
    known = {v.name: (v.type.WhichOneof("value"), v.type.tensor_type.elem_type) for v in _declared(case.model.graph)}
    for at in case.asked[:1]:
        known |= {name: (value.kind, value.dtype) for name, value in at.found.values.items() if value.kind}
    makers = case.asked[0].found.values if case.asked else {}
    for name, (kind, dtype) in known.items():
        if said := NO_TENSORS.get(kind) or NO_NUMBERS.get(dtype):
            of = f"of {makers[name].node}" if name in makers else "at the edge of the graph"
            yield f"{name} {of} is {said} in place of a tensor of numbers, which ATC does not take."


def scatter(case: Case) -> Iterator[str]:
    """ScatterND adds and multiplies from opset 16 on; ATC's writes."""
    for node in case.nodes():
        how = next((a.s.decode() for a in node.attribute if a.name == "reduction"), "none")
        if node.op_type == "ScatterND" and how != "none":
            yield f"{named(node)} has reduction={how}, ATC's ScatterND only writes. Add what was there before it."


def interface(case: Case) -> Iterator[str]:
    """Names, order, types and axes at the edge of the graph are those of the spec: feeds and byte counts follow from it."""
    edges = (("input", case.model.graph.input, case.spec.inputs), ("output", case.model.graph.output, case.spec.outputs))
    weights = {tensor.name for tensor in case.model.graph.initializer}
    for kind, written, wanted in edges:
        found = tuple(_said(value) for value in written if value.name not in weights)
        if found != (expected := tuple(_wanted(tensor) for tensor in wanted)):
            yield f"the {kind}s are {', '.join(found) or 'none'}, expected {', '.join(expected) or 'none'}. Export it again."


def batch_axis(case: Case) -> Iterator[str]:
    """ais_bench packs files along axis 0, and ATC's batch sizes are that axis."""
    every = (*case.spec.inputs, *case.spec.outputs)
    firsts = [t.shape[0] for t in case.spec.inputs if t.shape and isinstance(t.shape[0], int) and t.shape[0] > 1]
    batch, is_open = min((int(size) for size in firsts), default=1), any(_in_batches(d) for t in every for d in t.shape)
    for tensor in every:
        said = f"{tensor.name} is {list(tensor.shape)}"
        first = tensor.shape[0] if tensor.shape else 0
        if any(_in_batches(dim) for dim in tensor.shape[1:]):
            yield f"{said}: the batch has to be its first axis alone."
        elif first == 1 and tensor in case.spec.inputs:
            continue  # one for the whole batch
        elif is_open and not _in_batches(first):
            yield f"{said}: its first axis is not the batch {BATCH!r}, as in the others."
        elif not is_open and (not isinstance(first, int) or not first or first % batch):
            yield f"{said}: its first axis is not the batch, {batch}, as in the others."


def static(case: Case) -> Iterator[str]:
    """Every axis of every value is a number once the inputs' are, and the outputs have the axes of the spec."""
    for at in case.asked:
        said = list(_open_axes(at))
        yield from said
        if said:  # at another batch or length it is the same again
            return


def int64(case: Case) -> Iterator[str]:
    """int64 is for ids, masks and shapes; the chip computes it slowly, and multiplies no int64 matrices."""
    for at in case.asked[-1:]:
        for node in case.model.graph.node:
            value = at.found.values.get(next(iter(node.output), ""))
            if value is None or value.dtype != TensorProto.INT64 or node.op_type in MOVING:
                continue
            shape = [axis or 0 for axis in value.shape or ()]
            if node.op_type in PRODUCTS or math.prod(shape) > LARGE:
                yield f"{value.node} computes {math.prod(shape):,} numbers {shape} in int64. Cast to float32 before it."


def float64(case: Case) -> Iterator[str]:
    """The chip has no arithmetic in float64; what is only moved, or cast at once, may be there."""
    edges = {v.name: v.type.tensor_type.elem_type for v in _declared(case.model.graph)}
    for at in case.asked[:1]:
        edges |= {name: value.dtype for name, value in at.found.values.items()}
    for graph in graphs_in(case.model.graph):
        edges |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in case.nodes():
        wide = [name for name in (*node.input, *node.output) if edges.get(name) == TensorProto.DOUBLE]
        if wide and node.op_type not in (*MOVING, "Constant", "ConstantOfShape"):
            yield f"{named(node)} computes with {wide[0]!r} in float64. Cast to float32 before it."


def _open_axes(at: Asked) -> Iterator[str]:
    shapes = {t.name: t.shape for t in at.spec.inputs}
    if still := [t for t in at.spec.inputs if not all(isinstance(dim, int) for dim in t.shape)]:
        yield f"the input {still[0].name} is {list(still[0].shape)}: an axis is still open. Export it with --target {ASCEND}."
        return
    where = f"with {', '.join(f'{name} {list(shape)}' for name, shape in shapes.items())}"
    if at.found.error:
        yield f"the shapes contradict each other {where}: {at.found.error}"
    left = [(name, value) for name, value in at.found.values.items() if value.kind in ("", "tensor_type") and not value.is_static]
    if left:
        name, value = left[0]
        shape = "of unknown rank" if value.shape is None else str(["?" if axis is None else axis for axis in value.shape])
        more = f", and {len(left) - 1} values after it" if len(left) > 1 else ""
        yield f"{name!r} of {value.node} stays dynamic, {shape}{more}, {where}."
        return
    for tensor in at.spec.outputs:
        found = at.found.values.get(tensor.name)
        if found is not None and found.shape is not None and found.shape != tensor.shape:
            yield f"the output {tensor.name} becomes {list(found.shape)} {where}, expected {list(tensor.shape)}."


def _branches(node: onnx.NodeProto) -> bool:
    return any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute)


def _declared(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    for inner in graphs_in(graph):
        yield from (*inner.input, *inner.output, *inner.value_info)


def _in_batches(dim: int | str) -> bool:
    return isinstance(dim, str) and BATCH in re.split(r"[*+]", dim)


def _said(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type
    axes = [axis.dim_value if axis.HasField("dim_value") else axis.dim_param for axis in kind.shape.dim]
    if not kind.elem_type:
        return f"{value.name} without a type"
    return f"{value.name} {helper.tensor_dtype_to_np_dtype(kind.elem_type).name} {axes}"


def _wanted(tensor: TensorSpec) -> str:
    return f"{tensor.name} {tensor.dtype} {list(tensor.shape)}"
