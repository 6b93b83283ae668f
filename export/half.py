"""A graph as float16 would have it, on any CPU: what its tensors hold, and what it gives when each result is rounded.

An NPU computes a product in more bits than float16 and rounds its result; so does this, operation by operation. What it cannot
show are an NPU's own kernels, which add up in another order and may approximate.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.lint_numbers import LARGEST, VANISHING

INFINITE = LARGEST + 16  # halfway to what would come next: from there on float16 rounds to infinity, below it to LARGEST
AT_ONCE = 200  # tensors that are looked at in one run: all of a large graph would fill the memory

Feeds = Mapping[str, np.ndarray]
Counts = tuple[float, float, int, int, int]  # largest and smallest above 0; values that overflow, vanish, and are above 0


@dataclass(frozen=True)
class Seen:
    """What one tensor held, over all feeds."""

    tensor: str
    node: str | None  # that made it; None for a constant or an input
    op: str
    largest: float  # magnitude; NaN and infinity count as infinity
    smallest: float  # magnitude above 0; infinity where there is none
    overflow: int  # values that float16 makes infinite, from INFINITE on
    underflow: float  # share of the values above 0 that become 0

    @property
    def overflows(self) -> bool:
        return self.overflow > 0


def observe(path: Path, feeds: Sequence[Feeds]) -> list[Seen]:
    """Constants, inputs and every result of the graph in `path`, float32 all of them, in the graph's order."""
    model = onnx.load(path, load_external_data=False)
    floats = float_tensors(model)
    found = [
        _seen(tensor.name, None, "Constant", _counted(numpy_helper.to_array(tensor, str(path.parent))))
        for tensor in model.graph.initializer
        if tensor.name in floats
    ]
    inputs = [value.name for value in model.graph.input if value.name in floats]
    for name in inputs:
        found.append(_seen(name, None, "Input", reduce(_joined, (_counted(given[name]) for given in feeds))))
    made = [(node, name) for node in model.graph.node for name in node.output if name in floats]
    for start in range(0, len(made), AT_ONCE):
        part = made[start : start + AT_ONCE]
        found += _observed(model, path, part, feeds)
    return found


def simulate(path: Path, feeds: Sequence[Feeds], kept: Collection[str] = ()) -> list[list[np.ndarray]]:
    """The outputs for each of `feeds` when each operation reads and gives float16, but those of the nodes named in `kept`, which
    stay in float32. With all nodes kept it is the graph itself."""
    model = onnx.load(path, load_external_data=False)
    rounded(model, kept)
    return list(run(model, path, [value.name for value in model.graph.output], feeds))


def exploding(path: Path, feeds: Sequence[Feeds], kept: Collection[str] = ()) -> list[str]:
    """The nodes at which `simulate` leaves the numbers, and those that lead there.

    The first are nodes that read numbers and give infinity or NaN: a division by what has become 0. The others made that 0 out of
    what float32 holds: back from there, every node whose result has zeros that float32 does not have. In the graph's order.
    """
    model, half = (onnx.load(path, load_external_data=False) for _ in range(2))
    rounded(half, kept)
    floats = float_tensors(model)
    made = [name for node in model.graph.node for name in node.output if name in floats]
    exact, found = _kinds(model, path, made, feeds), _kinds(half, path, made, feeds)
    makers = {name: node for node in model.graph.node for name in node.output}
    gone = {name for name in made if found[name].zeros > exact[name].zeros}
    broken = {name for name in made if found[name].beyond > exact[name].beyond}
    left = [makers[name] for name in broken if not broken & set(makers[name].input)]
    names: set[str] = set()
    while left:
        node = left.pop()
        if node.name not in names:
            names.add(node.name)
            left += [makers[name] for name in node.input if name in gone]
    return [node.name for node in model.graph.node if node.name in names]


class _Kinds(NamedTuple):
    """How many values of a tensor are 0, and how many are infinite or no number."""

    zeros: int
    beyond: int


def _kinds(model: onnx.ModelProto, path: Path, names: Sequence[str], feeds: Sequence[Feeds]) -> dict[str, _Kinds]:
    found = dict.fromkeys(names, _Kinds(0, 0))
    for start in range(0, len(names), AT_ONCE):
        part = names[start : start + AT_ONCE]
        for values in run(_watching(model, part), path, part, feeds):
            for name, value in zip(part, values, strict=True):
                before = found[name]
                zeros, beyond = np.count_nonzero(value == 0), np.count_nonzero(~np.isfinite(value))
                found[name] = _Kinds(before.zeros + int(zeros), before.beyond + int(beyond))
    return found


