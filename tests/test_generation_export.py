"""The graphs that write words: equal to their modules at sizes that were not traced, down to none; of what ATC reads; and from
weights in half precision the same as from these weights widened."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from safetensors.torch import load_file, save_file
from torch import Tensor

import models.bert
from export import parity, to_onnx, weights
from export.generation_graphs import llm
from export.graphs import Graph, module_for
from export.hollow import hollow
from export.mapped import let_go
from export.random_inputs import random_inputs
from export.sizes import Sizes, fixed, of_graph, traced
from export.targets import ATC, ORT
from export.write import blank_inputs
from models.blip2_llm import Blip2Llm
from models.config import GenerationConfig
from models.engine import DISABLED_OPTIMIZERS
from models.fit import Generator
from models.generation_spec import layer_names
from models.spec import graph_specs
from tests.graph_files import ATC_OPS, LARGEST_HALF, constants, scale_a_weight
from tests.talkative import talkative
from tests.tiny import GENERATORS, random_generator

Graphs = Callable[[str, str], Path]

# What these graphs consist of beside ATC_OPS. Each is registered for opset 8 to 18 in CANN's ONNX plugin (hicann/ge).
MORE_OPS = {"Cos", "Less", "Log", "Neg", "Relu", "Sin", "Tanh", "Where"}
MEASURED = 1e-5  # on random weights at most 4e-6, of T5
DECODERS = {"caption": "text_decoder", "vqa": "text_decoder", "opt": "llm", "llama": "llm", "t5": "t5_decoder"}
QUERIES = 6
# What differs from OPT's. Graphs that look at pictures are the same in all language models.
WRITTEN = [
    *(("caption", name) for name in ("image_feat", "image_kv", "text_decoder")),
    *(("vqa", name) for name in ("question_encoder", "text_decoder")),
    *(("opt", name) for name in ("image_feat", "qformer", "llm")),
    *(("llama", "llm"), ("t5", "t5_encoder"), ("t5", "t5_decoder")),
]


def decoding(batch: int, length: int, beams: int, rows: int, past: int, queries: int, seen: int) -> Sizes:
    return Sizes(batch, length, {"M": beams, "R": rows, "P": past, "Q": queries, "C": seen})


# None of it was traced: one of everything, nothing before, no picture, the longest.
DECODED = [
    decoding(1, 1, 1, 1, 1, 1, 1),
    decoding(1, 1, 1, 1, 0, 0, 1),
    decoding(1, 1, 1, 2, 0, QUERIES, 7),
    decoding(1, 3, 1, 1, 0, 0, QUERIES),
    decoding(4, 1, 1, 1, 12, 0, 9),
    decoding(2, 2, 5, 11, 1, 0, 1),
    decoding(1, 1, 1, 6, 30, 0, 30),
    decoding(3, 32, 1, 3, 0, QUERIES, 35),
]
READ = [Sizes(1, 1), Sizes(1, 2), Sizes(1, 32), Sizes(7, 5)]


@pytest.mark.parametrize(("kind", "name"), WRITTEN)
def test_dynamic_graphs(generator_graphs: Graphs, kind: str, name: str) -> None:
    model, path = talkative(kind), generator_graphs(kind, "ort") / f"{name}.onnx"
    spec = graph_specs(model.cfg)[name]
    cases = DECODED if name == DECODERS[kind] else READ
    if name == "llm":  # its first step, when no prompt is shared yet
        cases = [*cases, decoding(3, 7, 1, 3, 0, QUERIES, 0), decoding(2, 1, 4, 2, 0, 0, 9)]
    for row in parity.measure(model, module_for(name, model), spec, path, cases):
        assert row.max_rel <= MEASURED, row
    written = onnx.load(path)
    to_onnx.check(written, spec, 18)
    onnx.checker.check_model(written)
    assert not {node.op_type for node in written.graph.node} & {"GatherND", "Loop", "Scan", "If", "ReduceL2"}


def test_axes_are_named(generator_graphs: Graphs) -> None:
    """What is in the file, read here on its own."""
    written = onnx.load(generator_graphs("caption", "ort") / "text_decoder.onnx")
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*written.graph.input, *written.graph.output)
    }
    assert axes["text_ids"] == ["B", "M", "L"]
    assert axes["beam_index"] == ["B", "M"]
    assert axes["cross_kv.1.value"] == ["B", 4, 17, 10]
    assert axes["past.0.key"] == ["R", 4, "P", 10]
    assert axes["present.1.value"] == ["B*M", 4, "P+L", 10]
    assert axes["logits"] == ["B", "M", 32]


@pytest.mark.parametrize("kind", DECODERS)
def test_the_past_is_read_no_more_than_it_must(generator_graphs: Graphs, tmp_path: Path, kind: str) -> None:
    """In the graph as ONNX Runtime runs it: rows are picked, new ones appended, and the products read that as it lies."""
    options, path = onnxruntime.SessionOptions(), generator_graphs(kind, "ort") / f"{DECODERS[kind]}.onnx"
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "run.onnx"), 3
    chosen: dict[str, Any] = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": DISABLED_OPTIMIZERS["cpu"]}
    onnxruntime.InferenceSession(str(path), options, **chosen)
    graph = onnx.load(tmp_path / "run.onnx").graph

    def readers(name: str) -> list[onnx.NodeProto]:
        return [node for node in graph.node if name in node.input and node.op_type != "Shape"]

    layers = sum(value.name.startswith("past.") for value in graph.input) // 2
    for before, after in zip(layer_names("past", layers), layer_names("present", layers), strict=True):
        (gather,) = readers(before)
        (concat,) = readers(gather.output[0])
        assert (gather.op_type, concat.op_type, list(concat.output)) == ("Gather", "Concat", [after])
        assert {node.op_type for node in readers(after)} <= {"MatMul", "FusedMatMul"}
    for value in graph.input:
        if value.name.startswith("cross_kv."):
            assert {node.op_type for node in readers(value.name)} <= {"MatMul", "FusedMatMul"}
        if value.name.startswith("prompt_kv."):
            (apart,) = readers(value.name)  # an axis more, which copies nothing
            assert apart.op_type in ("Unsqueeze", "Reshape")
            assert {node.op_type for node in readers(apart.output[0])} <= {"MatMul", "FusedMatMul"}


@pytest.mark.parametrize(("kind", "fused"), [("caption", "BiasGelu"), ("llama", "QuickGelu"), ("t5", "Gelu")])
def test_kernels_of_onnx_runtime(generator_graphs: Graphs, tmp_path: Path, kind: str, fused: str) -> None:
    """Activations and norms become one kernel each."""
    options, path = onnxruntime.SessionOptions(), generator_graphs(kind, "ort") / f"{DECODERS[kind]}.onnx"
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "run.onnx"), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = [node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node]
    assert found.count(fused) >= 2
    assert not {"Erf", "Sigmoid", "Tanh", "ReduceMean"} & set(found)


def static_sizes(config: GenerationConfig, name: str) -> Sizes:
    return of_graph(
        fixed(dataclasses.replace(config, protocol=dataclasses.replace(config.protocol, max_length=7)), 2, 3, 14), name
    )


def write(model: Generator, name: str, path: Path, target: str = ATC, opset: int = 13, graph: Graph | None = None) -> None:
    spec = graph_specs(model.cfg, static=target == ATC)[name]
    example = (static_sizes(model.cfg, name) if target == ATC else traced(model.cfg)).bind(spec)
    module = graph or module_for(name, model, static=target == ATC)
    to_onnx.write_onnx(module, example if target == ATC else spec, blank_inputs(example), path, target, opset)


def measured(model: Generator, name: str, path: Path) -> list[parity.Parity]:
    """Of a static graph, with a buffer that is filled in part, and one that is full."""
    size = static_sizes(model.cfg, name)
    spec = size.bind(graph_specs(model.cfg, static=True)[name])
    return parity.measure(model, module_for(name, model, static=True), spec, path, [size] * 2)


def tanh_gelu() -> GenerationConfig:
    config = GENERATORS["t5"]
    return dataclasses.replace(config, llm=dataclasses.replace(config.llm, activation="gelu_new"))  # type: ignore[union-attr]


KINDS: dict[str, GenerationConfig] = {**GENERATORS, "t5-tanh": tanh_gelu()}
SEEING = ("image_feat", "qformer")  # as in the first stage, of which test_blip2_export.py has them


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("kind", KINDS)
def test_static_graphs(tmp_path: Path, kind: str, opset: int) -> None:
    """Equal to the module; of ATC's operators; and no number in it, so neither the mask, is infinite in float16."""
    model = random_generator(KINDS[kind])
    for name, symbolic in graph_specs(model.cfg, static=True).items():
        if name in SEEING:
            continue
        path = tmp_path / f"{name}.onnx"
        write(model, name, path, opset=opset)
        for row in measured(model, name, path):
            assert row.max_rel <= MEASURED, row
        written = onnx.load(path)
        to_onnx.check(written, static_sizes(model.cfg, name).bind(symbolic), opset)
        used = {node.op_type for node in written.graph.node}
        assert used <= ATC_OPS | MORE_OPS, used - ATC_OPS
        largest = max(float(np.abs(value).max()) for value in constants(written) if value.dtype == np.float32)
        assert largest < LARGEST_HALF
        assert (largest == -models.bert.MASKED) == (name != "image_kv")


