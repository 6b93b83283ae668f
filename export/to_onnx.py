"""A module and its GraphSpec to one checked ONNX file.

From the same modules. `ort`: batch and text length dynamic, torch's dynamo exporter, opset 18. `atc`: all axes fixed, the
TorchScript exporter, which alone honours the opsets that ATC reads (the dynamo exporter, asked for 13, warns and writes 18).
`ascend`: the same with the batch left open, and the text length if asked. All leave the weights out; export/weights.py puts
them in at the end.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

import onnx
import onnxslim
import torch
from onnxscript import opset18 as op
from torch import Tensor, nn

from export.graphs import Graph
from export.hollow import hollow
from export.packed import pack
from export.rewrites import Forms, pad_tokens
from export.targets import ORT, PACKED
from export.weights import Weights, attach, fold, weights_of
from models.errors import UserError
from models.spec import GraphSpec, TensorSpec


def write_onnx(
    module: Graph,
    spec: GraphSpec,
    inputs: dict[str, Tensor],
    path: Path,
    target: str,
    opset: int,
    rewrites: Collection[str] = (),
) -> int:
    """Export `module`, simplify, check against `spec`, write `path`; returns the number of nodes.

    Args:
        spec: symbolic axes stay dynamic; fixed axes must be those of `inputs`.
        inputs: example inputs by name; their shapes matter, and their values only as far as they are possible.
        opset: what is asked, read back from the file and compared.
        rewrites: of export.targets.REWRITES, for the static targets.

    Raises:
        UserError: when the graph written is not the graph asked for.
    """
    model, weights = traced(module, spec, inputs, target, opset, rewrites)
    attach(model, weights, path)
    _name_axes(model, spec)
    _name_nodes(model)
    check(model, spec, opset)
    onnx.save_model(model, str(path))
    return len(model.graph.node)


def traced(
    module: Graph, spec: GraphSpec, inputs: dict[str, Tensor], target: str, opset: int, rewrites: Collection[str] = ()
) -> tuple[onnx.ModelProto, Weights]:
    """The graph of `module`, simplified, its weights inputs of it, and these. Arguments as of `write_onnx`."""
    args = tuple(inputs[t.name] for t in spec.inputs)
    empty = hollow(module)
    with _quiet():
        if target == ORT:
            model = _trace_dynamic(empty, spec, args, opset)
        else:
            pad_tokens(empty, rewrites)
            with Forms(rewrites):
                model = _trace_static(empty, spec, args, opset)
        weights = fold(model, weights_of(module))
        model = simplified(model)
        if PACKED in rewrites:
            weights = pack(model, weights)
    return model, weights


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants and remove what does nothing.

    onnxslim rather than onnxsim: onnxsim makes graphs with dynamic axes larger (the cached ITM graph 640 -> 794 nodes)
    and rewrites MatMul + Add into Reshape + Gemm + Reshape, which ONNX Runtime's fusions do not recognise.
    """
    return onnxslim.slim(model, skip_fusion_patterns=["FusionGemm"])


def check(model: onnx.ModelProto, spec: GraphSpec, opset: int) -> None:
    """Raise UserError unless `model` has the opset asked for and the inputs and outputs of `spec`."""
    found_opset = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if found_opset != {"ai.onnx": opset}:
        raise UserError(f"{spec.name}: the exporter wrote opset {found_opset}, asked was {opset}. Try another --opset.")
    if model.functions:
        raise UserError(f"{spec.name}: the graph holds model-local functions, which ATC does not read.")
    for kind, found, wanted in (("input", model.graph.input, spec.inputs), ("output", model.graph.output, spec.outputs)):
        written = tuple(_read(value) for value in found)
        if written != wanted:
            raise UserError(f"{spec.name}: the {kind}s written are {_say(written)}, expected {_say(wanted)}.")


