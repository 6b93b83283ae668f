"""The lint for ATC: it passes every graph that we write, and finds what was planted, each by its own rule."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.lint import RULES, Finding, lint_folder, lint_model
from export.op_table import FILE, read_table
from export.sizes import Sizes
from models import manifest
from models.config import Blip2Config
from models.errors import Misuse, UserError
from models.spec import GraphSpec, TensorSpec
from tests import chain, generators
from tests.talkative import talkative
from tests.tiny import GENERATORS, TINY2, TINY_CLIP, random_blip2

Graphs = Callable[[str, str], Path]
Nodes = Sequence[onnx.NodeProto]

SPEC = GraphSpec("text_embed", (TensorSpec("text_ids", "int64", ("B", 6)),), (TensorSpec("out", "float32", ("B", 6, 8)),))
AT = [Sizes(1, 6), Sizes(4, 6)]
BATCHES = (1, 4, 16)
NUMBERS = {"rows": np.eye(10, 8, dtype=np.float32), "mask": np.array(-1e4, np.float32)}
node = helper.make_node


def planted(*nodes: onnx.NodeProto, opset: int = 17, functions: Nodes = (), **constants: Any) -> onnx.ModelProto:
    """A graph as it should be, from text_ids (B, 6) to out (B, 6, 8), in which `nodes` lead from x to y, of the same shape."""
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in {**NUMBERS, **constants}.items()]
    graph = helper.make_graph(
        [
            node("Gather", ["rows", "text_ids"], ["x"], "words"),
            *(nodes or (node("Identity", ["x"], ["y"]),)),
            node("Add", ["y", "mask"], ["out"], "last"),
        ],
        "planted",
        [helper.make_tensor_value_info("text_ids", TensorProto.INT64, ["B", 6])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["B", 6, 8])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], functions=list(functions), ir_version=8)


def lint(model: onnx.ModelProto | Path, spec: GraphSpec = SPEC, cann: int = 8, at: Sequence[Sizes] = AT) -> dict[str, str]:
    """What each rule says first."""
    found = lint_model(model, spec, cann, at)
    assert all(finding.graph == spec.name for finding in found)
    return {finding.rule: finding.said for finding in reversed(found)}


def told(found: dict[str, str], *rules: str) -> str:
    """What the first of `rules` says; these, and no others, have to have been broken."""
    assert found.keys() == set(rules), found
    return found[rules[0]]


# Our own graphs.


@pytest.mark.parametrize("cann", [6, 7, 8])
def test_blip_passes_at_opset_13(atc_graphs: Path, cann: int) -> None:
    assert lint_folder(atc_graphs, cann, [1]) == []


@pytest.mark.parametrize("kind", GENERATORS)
def test_models_that_write_words_pass_at_opset_13(generator_graphs: Graphs, kind: str) -> None:
    for cann in (6, 7, 8):
        assert lint_folder(generator_graphs(kind, "atc"), cann, [1]) == []


@pytest.mark.parametrize("target", ["atc", "ascend"])
@pytest.mark.parametrize(("model", "only"), [(TINY2, ()), (TINY_CLIP, ("--graphs", "image_feat"))], ids=["eva", "clip"])
def test_blip2_passes(tmp_path: Path, model: Blip2Config, only: tuple[str, ...], target: str) -> None:
    folder = chain.export_graphs(tmp_path, "--target", target, *only, model=random_blip2(model))
    assert manifest.read(folder, "graphs").content["opset"] == (17 if target == "ascend" else 13)
    for cann in (7, 8) if target == "ascend" else (6, 7, 8):
        assert lint_folder(folder, cann, BATCHES) == []


def test_blip_passes_at_opset_17_but_for_cann_6(tmp_path: Path) -> None:
    folder = chain.export_graphs(tmp_path, "--target", "ascend")
    for cann in (7, 8):
        assert lint_folder(folder, cann, BATCHES) == []
    found = lint_folder(folder, 6, BATCHES)
    assert {finding.rule for finding in found} == {"opset"}
    assert [finding.graph for finding in found] == list(manifest.read(folder, "graphs").content["graphs"])


def test_fixed_axes_pass_at_opset_17(tmp_path: Path) -> None:
    folder = chain.export_graphs(tmp_path, "--target", "atc", "--batchsize", 3, "--opset", 17, "--graphs", "itm,text_embed")
    for cann in (7, 8):
        assert lint_folder(folder, cann, [1]) == []


@pytest.mark.parametrize("kind", GENERATORS)
def test_models_that_write_words_pass_at_opset_17(tmp_path: Path, kind: str) -> None:
    """Of the graphs that look at pictures those of one kind: they are the same in all."""
    own = "t5_encoder,t5_decoder" if kind == "t5" else "llm_prefill,llm_decode"
    only = () if kind in ("caption", "vqa", "opt") else ("--graphs", own)
    options = ("--beams", 3, "--length", 8, *only)
    folder = generators.export_generator(tmp_path, kind, "ascend", *options, model=talkative(kind))
    for cann in (7, 8):
        assert lint_folder(folder, cann, BATCHES) == []


def test_open_axes_that_are_set(ort_graphs: Path) -> None:
    """Graphs for ONNX Runtime compute shapes as they run: with the batch and the length set, all of them are numbers."""
    content = manifest.read(ort_graphs, "graphs").content["graphs"]
    for name in content:
        spec = GraphSpec(name, *(tuple(TensorSpec(**t) for t in content[name][edge]) for edge in ("inputs", "outputs")))
        assert lint_model(ort_graphs / f"{name}.onnx", spec, 8, [Sizes(1, 35), Sizes(4, 9)]) == []
    found = lint_folder(ort_graphs, 8, [1])
    assert {(finding.graph, finding.rule) for finding in found} == {(name, "static") for name in content}
    assert found[0].said.endswith("an axis is still open. Export it with --target ascend.")


def test_a_violation_in_a_folder(atc_graphs: Path, tmp_path: Path) -> None:
    folder = chain.with_only(atc_graphs, tmp_path / "graphs", "itm", "text_embed")
    model = onnx.load(folder / "itm.onnx")
    (mask,) = (tensor for tensor in model.graph.initializer if numpy_helper.to_array(tensor).tolist() == -1e4)
    mask.CopyFrom(numpy_helper.from_array(np.array(-1e9, np.float32), mask.name))
    content = manifest.read(folder, "graphs").content
    onnx.save(model, folder / "itm.onnx")
    (folder / manifest.NAME).unlink()
    manifest.write(folder, "graphs", content)
    (found,) = lint_folder(folder, 8, [1])
    assert (found.graph, found.rule) == ("itm", "fp16")
    assert "holds 1e+09" in found.said


def test_what_is_asked_wrongly(atc_graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(Misuse, match="asked was 5"):
        lint_folder(atc_graphs, 5, [1])
    with pytest.raises(Misuse, match="batch sizes"):
        lint_folder(atc_graphs, 8, [])
    with pytest.raises(UserError, match="no folder"):
        lint_folder(tmp_path / "none", 8, [1])
    with pytest.raises(Misuse, match="has no graph 'other'; it has: "):
        lint_folder(atc_graphs, 8, [1], only=["itm", "other"])
    other = chain.with_only(atc_graphs, tmp_path / "graphs", "itm")
    text = (other / manifest.NAME).read_text("utf-8")
    for wrong in ('"fail": "itm.onnx"', '"file": 3, "inputs": 5'):
        (other / manifest.NAME).write_text(text.replace('"file": "itm.onnx"', wrong), "utf-8")
        with pytest.raises(UserError, match=r"Write the graphs again with blip-export"):
            lint_folder(other, 8, [1])
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(UserError, match="no ONNX file"):
        lint_model(tmp_path / "broken.onnx", SPEC, 8)


def test_it_needs_neither_torch_nor_the_simplifier() -> None:
    blocked = "import sys; sys.modules['torch'] = sys.modules['onnxslim'] = None; import export.lint"
    subprocess.run([sys.executable, "-c", blocked], cwd=Path(__file__).parent.parent, check=True)


# What is planted.


def test_a_graph_as_it_should_be() -> None:
    for cann, opset in ((6, 13), (7, 17), (8, 17), (8, 18)):
        assert lint(planted(opset=opset), cann=cann) == {}


def test_every_rule_is_planted() -> None:
    source = "".join((Path(__file__).parent / name).read_text("utf-8") for name in ("test_lint.py", "test_lint_numbers.py"))
    assert [rule for rule in RULES if f'"{rule}"' not in source] == []


def test_gelu_at_opset_20() -> None:
    found = lint(planted(node("Gelu", ["x"], ["y"], "gelu"), opset=20))
    assert "no parser for Gelu: Gelu 'gelu'" in told(found, "operator", "opset")


def test_reduce_l2_ends_at_17() -> None:
    at_17 = [node("ReduceL2", ["x"], ["norm"], "norm", axes=[-1]), node("Div", ["x", "norm"], ["y"])]
    at_18 = [node("ReduceL2", ["x", "axes"], ["norm"], "norm"), node("Div", ["x", "norm"], ["y"])]
    assert lint(planted(*at_17, opset=17)) == {}
    said = told(lint(planted(*at_18, opset=18, axes=np.array([-1]))), "operator")
    assert "ReduceL2 at opset 8-17, the graph has 18: ReduceL2 'norm'" in said


def test_opset_19() -> None:
    assert "opset 19, CANN 8 reads 11 to 18" in told(lint(planted(opset=19)), "opset")
    assert told(lint(planted(opset=10)), "opset")
    assert lint(planted(opset=10), cann=7) == {}
    assert told(lint(planted(opset=14), cann=6), "opset")


def test_loop_is_no_if() -> None:
    body = helper.make_graph(
        [node("Identity", ["on"], ["still"]), node("Neg", ["before"], ["after"])],
        "body",
        [
            helper.make_tensor_value_info("n", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, [None, 6, 8]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, [None, 6, 8]),
        ],
    )
    loop = planted(node("Loop", ["times", "", "x"], ["y"], "loop", body=body), times=np.array(3))
    assert "Loop 'loop'" in lint(loop)["control-flow"]
    branches = {
        name: helper.make_graph([node(name, ["x"], [name])], name, [], [helper.make_tensor_value_info(name, 1, None)])
        for name in ("Neg", "Abs")
    }
    chosen = node("If", ["yes"], ["y"], then_branch=branches["Neg"], else_branch=branches["Abs"])
    assert lint(planted(chosen, yes=np.array(True))) == {}
    branches["Abs"].node[0].op_type = "Gelu"
    chosen = node("If", ["yes"], ["y"], then_branch=branches["Neg"], else_branch=branches["Abs"])
    assert "Gelu" in lint(planted(chosen, yes=np.array(True)))["operator"]


def test_a_local_function() -> None:
    twice = helper.make_function("ours", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)])
    model = planted(node("Twice", ["x"], ["y"], domain="ours"), functions=[twice])
    model.opset_import.append(helper.make_opsetid("ours", 1))
    assert "Twice" in told(lint(model), "function", "domain")


def test_two_domains() -> None:
    model = planted()
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert "'com.microsoft'" in told(lint(model), "domain")
    fused = planted(node("FastGelu", ["x"], ["y"], "fused", domain="com.microsoft"))
    assert "FastGelu 'fused'" in lint(fused)["domain"]
    renamed = planted()
    renamed.opset_import[0].domain = "ai.onnx"
    assert lint(renamed) == {}


def test_a_dynamic_axis_that_is_left() -> None:
    some = [node("NonZero", ["text_ids"], ["where"], "which"), node("Gather", ["x", "zero"], ["y"], axis=1)]
    said = told(lint(planted(*some, zero=np.arange(6))), "static")
    assert "'where' of NonZero 'which' stays dynamic, [2, '?']" in said
    assert "text_ids [1, 6]" in said
    missing = told(lint(planted(), at=[]), "static")
    assert "text_ids is ['B', 6]: an axis is still open" in missing


def test_a_batch_that_is_written_into_the_graph() -> None:
    """It runs at batch 4 alone."""
    baked = planted(node("Reshape", ["x", "to"], ["y"], "baked"), to=np.array([4, 6, 8]))
    assert lint(baked, at=[Sizes(4, 6)]) == {}
    assert "text_ids [1, 6]" in told(lint(baked), "static")
    folded = planted(node("Reshape", ["x", "to"], ["y"], "baked"), to=np.array([1, -1, 8]))
    assert "the output out becomes [1, 24, 8]" in told(lint(folded), "static")


def test_shapes_that_are_computed() -> None:
    """Down to an operator that onnx's inference does not look through."""
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("ReduceProd", ["shape"], ["all"], keepdims=1),
        node("Reshape", ["x", "all"], ["flat"]),
        node("Reshape", ["flat", "shape"], ["y"]),
    ]
    assert lint(planted(*nodes)) == {}