@pytest.mark.parametrize("kind", ["opt", "t5"])
@pytest.mark.parametrize("half", [False, True])
def test_what_is_not_filled_counts_nothing(tmp_path: Path, kind: str, half: bool) -> None:
    """To the last bit, in float16 too."""
    model, name = random_generator(GENERATORS[kind]), "llm_decode" if kind == "opt" else "t5_decoder"
    write(model, name, tmp_path / "graph.onnx")
    written = onnx.load(tmp_path / "graph.onnx")
    written = convert_float_to_float16(written, keep_io_types=True) if half else written
    session = onnxruntime.InferenceSession(written.SerializeToString(), providers=["CPUExecutionProvider"])
    batch, length, others = static_sizes(model.cfg, name)
    feeds = {key: value.numpy() for key, value in random_inputs(name, model, batch, length, 2, **others).items()}
    filled = feeds["past_mask"].reshape(len(feeds["past"]), -1).any(axis=0)  # (S,)
    assert 0 < filled.sum() < len(filled)
    found = session.run(None, feeds)
    feeds["past"][:, :, :, ~filled] *= -7
    for before, after in zip(found, session.run(None, feeds), strict=True):
        np.testing.assert_array_equal(before, after)
    feeds["past"][:, :, :, 0] *= -7  # the check can fail
    assert not np.array_equal(session.run(None, feeds)[0], found[0])


