"""The weights of a graph, apart from it: what works on the graph never holds them, however large they are.

While a graph is traced, folded and simplified, its weights are inputs in float32. Their values are views of the model's own
memory, or of the file that it lies in, until the moment they are written, one by one. What is stored in half precision is
widened then.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

PROTOBUF_LIMIT = 2**31 - 2**20  # bytes; a larger graph keeps its weights in a file of its own beside it
SMALL = 1024  # bytes; a smaller tensor stays in the graph all the same
PAGE = 4096  # bytes; where a tensor in that file begins, so that it can be mapped into memory

HALVES = (np.float16, ml_dtypes.bfloat16)
# Operators that give numbers another place and leave them what they are.
MOVING = ("Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")

Weights = dict[str, np.ndarray]  # by the name of the graph's input; float32, float16 or bfloat16


def weights_of(module: nn.Module) -> Weights:
    """The tensors of a module, as they are stored, without a copy."""
    return {name: _array(tensor) for name, tensor in module.state_dict().items()}


def fold(model: onnx.ModelProto, weights: Weights) -> Weights:
    """Replace the nodes of `model` that only weights lead to by their results; returns `weights` with these added.

    The exporters leave a transposition before every product, and the parts of a packed weight as slices of it. numpy
    makes both without a copy. Numbers in half precision are moved as they are, and widened before they are computed with.
    """
    folded, known = dict(weights), {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    left = []
    for node in model.graph.node:
        read = dict.fromkeys(name for name in node.input if name)
        if not read.keys() <= known.keys() | folded.keys():
            left.append(node)
            continue
        alone = helper.make_function("", "node", list(read), node.output, [node], model.opset_import)
        values = {name: folded[name] if name in folded else known[name] for name in read}
        if node.op_type not in MOVING:
            values = {name: _widened(value) for name, value in values.items()}
        found = ReferenceEvaluator(alone).run(None, values, attributes={})
        if read.keys() & folded.keys():
            folded |= zip(node.output, found, strict=True)
        else:  # a constant, which is the simplifier's to fold: shapes depend on it
            known |= zip(node.output, found, strict=True)
            left.append(node)
    used = {name for node in left for name in node.input}
    inputs = [value for value in model.graph.input if value.name not in weights]
    inputs += [value_info(name, value) for name, value in folded.items() if name in used]
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(left)
    model.graph.input.extend(inputs)
    return folded


def attach(model: onnx.ModelProto, weights: Weights, path: Path) -> None:
    """Make initializers of the inputs of `model` that are weights. When the whole is over protobuf's limit they are
    written to `<path>.data`, and `model`, to be written to `path`, refers to that file."""
    names = list(dict.fromkeys(name for node in model.graph.node for name in node.input if name in weights))  # as they are used
    inputs = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    if model.ByteSize() + sum(4 * weights[name].size for name in names) <= PROTOBUF_LIMIT:
        model.graph.initializer.extend(_tensor(name, weights[name]) for name in names)
        return
    with path.with_name(f"{path.name}.data").open("wb") as file:
        for name in names:
            value = _widened(weights[name])
            if value.nbytes < SMALL:
                model.graph.initializer.append(_tensor(name, value))
                continue
            file.write(bytes(-file.tell() % PAGE))
            model.graph.initializer.append(_reference(name, value, Path(file.name).name, file.tell()))
            file.write(np.asarray(value, order="C").data)


def _array(tensor: Tensor) -> np.ndarray:
    """numpy itself knows no bfloat16."""
    if tensor.dtype == torch.bfloat16:
        array: np.ndarray = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array
    return tensor.numpy()


def _widened(value: np.ndarray) -> np.ndarray:
    """In float32 and in the order of its axes, if it is in half precision."""
    return value.astype(np.float32, order="C") if value.dtype in HALVES else value


def value_info(name: str, value: np.ndarray) -> onnx.ValueInfoProto:
    """A weight as an input of the graph."""
    dtype = np.dtype(np.float32) if value.dtype in HALVES else value.dtype
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), value.shape)


def _tensor(name: str, value: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(np.asarray(_widened(value), order="C"), name)


def _reference(name: str, value: np.ndarray, location: str, offset: int) -> TensorProto:
    """The tensor as a place in a file."""
    tensor = TensorProto(name=name, dims=value.shape, data_type=helper.np_dtype_to_tensor_dtype(value.dtype))
    tensor.data_location = TensorProto.EXTERNAL
    for key, entry in (("location", location), ("offset", offset), ("length", value.nbytes)):
        tensor.external_data.add(key=key, value=str(entry))
    return tensor