def test_a_layer_norm_of_one_node() -> None:
    one = node("LayerNormalization", ["x", "gamma"], ["y"], epsilon=1e-12)
    assert lint(planted(one, gamma=np.ones(8, np.float32))) == {}
    assert told(lint(planted(one, gamma=np.ones(8, np.float32), opset=16)), "operator", "static")


def test_scatter_that_adds() -> None:
    inputs = ["x", "at", "new"]
    constants = {"at": np.array([[0, 0]]), "new": np.zeros((1, 8), np.float32)}
    said = told(lint(planted(node("ScatterND", inputs, ["y"], "adds", reduction="add"), **constants)), "scatter")
    assert "ScatterND 'adds' has reduction=add" in said
    assert lint(planted(node("ScatterND", inputs, ["y"], reduction="none"), **constants)) == {}
    assert lint(planted(node("ScatterND", inputs, ["y"]), **constants)) == {}


def test_tensors_of_no_numbers() -> None:
    strings = [node("Cast", ["x"], ["s"], "to_string", to=TensorProto.STRING), node("Cast", ["s"], ["y"], to=TensorProto.FLOAT)]
    assert "s of Cast 'to_string' is strings" in told(lint(planted(*strings)), "tensors")
    listed = [node("SequenceConstruct", ["x"], ["all"], "list"), node("SequenceAt", ["all", "first"], ["y"])]
    assert "all of SequenceConstruct 'list' is a sequence" in lint(planted(*listed, first=np.array(0)))["tensors"]