def test_inputs_are_those_of_a_run() -> None:
    """Rows go on from rows of the same prompt, some twice; texts are unequal; odd seeds fill the buffer."""
    model = random_generator(GENERATORS["caption"])
    found = random_inputs("text_decoder", model, 2, 1, 0, M=4, R=8, P=9)
    index = found["beam_index"]
    assert (index % 2 == torch.tensor([[0], [1]])).all()
    assert not torch.equal(index.flatten(), torch.arange(8))
    assert len(index.unique()) < 8
    assert 0 < found["past_mask"].float().mean() < 1
    assert torch.equal(found["positions"][:, :, 0], found["past_mask"].sum(dim=2))
    for seed, full in ((0, False), (1, True), (2, False), (3, True)):
        mask = random_inputs("text_decoder", model, 2, 1, seed, M=4, S=9)["past_mask"]
        assert bool(mask.any(dim=0).any(dim=0).all()) == full


@pytest.mark.parametrize("kind", DECODERS)
def test_parity_sees_one_scaled_weight(generator_graphs: Graphs, tmp_path: Path, kind: str) -> None:
    model, name = talkative(kind), DECODERS[kind]
    path = tmp_path / "graph.onnx"
    path.write_bytes((generator_graphs(kind, "ort") / f"{name}.onnx").read_bytes())
    scale_a_weight(path)
    found = parity.measure(model, module_for(name, model), graph_specs(model.cfg)[name], path, DECODED[5:6])
    assert not any(row.ok for row in found if row.output == "logits"), found


def other_rows(model: Blip2Llm, *inputs: Tensor) -> tuple[Tensor, ...]:
    own = torch.arange(inputs[5].numel()).reshape(inputs[5].shape) % len(inputs[-1])
    return llm(model, *inputs[:5], own, *inputs[6:])  # type: ignore[arg-type]


def no_picture(model: Blip2Llm, *inputs: Tensor) -> tuple[Tensor, ...]:
    return llm(model, inputs[0] * 0, *inputs[1:])


def everything_seen(model: Blip2Llm, *inputs: Tensor) -> tuple[Tensor, ...]:
    return llm(model, *inputs[:4], torch.ones_like(inputs[4]), *inputs[5:])


def whole_prompt_seen(model: Blip2Llm, *inputs: Tensor) -> tuple[Tensor, ...]:
    return llm(model, *inputs[:6], torch.ones_like(inputs[6]), *inputs[7:])


def other_prompts(model: Blip2Llm, *inputs: Tensor) -> tuple[Tensor, ...]:
    half = 7 + 2 * model.cfg.llm.depth
    return llm(model, *inputs[:7], *(kept.flip(0) for kept in inputs[7:half]), *inputs[half:])


