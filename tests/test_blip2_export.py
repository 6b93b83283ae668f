"""BLIP-2's graphs in both forms equal their modules, consist of what ATC reads, and keep large weights beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import Tensor

import models.bert
from export import parity, to_onnx, weights
from export.__main__ import main
from export.cann import OPSETS_READ
from export.graphs import Graph, module_for
from export.lint import lint_folder
from export.random_inputs import random_inputs
from export.sizes import Sizes
from export.targets import ASCEND, ATC, ORT
from models import manifest, presets
from models.blip2 import Blip2Retrieval
from models.config import Blip2Config
from models.spec import graph_specs
from runtime.graphs import read_graphs
from runtime.session import open_session
from tests import chain
from tests.graph_files import ATC_OPS, LARGEST_HALF, MEASURED, constants, rows, scale_a_weight
from tests.make_checkpoint import encoder_file, stage1_state, without_encoder, write_stage1
from tests.tiny import TINY2, TINY_CLIP, random_blip2

SPECS = graph_specs(TINY2)
LONGEST = TINY2.protocol.max_length
OPSETS = (11, 13, 17)
STATIC = (3, 9)  # batch, length
# Of CLIP what differs: the image encoder.
WRITTEN = [*((TINY2, name) for name in SPECS), (TINY_CLIP, "image_feat")]
NAMES = [f"{model.vision.kind}-{name}" for model, name in WRITTEN]


def write(module: Graph, name: str, path: Path, target: str = ATC, opset: int = 13) -> None:
    """What `module` computes of the inputs of graph `name` of TINY2, as that graph."""
    spec = SPECS[name].bind(*STATIC) if target == ATC else SPECS[name]
    to_onnx.write_onnx(module, spec, random_inputs(name, random_blip2(), *STATIC, seed=0), path, target, opset)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The graphs folder of each kind of image encoder."""
    clip = ("--graphs", "image_feat")
    return {
        kind: chain.export_graphs(tmp_path_factory.mktemp(kind), *options, model=random_blip2(model))
        for kind, model, options in (("eva", TINY2, ()), ("clip", TINY_CLIP, clip))
    }


Static = Callable[[Blip2Config, str, int], Path]


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Static:
    """A graph with fixed axes at one opset, written when it is first asked for. Read only."""
    folder = tmp_path_factory.mktemp("static")

    def written(model: Blip2Config, name: str, opset: int) -> Path:
        path = folder / f"{model.vision.kind}_{name}_{opset}.onnx"
        if not path.exists():
            write(module_for(name, random_blip2(model)), name, path, opset=opset)
        return path

    return written


@pytest.mark.parametrize(("model", "name"), WRITTEN, ids=NAMES)
def test_dynamic_graphs(dynamic: dict[str, Path], model: Blip2Config, name: str) -> None:
    """At batches and lengths that were not traced (2, 8): one row, the shortest and the longest text."""
    path = dynamic[model.vision.kind] / f"{name}.onnx"
    for row in rows(random_blip2(model), SPECS[name], path, [(1, 2), (1, LONGEST), (4, 2), (7, LONGEST), (3, 17)]):
        assert row.max_rel <= MEASURED, row
    written = onnx.load(path)
    to_onnx.check(written, SPECS[name], 18)
    onnx.checker.check_model(written)
    assert not {node.op_type for node in written.graph.node} & {"Range", "GatherND", "Loop", "Scan", "If", "ReduceL2"}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(("model", "name"), WRITTEN, ids=NAMES)
def test_static_graphs(static: Static, model: Blip2Config, name: str, opset: int) -> None:
    """Equal to the module; of ATC's operators; and no number in it, so neither the mask, is infinite in float16."""
    path, spec = static(model, name, opset), SPECS[name].bind(*STATIC)
    for row in rows(random_blip2(model), spec, path, [STATIC] * 2):
        assert row.max_rel <= MEASURED, row
    written = onnx.load(path)
    to_onnx.check(written, spec, opset)
    used = {node.op_type for node in written.graph.node}
    assert used <= ATC_OPS, used - ATC_OPS
    largest = max(float(np.abs(value).max()) for value in constants(written) if value.dtype == np.float32)
    assert largest < LARGEST_HALF
    assert (largest == -models.bert.MASKED) == (spec.inputs[0].name == "text_ids")