def rounded(model: onnx.ModelProto, kept: Collection[str]) -> None:
    """Put a rounding behind what gives float16, and before what reads it."""
    floats = float_tensors(model)
    wide = {name for node in model.graph.node if node.name in kept for name in node.output}  # float32 where it is made
    given = {value.name for value in (*model.graph.input, *model.graph.initializer)}
    nodes: list[NodeProto] = []
    done: set[str] = set()

    def half_of(name: str) -> str:
        """The name of what float16 makes of a tensor that is there in float32."""
        if name not in done:
            nodes.extend(_rounding(name, f"{name}~half"))
            done.add(name)
        return f"{name}~half"

    for node in model.graph.node:
        if node.name not in kept:
            for at, name in enumerate(node.input):
                if name in floats and (name in wide or name in given):
                    node.input[at] = half_of(name)
        results = [name for name in node.output if name in floats and name not in wide]
        for at, name in enumerate(node.output):
            if name in results:
                node.output[at] = f"{name}~exact"
        nodes.append(node)
        for name in results:
            nodes.extend(_rounding(f"{name}~exact", name))
    # `nodes` holds the graph's own: they are copied before the list is emptied.
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(copies)


def float_tensors(model: onnx.ModelProto) -> set[str]:
    """The names of what is float32 in a graph: by the rules of ONNX, without its weights' values."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    found = {
        value.name
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    return found | {tensor.name for tensor in inferred.initializer if tensor.data_type == TensorProto.FLOAT}


def run(model: onnx.ModelProto, path: Path, outputs: Sequence[str], feeds: Sequence[Feeds]) -> Iterator[list[np.ndarray]]:
    """What `model`, a form of the one in `path`, whose weights may lie beside it, gives for each of `feeds`. Nothing is fused:
    what is seen is what the graph says."""
    session = _session(model, path)
    for given in feeds:
        found: list[np.ndarray] = session.run(list(outputs), dict(given))
        yield found


def _session(model: onnx.ModelProto, path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    if not path.with_name(f"{path.name}.data").exists():
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    beside = path.with_name(f".{path.stem}.audit.onnx")
    try:
        onnx.save_model(model, str(beside))
        return onnxruntime.InferenceSession(str(beside), options, providers=["CPUExecutionProvider"])
    finally:
        beside.unlink(missing_ok=True)


def _rounding(source: str, result: str) -> list[NodeProto]:
    return [
        helper.make_node("Cast", [source], [f"{result}~16"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", [f"{result}~16"], [result], to=TensorProto.FLOAT),
    ]


def _observed(model: onnx.ModelProto, path: Path, made: Sequence[tuple[NodeProto, str]], feeds: Sequence[Feeds]) -> list[Seen]:
    names = [name for _, name in made]
    found = [(0.0, float("inf"), 0, 0, 0)] * len(made)
    for values in run(_watching(model, names), path, names, feeds):
        found = [_joined(before, _counted(value)) for before, value in zip(found, values, strict=True)]
    return [_seen(name, node.name, node.op_type, counts) for (node, name), counts in zip(made, found, strict=True)]


def _watching(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy that gives these results."""
    watched = onnx.ModelProto.FromString(model.SerializeToString())
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return watched


def _counted(values: np.ndarray) -> Counts:
    sizes = np.abs(values)
    sizes = np.where(np.isfinite(sizes), sizes, np.inf)
    above = sizes[sizes > 0]
    if not len(above):
        return 0.0, float("inf"), 0, 0, 0
    overflow, underflow = np.count_nonzero(above >= INFINITE), np.count_nonzero(above <= VANISHING)
    return float(above.max()), float(above.min()), int(overflow), int(underflow), len(above)


def _joined(one: Counts, other: Counts) -> Counts:
    return max(one[0], other[0]), min(one[1], other[1]), one[2] + other[2], one[3] + other[3], one[4] + other[4]


def _seen(tensor: str, node: str | None, op: str, counts: Counts) -> Seen:
    largest, smallest, overflow, underflow, above = counts
    return Seen(tensor, node, op, largest, smallest, overflow, underflow / max(above, 1))