def test_int64_that_is_computed_with() -> None:
    multiplied = [
        node("MatMul", ["text_ids", "square"], ["ids"], "product"),
        node("Gather", ["rows", "ids"], ["y"]),
    ]
    said = told(lint(planted(*multiplied, square=np.eye(6, dtype=np.int64))), "int64")
    assert "MatMul 'product' computes 24 numbers [4, 6] in int64" in said
    shifted = [node("Add", ["text_ids", "one"], ["ids"], "shifted"), node("Gather", ["rows", "ids"], ["y"])]
    model = planted(*shifted, one=np.array(1))
    assert lint(model) == {}
    assert "72,000 numbers [12000, 6]" in told(lint(model, at=[Sizes(1, 6), Sizes(12000, 6)]), "int64")


def test_another_interface() -> None:
    ids, out = SPEC.inputs[0], SPEC.outputs[0]
    as_int32 = dataclasses.replace(SPEC, inputs=(dataclasses.replace(ids, dtype="int32"),))
    assert "text_ids int64 ['B', 6], expected text_ids int32" in told(lint(planted(), as_int32), "interface")
    renamed = dataclasses.replace(SPEC, outputs=(dataclasses.replace(out, name="embed"),))
    assert told(lint(planted(), renamed), "interface")


def test_a_batch_that_is_not_first() -> None:
    def of(*shapes: tuple[Any, ...]) -> dict[str, str]:
        inputs = tuple(TensorSpec(f"in{n}", "float32", shape) for n, shape in enumerate(shapes[:-1]))
        found = lint_model(planted(), GraphSpec("g", inputs, (TensorSpec("out", "float32", shapes[-1]),)), 8)
        return {finding.rule: finding.said for finding in found if finding.rule == "batch-axis"}

    assert "in1 is [6, 'B']: the batch has to be its first axis" in of(("B", 6), (6, "B"), ("B", 6))["batch-axis"]
    assert "its first axis is not the batch 'B'" in of(("B", 6), (6, 5), ("B", 6))["batch-axis"]
    assert "out is [7, 3]" in of((3, 6), (7, 3))["batch-axis"]
    assert "out is []" in of((3, 6), ())["batch-axis"]
    assert "out is [1, 3]" in of((3, 6), (1, 3))["batch-axis"]
    for right in (
        (("B", 6), ("B", 2)),
        ((3, 6), (9, 2)),
        ((1, 4, 5), ("B", 6), ("B", 2)),
        ((1, 6), (1, 3)),
        (("B*3", 6), ("B", 3)),
    ):
        assert of(*right) == {}