@pytest.mark.parametrize(
    ("wrong", "case"),
    [
        (other_rows, DECODED[5]),
        (no_picture, DECODED[7]),
        (everything_seen, decoding(3, 1, 1, 3, 9, 0, 1)),
        (whole_prompt_seen, decoding(3, 1, 2, 6, 1, 0, QUERIES + 9)),
        (other_prompts, decoding(3, 1, 2, 6, 1, 0, QUERIES + 9)),
    ],
)
def test_parity_sees_another_computation(generator_graphs: Graphs, wrong: Callable[..., Any], case: Sizes) -> None:
    model, path = talkative("opt"), generator_graphs("opt", "ort") / "llm.onnx"
    found = parity.measure(model, Graph(wrong, model).eval(), graph_specs(model.cfg)["llm"], path, [case])
    assert not all(row.ok for row in found)
    assert found[0].max_rel > 100 * parity.BOUND


HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "name", "target", "dtype"),
    [
        ("opt", "llm_decode", ATC, HALF),
        ("llama", "llm_prefill", ATC, BRAIN),
        ("t5", "t5_encoder", ATC, BRAIN),
        ("t5", "t5_encoder", ORT, HALF),
    ],
)
def test_weights_in_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, target: str, dtype: torch.dtype
) -> None:
    """As widened beforehand, to the last bit; and in a file beside the graph."""
    monkeypatch.setattr(weights, "PROTOBUF_LIMIT", 100_000)
    half, wide = random_generator(GENERATORS[kind]), random_generator(GENERATORS[kind])
    assert isinstance(half, Blip2Llm)
    assert isinstance(wide, Blip2Llm)
    half.llm_model.to(dtype)
    wide.llm_model.to(dtype).to(torch.float32)
    files = [tmp_path / "half.onnx", tmp_path / "wide.onnx"]
    for model, path in zip((half, wide), files, strict=True):
        write(model, name, path, target, 18 if target == ORT else 13)
        assert (tmp_path / f"{path.name}.data").stat().st_size > 100_000
    first, second = (onnx.load(path) for path in files)
    assert [node.SerializeToString() for node in first.graph.node] == [node.SerializeToString() for node in second.graph.node]
    for ours, theirs in zip(first.graph.initializer, second.graph.initializer, strict=True):
        assert (ours.name, ours.data_type, ours.dims) == (theirs.name, theirs.data_type, theirs.dims)
        assert numpy_helper.to_array(ours).tobytes() == numpy_helper.to_array(theirs).tobytes()
    if target == ATC:
        for row in measured(half, name, files[0]):
            assert row.max_rel <= MEASURED, row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_not_copied(dtype: torch.dtype) -> None:
    model = random_generator(GENERATORS["opt"])
    model.to(dtype)
    found = weights.weights_of(model)
    for name, tensor in model.state_dict().items():
        assert found[name].__array_interface__["data"][0] == tensor.data_ptr()
        np.testing.assert_array_equal(found[name].astype(np.float32), tensor.float().numpy())


def test_weights_that_were_let_go_are_the_same(tmp_path: Path) -> None:
    """Those in a file, and those that are nowhere else."""
    model = random_generator(GENERATORS["opt"])
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    mapped, before = random_generator(GENERATORS["opt"], seed=1), {n: t.clone() for n, t in model.state_dict().items()}
    mapped.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    for each in (model, mapped):
        let_go(each)
        assert all(torch.equal(tensor, before[name]) for name, tensor in each.state_dict().items())


def test_a_hollow_graph_holds_no_weights() -> None:
    model = random_generator(GENERATORS["llama"])
    state = hollow(module_for("llm", model)).state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {
        f"model.{name}": tensor.shape for name, tensor in model.state_dict().items()
    }
    assert {tensor.untyped_storage().nbytes() for tensor in state.values()} == {4}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert len({float(tensor.flatten()[0]) for tensor in state.values()}) == len(state)


def test_a_large_graph_is_measured_where_it_lies(generator_graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are not copied into another order, and the result is the same."""
    model, path = talkative("opt"), generator_graphs("opt", "ort") / "llm.onnx"
    real, asked = onnxruntime.InferenceSession, list[str]()

    def session(path: str, options: onnxruntime.SessionOptions, **others: Any) -> Any:
        asked.append(options.get_session_config_entry("session.disable_prepacking"))
        return real(path, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(parity, "MAPPED", 1000)
    for row in parity.measure(model, module_for("llm", model), graph_specs(model.cfg)["llm"], path, DECODED[4:6]):
        assert row.max_rel <= MEASURED, row
    assert asked == ["1"]