def _trace_dynamic(module: nn.Module, spec: GraphSpec, args: tuple[Tensor, ...], opset: int) -> onnx.ModelProto:
    letters = dict.fromkeys(dim for t in spec.inputs for dim in t.shape if isinstance(dim, str))
    axes = {letter: torch.export.Dim(letter, max=65535) for letter in letters}
    shapes = tuple({at: axes[dim] for at, dim in enumerate(t.shape) if isinstance(dim, str)} for t in spec.inputs)
    program = torch.onnx.export(
        module,
        args,
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=(shapes,),  # of the one argument, *inputs
        input_names=[t.name for t in spec.inputs],
        output_names=[t.name for t in spec.outputs],
        custom_translation_table={torch.ops.aten.gelu.default: _gelu} if opset < 20 else None,
        verbose=False,
        optimize=False,  # not yet: it would fold some of the weights
    )
    assert program is not None
    graph, parameters = program.model.graph, module.state_dict().keys()
    for name in [name for name in graph.initializers if name in parameters]:
        weight = graph.initializers.pop(name)
        weight.const_value = None
        graph.inputs.append(weight)
    program.optimize()
    proto: onnx.ModelProto = program.model_proto
    return proto


def _gelu(x, approximate: str = "none"):  # type: ignore[no-untyped-def]
    """GELU, and its approximation by tanh, in the order of operations that ONNX Runtime turns into one kernel; the exporter's
    own order, x * (0.5 * (1 + erf)), it leaves as five passes over the widest tensor of the model. Opset 20 has an operator."""
    if approximate == "tanh":
        cube = op.Pow(x, 3.0)  # type: ignore[type-var]
        inner = op.Mul(op.Add(x, op.Mul(cube, 0.044715)), math.sqrt(2.0 / math.pi))
        return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(inner), 1.0))
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, math.sqrt(2.0))), 1.0)), 0.5)


def _trace_static(module: nn.Module, spec: GraphSpec, args: tuple[Tensor, ...], opset: int) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "traced.onnx"
        torch.onnx.export(
            module,
            args,
            path,
            dynamo=False,
            opset_version=opset,
            input_names=[t.name for t in spec.inputs],
            output_names=[t.name for t in spec.outputs],
            dynamic_axes={t.name: _open(t) for t in (*spec.inputs, *spec.outputs)},
            export_params=False,
            do_constant_folding=False,  # it would fold weights, and lose what it made of them
        )
        return onnx.load(path)


def _open(tensor: TensorSpec) -> dict[int, str]:
    """The axes that stay open, by a name that the exporter takes."""
    return {at: dim.replace("*", "") for at, dim in enumerate(tensor.shape) if isinstance(dim, str)}


def _name_axes(model: onnx.ModelProto, spec: GraphSpec) -> None:
    """Give the dynamic axes the names of the spec: the exporter calls them s23 or s23*s27. Sizes of outputs that an open batch
    kept it from seeing are set; what comes out is compared when parity is measured."""
    for values, tensors, given in ((model.graph.input, spec.inputs, True), (model.graph.output, spec.outputs, False)):
        for value, tensor in zip(values, tensors, strict=False):
            for axis, dim in zip(value.type.tensor_type.shape.dim, tensor.shape, strict=False):
                if isinstance(dim, str) and not axis.HasField("dim_value"):
                    axis.dim_param = dim
                elif isinstance(dim, int) and not (given or axis.HasField("dim_value")):
                    axis.dim_value = dim


def _name_nodes(model: onnx.ModelProto) -> None:
    """Give each node a name of its own: ATC's lists of what stays in float32 go by it."""
    taken: set[str] = set()
    for number, node in enumerate(model.graph.node):
        name = node.name or f"{node.op_type}_{number}"
        node.name = name if name not in taken else f"{name}_{number}"
        taken.add(node.name)


def _read(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    return TensorSpec(value.name, dtype, tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim))


def _say(tensors: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{t.name} {t.dtype} {list(t.shape)}" for t in tensors)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' own progress lines and deprecation notes off the screen: what matters is checked."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