def stored_beside(folder: Path, name: str = "text_embed") -> Path:
    """The graph with its table of words in a file of its own."""
    path = folder / f"{name}.onnx"
    onnx.save(planted(), path, save_as_external_data=True, location=f"{name}.onnx.data", size_threshold=64)
    return path


def test_weights_beside_a_graph(tmp_path: Path) -> None:
    path = stored_beside(tmp_path)
    data = tmp_path / "text_embed.onnx.data"
    assert lint(path) == {}
    values = np.fromfile(data, np.float32)
    values[-1] = 7e4
    values.tofile(data)
    assert "'rows' of Gather 'words' holds 70000" in told(lint(path), "fp16")
    data.write_bytes(data.read_bytes()[:-1])
    assert "end at byte 320" in told(lint(path), "external-data")
    data.unlink()
    assert f"{data}, which is missing" in told(lint(path), "external-data")
    model = onnx.load(path, load_external_data=False)
    (location,) = (e for t in model.graph.initializer for e in t.external_data if e.key == "location")
    location.value = "../text_embed.onnx.data"
    onnx.save(model, path)
    assert "expected the name of a file beside" in told(lint(path), "external-data")


def test_names_of_files(tmp_path: Path) -> None:
    (tmp_path / "my graphs").mkdir()
    dotted = stored_beside(tmp_path, "text.embed")
    assert "'text.embed' is the stem of a file" in told(lint(dotted), "file-name")
    assert lint(stored_beside(tmp_path / "my graphs")) == {}  # ais_bench sees the .om alone
    assert told(lint(planted(), dataclasses.replace(SPEC, name="itm.1")), "file-name")