@pytest.mark.parametrize("opset", [11, 13, 17])
@pytest.mark.parametrize("length", [(), ("--length", "open")], ids=["fixed", "open"])
def test_graphs_with_an_open_batch(tmp_path: Path, opset: int, length: tuple[str, ...]) -> None:
    """Every graph, for CANN 6 too; at batches and lengths that were not traced the same as the module."""
    model, named = random_blip2(), ("--target", ASCEND, "--opset", opset, *length)
    graphs = chain.export_graphs(tmp_path, *named, model=model)
    content = manifest.read(graphs, "graphs").content
    assert list(content["graphs"]) == list(SPECS)
    assert all(row["max_rel"] <= MEASURED for row in content["parity"]), content["parity"]
    cases = [(1, LONGEST), (5, LONGEST), *([(2, 3), (4, 17)] if length else [])]
    for name in ("itm", "multimodal"):
        spec = Sizes(1, LONGEST).opened(SPECS[name], bool(length))
        for row in rows(model, spec, graphs / f"{name}.onnx", cases):
            assert row.max_rel <= MEASURED, row
    for cann in (6, 7, 8):
        found = lint_folder(graphs, cann, [1, 4], length="3,35" if length else None)
        assert {finding.rule for finding in found} == ({"opset"} if opset not in OPSETS_READ[cann] else set()), found


def test_a_mask_that_float16_does_not_hold_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.bert, "MASKED", -1e9)
    write(module_for("itm", random_blip2()), "itm", tmp_path / "graph.onnx")
    assert max(np.abs(value).max() for value in constants(onnx.load(tmp_path / "graph.onnx"))) > LARGEST_HALF


