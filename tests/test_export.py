"""Every graph in both forms equals its module, says what its GraphSpec says, and a wrong one is never left behind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import Result

import export.write
from export import parity, to_onnx, weights
from export.__main__ import main
from export.graphs import module_for
from export.random_inputs import random_inputs
from export.targets import ATC
from models import manifest
from models.blip import BlipRetrieval
from models.engine import DISABLED_OPTIMIZERS
from models.errors import UserError
from models.spec import graph_specs, spec_to_dict
from runtime.graphs import read_graphs
from runtime.session import open_session
from tests import chain
from tests.graph_files import ATC_OPS, MEASURED, rows, scale_a_weight
from tests.tiny import TINY, random_model

SPECS = graph_specs(TINY)
LONGEST = TINY.protocol.max_length
OPSETS = (11, 13, 17, 18)
STATIC = (3, 9)  # batch, length


@pytest.mark.parametrize("name", list(SPECS))
def test_dynamic_graphs_equal_their_modules(ort_graphs: Path, tiny_model: BlipRetrieval, name: str) -> None:
    """At batches and lengths that were not traced (2, 8): one row, the shortest and the longest text."""
    cases = [(1, 2), (1, LONGEST), (4, 2), (7, LONGEST), (3, 17)]
    for row in rows(tiny_model, SPECS[name], ort_graphs / f"{name}.onnx", cases):
        assert row.max_rel <= MEASURED, row


@pytest.fixture(scope="module")
def static_graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Every graph at every opset that ATC's users ask for, by (name, opset)."""
    folder, blip = tmp_path_factory.mktemp("static"), random_model()
    found = {}
    for name, spec in SPECS.items():
        for opset in OPSETS:
            path = folder / f"{name}_{opset}.onnx"
            inputs = random_inputs(name, blip, *STATIC, seed=0)
            to_onnx.write_onnx(module_for(name, blip), spec.bind(*STATIC), inputs, path, ATC, opset)
            found[name, opset] = path
    return found


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", list(SPECS))
def test_static_graphs(static_graphs: dict[tuple[str, int], Path], tiny_model: BlipRetrieval, name: str, opset: int) -> None:
    path, spec = static_graphs[name, opset], SPECS[name].bind(*STATIC)
    for row in rows(tiny_model, spec, path, [STATIC] * 2):
        assert row.max_rel <= MEASURED, row
    model = onnx.load(path)
    to_onnx.check(model, spec, opset)
    for value in (*model.graph.input, *model.graph.output):
        assert all(axis.HasField("dim_value") for axis in value.type.tensor_type.shape.dim)
    used = {node.op_type for node in model.graph.node}
    assert used <= ATC_OPS, used - ATC_OPS


def test_forms_of_the_written_graphs(ort_graphs: Path, atc_graphs: Path) -> None:
    """What is in the files, read here on its own."""
    for folder, batch, length, opset in ((ort_graphs, "B", "L", 18), (atc_graphs, chain.STATIC, LONGEST, 13)):
        for name, spec in SPECS.items():
            model = onnx.load(folder / f"{name}.onnx")
            onnx.checker.check_model(model)
            assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
            assert not model.functions
            assert {node.domain for node in model.graph.node} == {""}
            assert not {node.op_type for node in model.graph.node} & {"Range", "GatherND", "Loop", "Scan", "If", "ReduceL2"}
            for values, tensors in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
                for value, tensor in zip(values, tensors, strict=True):
                    kind = value.type.tensor_type
                    dims = [axis.dim_param or axis.dim_value for axis in kind.shape.dim]
                    assert value.name == tensor.name
                    assert dims == [{"B": batch, "L": length}.get(str(dim), dim) for dim in tensor.shape]
                    assert onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type) == np.dtype(tensor.dtype)