# The list of operators.


def test_the_list_of_operators() -> None:
    head = [line for line in FILE.read_text("utf-8").splitlines() if line.startswith("#")]
    assert any("Origin: " in line for line in head)
    assert any("Date: 20" in line for line in head)
    table = read_table()
    assert len(table.opsets) == 261
    assert [table.said(name) for name in ("ReduceL2", "LayerNormalization", "Upsample", "Gelu")] == [
        "8-17",
        "17-18",
        "8-9, 11-16",
        "",
    ]
    assert [table.has("GreaterOrEqual", opset) for opset in (8, 9, 12, 18, 19)] == [True, False, True, True, False]
    assert [table.has("Trilu", opset) for opset in (13, 14)] == [False, True]
    for absent in ("GroupNormalization", "Loop", "Scan", "QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"):
        assert not table.said(absent)


def test_another_list(tmp_path: Path) -> None:
    (tmp_path / "ops.txt").write_text("# mine\n11-13,17 Gather Add  # of both\n8 Gather\n", "utf-8")
    table = read_table(tmp_path / "ops.txt")
    assert (table.said("Gather"), table.said("Add")) == ("8, 11-13, 17", "11-13, 17")
    (found,) = lint_model(planted(), SPEC, 8, AT, table)
    assert found == Finding(
        "text_embed", "operator", "ATC has no parser for Identity: Identity 'y'. Export it as simpler operators."
    )


@pytest.mark.parametrize("text", ["Add Mul\n", "8-18\n", "8- Add\n", "8..18 Add\n", "# nothing\n", ""])
def test_a_list_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "ops.txt").write_text(text, "utf-8")
    with pytest.raises(UserError, match=r"ops\.txt"):
        read_table(tmp_path / "ops.txt")