@pytest.mark.parametrize("name", ["text_embed", "itm", "multimodal"])
def test_masks_in_float16(static: Static, name: str) -> None:
    """What is padded is not seen, and the numbers stay what they are."""
    model = random_blip2()
    half = convert_float_to_float16(onnx.load(static(TINY2, name, 13)), keep_io_types=True)
    session = onnxruntime.InferenceSession(half.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {key: value.numpy() for key, value in random_inputs(name, model, *STATIC, seed=0).items()}
    assert not feeds["text_atten_mask"].all()
    found = session.run(None, feeds)[0]
    other = np.where(feeds["text_atten_mask"] == 1, feeds["text_ids"], 7)
    np.testing.assert_array_equal(session.run(None, {**feeds, "text_ids": other})[0], found)
    wanted = module_for(name, model)(*(torch.from_numpy(value) for value in feeds.values())).numpy()
    assert np.abs(found - wanted).max() / np.abs(wanted).max() < 1e-2  # measured on six batches: 3.2e-3 at most


@pytest.mark.parametrize("name", list(SPECS))
def test_parity_sees_one_scaled_weight(static: Static, tmp_path: Path, name: str) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(static(TINY2, name, 13).read_bytes())
    scale_a_weight(path)
    found = rows(random_blip2(), SPECS[name].bind(*STATIC), path, [STATIC])
    assert not any(row.ok for row in found), found


def first_query(model: Blip2Retrieval, ids: Tensor, mask: Tensor, feat: Tensor) -> Tensor:
    states = model.multimodal_embed(ids, mask, model.keys_values(feat))
    return model.itm_head(states[:, 0])


def unmasked(model: Blip2Retrieval, ids: Tensor, mask: Tensor, feat: Tensor) -> Tensor:
    return model.itm_logits(ids, mask.clamp(min=1), model.keys_values(feat))


def next_picture(model: Blip2Retrieval, ids: Tensor, mask: Tensor, feat: Tensor) -> Tensor:
    return model.itm_logits(ids, mask, model.keys_values(feat.roll(1, 0)))


@pytest.mark.parametrize("wrong", [first_query, unmasked, next_picture])
def test_parity_sees_another_computation(tmp_path: Path, wrong: Callable[..., Tensor]) -> None:
    model, path = random_blip2(), tmp_path / "graph.onnx"
    write(Graph(wrong, model).eval(), "itm", path)
    assert rows(model, SPECS["itm"].bind(*STATIC), path, [STATIC])[0].max_rel > 100 * parity.BOUND


@pytest.mark.parametrize("target", [ORT, ATC])
def test_weights_beside_large_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """The form of graphs over 2 GB, at a limit of 100 kB: `image_feat` is above it, `image_kv` is not."""
    monkeypatch.setattr(weights, "PROTOBUF_LIMIT", 100_000)
    model = random_blip2()
    graphs = chain.export_graphs(tmp_path, "--target", target, "--graphs", "image_feat,image_kv", model=model)
    files = manifest.read(graphs, "graphs", verify=True).files
    assert set(files) == {"image_feat.onnx", "image_feat.onnx.data", "image_kv.onnx", "tokenizer/vocab.txt"}
    written = onnx.load(graphs / "image_feat.onnx", load_external_data=False)
    beside = [t for t in written.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in beside]
    assert {place["location"] for place in places} == {"image_feat.onnx.data"}
    assert all(int(place["offset"]) % 4096 == 0 and int(place["length"]) >= 1024 for place in places)
    assert all(len(t.raw_data) < 1024 for t in written.graph.initializer)
    pictures = random_inputs("image_feat", model, 1, 1, seed=0)["input_image"]
    found = open_session(read_graphs(graphs), "image_feat").run(input_image=pictures.numpy())["image_feat"]
    np.testing.assert_allclose(found, model.image_feat(pictures).numpy(), atol=5e-6)


@pytest.mark.parametrize("target", [ORT, ATC])
def test_what_works_on_a_graph_does_not_hold_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    real, held = to_onnx.simplified, list[int]()

    def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
        held.append(sum(value.nbytes for value in constants(model)))
        return real(model)

    monkeypatch.setattr(to_onnx, "simplified", simplified)
    write(module_for("image_feat", random_blip2()), "image_feat", tmp_path / "graph.onnx", target, 18)
    assert len(held) == 1
    assert held[0] < 2_000 < 280_000 < (tmp_path / "graph.onnx").stat().st_size


def test_weights_are_folded_without_a_copy() -> None:
    """A slice and its transposition are views; what depends on an input stays, and a constant is left to the simplifier."""
    packed = np.arange(24, dtype=np.float32).reshape(6, 4)
    nodes = [
        helper.make_node("Constant", [], ["zero"], value=numpy_helper.from_array(np.array([0]))),
        helper.make_node("Add", ["zero", "two"], ["end"]),
        helper.make_node("Slice", ["packed", "zero", "end"], ["part"]),
        helper.make_node("Transpose", ["part"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("x", [1, 4]), ("packed", [6, 4]))]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 2])]
    graph = helper.make_graph(nodes, "g", values, outputs, [numpy_helper.from_array(np.array([2]), "two")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    found = weights.fold(model, {"packed": packed})
    assert [node.op_type for node in model.graph.node] == ["Constant", "Add", "MatMul"]
    assert [value.name for value in model.graph.input] == ["x", "turned"]
    assert np.shares_memory(found["turned"], packed)
    np.testing.assert_array_equal(found["turned"], packed[:2].T)
    weights.attach(model, found, Path("unused.onnx"))
    onnx.checker.check_model(model, full_check=True)
    assert [tensor.name for tensor in model.graph.initializer] == ["two", "turned"]


def export_preset(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: object) -> Any:
    """blip-export of mindformers' name for a preset that is TINY2 here; returns the manifest's content."""
    monkeypatch.setitem(presets.PRESETS, "blip2-stage1-vit-g", TINY2)
    vocabulary = chain.write_model(folder / "model", random_blip2())[-1]
    named = ("--model", "blip2_stage1_classification", "--tokenizer", vocabulary, "--out", folder / "graphs")
    chain.done(chain.call(main, *named, "--target", "atc", "--graphs", "image_kv", *options))
    return manifest.read(folder / "graphs", "graphs").content


def test_an_image_encoder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest names both files, the temperature, and the model as we call it."""
    state, whole, vit = stage1_state(TINY2), tmp_path / "stage1.pth", tmp_path / "eva_vit_g.pth"
    write_stage1(TINY2, whole, without_encoder(state))
    torch.save(encoder_file(state, TINY2), vit)
    content = export_preset(tmp_path, monkeypatch, "--checkpoint", whole, "--vit-checkpoint", vit)
    assert content["model"] == "blip2-stage1-vit-g"
    assert content["temperature"] == pytest.approx(0.07)
    assert content["checkpoint"]["file"] == "stage1.pth"
    assert content["checkpoint"]["layout"] == "lavis"
    assert content["checkpoint"]["vit"] == {"file": "eva_vit_g.pth", "sha256": hashlib.sha256(vit.read_bytes()).hexdigest()}


def test_a_checkpoint_without_an_image_encoder(tmp_path: Path) -> None:
    whole = tmp_path / "stage1.pth"
    write_stage1(TINY2, whole, without_encoder(stage1_state(TINY2)))
    options = [*chain.write_model(tmp_path / "model", random_blip2()), "--out", tmp_path / "graphs"]
    message = chain.refusal(chain.call(main, *options, "--checkpoint", whole))
    assert "--vit-checkpoint" in message
    assert not (tmp_path / "graphs").exists()
    message = chain.refusal(chain.call(main, *options, "--checkpoint", whole, "--vit-checkpoint", tmp_path / "none.pth"))
    assert "none.pth" in message