def test_manifest(ort_graphs: Path, atc_graphs: Path) -> None:
    found = manifest.read(ort_graphs, "graphs", verify=True)
    content = found.content
    of_the_model = {"model", "config", "checkpoint", "temperature", "tokenizer"}
    assert content.keys() == of_the_model | {"target", "opset", "precision", "graphs", "parity"}
    assert content["temperature"] is None
    assert content["checkpoint"].keys() == {"file", "sha256", "layout"}
    assert (content["target"], content["opset"], content["precision"]) == ("ort", 18, "float32")
    assert list(content["graphs"]) == list(SPECS)
    for name, values in content["graphs"].items():
        assert {key: values[key] for key in ("inputs", "outputs")} == spec_to_dict(SPECS[name])
        assert values["file"] == f"{name}.onnx"
        assert values["nodes"] == len(onnx.load(ort_graphs / values["file"]).graph.node)
    assert set(found.files) == {*(f"{name}.onnx" for name in SPECS), "tokenizer/vocab.txt"}
    assert [(row["graph"], row["output"]) for row in content["parity"]] == [(n, t.name) for n in SPECS for t in SPECS[n].outputs]
    for row in content["parity"]:
        assert 0 <= row["max_rel"] <= MEASURED < row["bound"] == parity.BOUND
        assert row["cases"]
    static = manifest.read(atc_graphs, "graphs").content
    assert static["graphs"]["itm"]["inputs"][0]["shape"] == [chain.STATIC, LONGEST]
    assert static["config"] == content["config"]


class Work:
    """A small checkpoint and the command; by default the quickest graph, in its quickest form."""

    def __init__(self, root: Path) -> None:
        self.out = root / "out" / "graphs"
        self.options = chain.write_model(root / "model", random_model())

    def run(self, *options: object, target: str = "atc", graphs: str = "image_kv", model: bool = True) -> Result:
        named = self.options if model else self.options[2:]
        chosen = ("--target", target, "--graphs", graphs) if graphs else ("--target", target)
        return chain.call(main, *named, "--out", self.out, *chosen, *options)

    def left(self) -> list[str]:
        return sorted(path.name for path in self.out.parent.iterdir()) if self.out.parent.exists() else []


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def test_a_selection_of_graphs(work: Work) -> None:
    printed = chain.done(work.run(graphs="text_embed,image_kv"))
    found = manifest.read(work.out, "graphs")
    assert list(found.content["graphs"]) == ["text_embed", "image_kv"]
    assert {row["graph"] for row in found.content["parity"]} == {"text_embed", "image_kv"}
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines] == ["checkpoint", "graph", "text_embed", "image_kv", "2"]
    assert lines[-1].startswith("2 graphs, opset 13, target atc")
    assert read_graphs(work.out).written["text_embed"].inputs[0].shape == (1, LONGEST)


def test_a_graph_asked_for_twice_is_one(work: Work) -> None:
    printed = chain.done(work.run(graphs="image_kv,image_kv"))
    assert printed.splitlines()[-1].startswith("1 graphs, opset 13")
    assert list(manifest.read(work.out, "graphs").content["graphs"]) == ["image_kv"]


def test_length_and_batchsize(work: Work) -> None:
    result = work.run("--batchsize", 2, "--length", 5, "--opset", 11, graphs="text_embed")
    chain.done(result)
    assert result.stderr.startswith(
        "Warning: --length 5 deviates from the model's protocol, 35 tokens; longer captions will be cut"
    )
    found = read_graphs(work.out)
    assert found.written["text_embed"].inputs[0].shape == (2, 5)
    assert found.config == dataclasses.replace(TINY, protocol=dataclasses.replace(TINY.protocol, max_length=5))
    assert manifest.read(work.out, "graphs").content["opset"] == 11
    again = work.run("--length", LONGEST, graphs="text_embed")
    chain.done(again)
    assert not again.stderr
    assert read_graphs(work.out).config == TINY


@pytest.mark.parametrize(("positions", "longest"), [(3, 3), (8, 8), (36, 4)])
def test_models_of_short_captions(tmp_path: Path, positions: int, longest: int) -> None:
    """The example inputs and the cases that are measured fit into them."""
    config = dataclasses.replace(
        TINY,
        text=dataclasses.replace(TINY.text, positions=positions),
        protocol=dataclasses.replace(TINY.protocol, max_length=longest),
    )
    graphs = chain.export_graphs(tmp_path, "--graphs", "text_embed,itm", model=random_model(config))
    for row in manifest.read(graphs, "graphs").content["parity"]:
        assert row["max_rel"] <= MEASURED, row
    assert read_graphs(graphs).written["itm"] == SPECS["itm"]


