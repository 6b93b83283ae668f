"""Products of the same input by several weights, as one product by all of them side by side and a split of its result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, helper

from export.weights import Weights, value_info

MOST = 3  # queries, keys and values; image_kv has more products of one input, whose results are no longer beside each other


@dataclass(frozen=True)
class Product:
    """x W + b."""

    nodes: tuple[NodeProto, ...]  # the product, and the sum where there is one
    weight: str  # (D, E)
    bias: str | None  # (E,)

    @property
    def output(self) -> str:
        return str(self.nodes[-1].output[0])


def pack(model: onnx.ModelProto, weights: Weights) -> Weights:
    """Rewrite the products of `model`, whose weights are inputs of it (export/weights.py); returns `weights` with those that came
    of it added. Of a language model they are a copy in memory."""
    products: dict[str, list[Product]] = defaultdict(list)
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            products[node.input[0]].append(_product(model, node, weights))
    packed, nodes, gone = dict(weights), list(model.graph.node), []
    for source, group in products.items():
        if 1 < len(group) <= MOST:
            made = _packed(model, source, group, packed)
            at = min(index for index, node in enumerate(nodes) if any(node is each.nodes[0] for each in group))
            nodes[at:at] = made
            gone += [id(node) for each in group for node in each.nodes]
    nodes = [node for node in nodes if id(node) not in gone]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return packed


def _product(model: onnx.ModelProto, node: NodeProto, weights: Weights) -> Product:
    readers = [reader for reader in model.graph.node if node.output[0] in reader.input]
    if len(readers) == 1 and readers[0].op_type == "Add":
        other = next(name for name in readers[0].input if name != node.output[0])
        if other in weights and weights[other].ndim == 1:
            return Product((node, readers[0]), node.input[1], other)
    return Product((node,), node.input[1], None)


def _packed(model: onnx.ModelProto, source: str, group: Sequence[Product], weights: Weights) -> list[NodeProto]:
    """The nodes that compute all of `group`, under the names of its outputs. Adds to `weights` and to the inputs of `model`."""
    first, widths = group[0], [weights[each.weight].shape[1] for each in group]

    def added(name: str, value: np.ndarray) -> str:
        weights[name] = value
        model.graph.input.append(value_info(name, value))
        return name

    joined = added(f"{first.weight}.packed", np.concatenate([weights[each.weight] for each in group], axis=1))
    result = f"{first.output}.packed"
    nodes = [helper.make_node("MatMul", [source, joined], [result])]
    if any(each.bias for each in group):
        none = np.zeros(0, weights[first.weight].dtype)
        parts = [weights[each.bias] if each.bias else np.resize(none, width) for each, width in zip(group, widths, strict=True)]
        bias = added(f"{first.weight}.packed_bias", np.concatenate(parts))
        nodes.append(helper.make_node("Add", [result, bias], [f"{result}.sum"]))
    return [*nodes, _split(model, nodes[-1].output[0], widths, [each.output for each in group])]


def _split(model: onnx.ModelProto, source: str, widths: Sequence[int], outputs: Sequence[str]) -> NodeProto:
    """Before opset 13 the widths are an attribute."""
    if model.opset_import[0].version < 13:
        return helper.make_node("Split", [source], outputs, axis=-1, split=widths)
    sizes = helper.make_tensor(f"{source}.widths", onnx.TensorProto.INT64, [len(widths)], widths)
    model.graph.initializer.append(sizes)
    return helper.make_node("Split", [source, sizes.name], outputs, axis=-1)