def test_what_is_measured_is_what_will_run(ort_graphs: Path, tiny_model: BlipRetrieval, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sessions are optimised alike."""
    real, asked = onnxruntime.InferenceSession, list[Any]()

    def session(path: str, options: Any, **others: Any) -> Any:
        asked.append(others)
        return real(path, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    rows(tiny_model, SPECS["text_embed"], ort_graphs / "text_embed.onnx", [(1, 3)])
    open_session(read_graphs(ort_graphs), "text_embed")
    assert asked[0] == asked[1]
    assert asked[0]["disabled_optimizers"] == DISABLED_OPTIMIZERS["cpu"]


def test_a_later_opset_for_onnx_runtime(work: Work) -> None:
    """From 20 on there is an operator for GELU."""
    chain.done(work.run("--opset", 20, target="ort", graphs="text_embed"))
    model = onnx.load(work.out / "text_embed.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert "Gelu" in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize(
    ("options", "graphs", "target", "said"),
    [
        (("--model", "blip-demo"), "image_kv", "atc", "Name the model with --model PRESET or its sizes with --config"),
        (("--opset", 10), "image_kv", "atc", "--target atc writes opsets 11 to 18, asked was 10."),
        (("--opset", 19), "image_kv", "atc", "--target atc writes opsets 11 to 18, asked was 19."),
        (("--opset", 17), "image_kv", "ort", "--target ort writes opsets 18 to 23, asked was 17."),
        (("--batchsize", 4), "image_kv", "ort", "--batchsize and --length fix axes, which only --target atc does"),
        (("--length", 4), "image_kv", "ort", "--batchsize and --length fix axes, which only --target atc does"),
        (("--length", 36), "text_embed", "atc", "--length 36 is longer than the captions of this model, 35 tokens."),
        (("--length", 2), "text_embed", "atc", "Invalid value for '--length'"),
        (("--batchsize", 0), "text_embed", "atc", "Invalid value for '--batchsize'"),
        ((), "image_kv,itm_cache", "atc", "There is no graph 'itm_cache'; known graphs: text_embed, image_embed, image_feat,"),
        ((), "image_kv,", "atc", "There is no graph ''"),
        (("--graphs", ""), "image_kv", "atc", "There is no graph ''"),
        ((), "image_kv", "trt", "Invalid value for '--target'"),
    ],
)
def test_misuse(work: Work, options: tuple[object, ...], graphs: str, target: str, said: str) -> None:
    assert said in chain.refusal(work.run(*options, graphs=graphs, target=target), code=2)
    assert work.left() == []


def test_misuse_of_the_model(work: Work) -> None:
    assert "Presets: blip-retrieval-base-coco" in chain.refusal(work.run(model=False), code=2)
    message = chain.refusal(work.run("--model", "blip-retrieval-base-cocoo", model=False), code=2)
    assert "Did you mean 'blip-retrieval-base-coco'?" in message
    assert work.left() == []


def planted(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    real: Callable[..., int] = to_onnx.write_onnx

    def write(module: Any, spec: Any, inputs: Any, path: Path, *others: Any) -> int:
        nodes = real(module, spec, inputs, path, *others)
        scale_a_weight(path, factor)
        return nodes

    monkeypatch.setattr(export.write, "write_onnx", write)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_graph_fails_the_export(work: Work, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    planted(monkeypatch, factor)
    message = chain.refusal(work.run())
    assert message.startswith("The graphs are not the model: image_kv.cross_kv differs by ")
    assert message.endswith("of its largest value (bound 5e-05). Nothing was written.")
    assert work.left() == []


def test_a_failed_export_keeps_the_old_folder(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.done(work.run())
    before = {path: path.read_bytes() for path in work.out.rglob("*") if path.is_file()}
    planted(monkeypatch, 1.001)
    chain.refusal(work.run())
    assert work.left() == ["graphs"]
    assert {path: path.read_bytes() for path in work.out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", list(SPECS))
def test_parity_sees_one_scaled_weight(atc_graphs: Path, tmp_path: Path, tiny_model: BlipRetrieval, name: str) -> None:
    path = tmp_path / f"{name}.onnx"
    path.write_bytes((atc_graphs / path.name).read_bytes())
    scale_a_weight(path)
    found = rows(tiny_model, SPECS[name].bind(chain.STATIC, LONGEST), path, [(chain.STATIC, LONGEST)])
    assert not any(row.ok for row in found), found
    with pytest.raises(UserError, match=f"{name}\\..* differs by"):
        parity.refuse_beyond(found)


def test_bound() -> None:
    row = parity.Parity("itm", "itm_logits", "(1)", 1e-9, 4e-5, 5e-5)
    parity.refuse_beyond([row])
    for wrong in (6e-5, float("inf"), float("nan")):
        with pytest.raises(UserError, match="differs by"):
            parity.refuse_beyond([row, dataclasses.replace(row, max_rel=wrong)])


def test_another_shape_is_beyond_any_bound() -> None:
    assert parity._worse((0.0, 0.0), np.zeros((2, 3)), np.zeros((2, 4))) == (float("inf"), float("inf"))
    assert np.isnan(parity._worse((float("nan"), float("nan")), np.zeros(2), np.zeros(2))).all()


def test_a_graph_that_does_not_run(tmp_path: Path, tiny_model: BlipRetrieval) -> None:
    (tmp_path / "image_kv.onnx").write_bytes(b"not a graph")
    with pytest.raises(UserError, match="image_kv: ONNX Runtime does not run the graph written"):
        rows(tiny_model, SPECS["image_kv"], tmp_path / "image_kv.onnx", [(1, 3)])


def rename(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "logits"


def change_dtype(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT32


def change_axis(model: onnx.ModelProto) -> None:
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_value = LONGEST - 1


def free_axis(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"


def drop_input(model: onnx.ModelProto) -> None:
    del model.graph.input[2]


def add_domain(model: onnx.ModelProto) -> None:
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def add_function(model: onnx.ModelProto) -> None:
    model.functions.append(onnx.helper.make_function("local", "f", [], [], [], model.opset_import))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename, "itm: the outputs written are logits float32 [3, 2], expected itm_logits float32 [3, 2]."),
        (change_dtype, "text_ids int32 [3, 35]"),
        (change_axis, "text_atten_mask int64 [3, 34]"),
        (free_axis, "text_ids int64 ['N', 35]"),
        (drop_input, "itm: the inputs written are text_ids int64 [3, 35], text_atten_mask int64 [3, 35], expected"),
        (add_domain, "itm: the exporter wrote opset {'ai.onnx': 13, 'com.microsoft': 1}, asked was 13."),
        (add_function, "itm: the graph holds model-local functions, which ATC does not read."),
    ],
)
def test_check(atc_graphs: Path, change: Callable[[onnx.ModelProto], None], said: str) -> None:
    model, spec = onnx.load(atc_graphs / "itm.onnx"), SPECS["itm"].bind(chain.STATIC, LONGEST)
    to_onnx.check(model, spec, 13)
    with pytest.raises(UserError, match="asked was 17"):
        to_onnx.check(model, spec, 17)
    change(model)
    with pytest.raises(UserError) as error:
        to_onnx.check(model, spec, 13)
    assert said in error.value.message


def test_weights_beside_a_large_graph(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of graphs over 2 GB, at a limit of 2 kB."""
    monkeypatch.setattr(weights, "PROTOBUF_LIMIT", 2000)
    chain.done(work.run("--batchsize", chain.STATIC, graphs="image_kv,text_embed"))
    found = manifest.read(work.out, "graphs", verify=True)
    assert set(found.files) == {f"{n}.onnx{end}" for n in ("image_kv", "text_embed") for end in ("", ".data")} | {
        "tokenizer/vocab.txt"
    }
    assert found.files["text_embed.onnx"]["bytes"] < found.files["text_embed.onnx.data"]["bytes"]
    feat = np.random.default_rng(0).normal(size=(2, TINY.vision.tokens, TINY.vision.width)).astype(np.float32)
    kv = open_session(read_graphs(work.out), "image_kv").run(image_feat=feat)["cross_kv"]
    assert kv.shape == SPECS["image_kv"].bind(2, 1).outputs[0].shape


def test_an_export_again_says_the_same(work: Work) -> None:
    chain.done(work.run())
    first = json.loads((work.out / manifest.NAME).read_text("utf-8"))
    chain.done(work.run())
    second = json.loads((work.out / manifest.NAME).read_text("utf-8"))
    assert first["files"] == second["files"]
    assert first["parity"] == second["parity"]
