"""Float16 tried on a CPU: rounded where an NPU would, overflow found where it is planted, and mended by what is kept."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from onnx import TensorProto, helper, numpy_helper

import export.__main__
import export.atc
from export import fp16_audit, weights
from export.fp16_audit import audit
from export.half import observe, simulate
from models import manifest
from models.blip import BlipRetrieval
from tests import chain
from tests.tiny import random_blip2, random_model

CLOSE = 1e-2  # of float16 where nothing overflows; measured on these models: 0.7e-3 to 2.3e-3


def graph_of(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], inputs: list[str], output: str) -> Path:
    """A graph over vectors of four numbers."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in [*inputs, output]]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", values[:-1], values[-1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    """x -> x * x -> + 1 -> * 1e-3."""
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"], "square"),
        helper.make_node("Add", ["square", "one"], ["sum"], "sum"),
        helper.make_node("Mul", ["sum", "scale"], ["y"], "scaled"),
    ]
    constants = {"one": np.ones(4, np.float32), "scale": np.full(4, 1e-3, np.float32)}
    return graph_of(tmp_path / "squares.onnx", nodes, constants, ["x"], "y")


def overflowing() -> BlipRetrieval:
    """A model whose widest layer holds numbers beyond float16, which the next one scales down."""
    model = random_model()
    mlp = model.visual_encoder.blocks[0].mlp
    with torch.no_grad():
        mlp.fc1.weight.mul_(1e5)
        mlp.fc1.bias.mul_(1e5)
        mlp.fc2.weight.mul_(1e-5)
    return model


def exported(root: Path, model: object, *options: object, code: int = 0) -> Result:
    named = chain.write_model(root / "model", model)  # type: ignore[arg-type]
    result = chain.call(export.__main__.main, *named, "--out", root / "graphs", "--target", "ascend", *options)
    assert result.exit_code == code, result.output
    return result


def halved(path: Path, feeds: dict[str, np.ndarray], kept: Collection[str] = ()) -> list[np.ndarray]:
    (found,) = simulate(path, [feeds], kept)
    return found


def test_each_result_is_rounded(squares: Path) -> None:
    x = np.array([1.0009, 3.14159, -0.3, 200.0], np.float32)
    (found,) = halved(squares, {"x": x})
    half = x.astype(np.float16)
    square = (half.astype(np.float32) ** 2).astype(np.float16)
    total = (square.astype(np.float32) + np.float32(1)).astype(np.float16)
    wanted = (total.astype(np.float32) * np.float32(np.float16(1e-3))).astype(np.float16)
    np.testing.assert_array_equal(found, wanted.astype(np.float32))
    assert (found != (x * x + 1) * np.float32(1e-3)).all()


def test_what_is_kept_is_not(squares: Path) -> None:
    """All kept: the graph itself. Some: what they read of each other is exact, what others read is rounded."""
    x = np.array([1.0009, 3.14159, -0.3, 300.0], np.float32)  # 300 squared is beyond float16
    np.testing.assert_array_equal(halved(squares, {"x": x}, ("square", "sum", "scaled"))[0], (x * x + 1) * np.float32(1e-3))
    assert np.isinf(halved(squares, {"x": x})[0][3])
    assert np.isinf(halved(squares, {"x": x}, ("square", "sum"))[0][3])  # the product reads 90001 as infinity
    (found,) = halved(squares, {"x": x}, ("square", "sum", "scaled"))
    assert found[3] == pytest.approx(90.001)
    found = halved(squares, {"x": x}, ("square",))[0][:3]
    x = x[:3]
    total = ((x * x).astype(np.float16).astype(np.float32) + np.float32(1)).astype(np.float16).astype(np.float32)
    wanted = (total * np.float32(np.float16(1e-3))).astype(np.float16)
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


def test_what_tensors_hold(squares: Path) -> None:
    feeds = [{"x": np.array([1, 0, 1e-5, 300], np.float32)}, {"x": np.array([255.96, 2, 2, np.nan], np.float32)}]
    seen = {each.tensor: each for each in observe(squares, feeds)}
    assert list(seen) == ["one", "scale", "x", "square", "sum", "y"]
    assert (seen["square"].node, seen["square"].op, seen["one"].op, seen["x"].op) == ("square", "Mul", "Constant", "Input")
    assert seen["square"].largest == np.inf  # what is no number is infinite
    assert seen["square"].smallest == pytest.approx(1e-10)
    assert seen["square"].overflow == 2  # of 300 and of NaN; 255.96 squared, 65515.5, is rounded to 65504
    assert seen["square"].underflow == pytest.approx(1 / 7)  # of the values above 0, 1e-10
    assert (seen["y"].overflow, seen["y"].underflow) == (1, 0.0)
    assert not seen["one"].overflows


def test_planted_overflow(tmp_path: Path) -> None:
    """It is found and NaN comes of it, and what stays in float32 by the list removes it."""
    exported(tmp_path, overflowing(), "--audit-fp16", "--graphs", "image,text_embed")
    path = tmp_path / "graphs/image.onnx"
    record = {each["graph"]: each for each in json.loads((tmp_path / "graphs/fp16/audit.json").read_text("utf-8"))}
    image, text = record["image"], record["text_embed"]
    assert image["overflowing"]
    for row in image["accuracy"]:
        assert row["half"] is None  # infinite
        assert row["kept"] < CLOSE
    assert not text["overflowing"]
    assert all(row["half"] == row["kept"] < CLOSE for row in text["accuracy"])
    names = (tmp_path / "graphs/fp16/image.keep_dtype").read_text("utf-8").splitlines()
    nodes = {node.name: node for node in onnx.load(path).graph.node}
    assert names == image["keep"]
    assert 3 <= len(names) < len(nodes) / 4
    assert {"MatMul", "Add", "Erf"} <= {nodes[name].op_type for name in names}
    assert not (tmp_path / "graphs/fp16/text_embed.keep_dtype").exists()
    assert "fp16/audit.json" in manifest.read(tmp_path / "graphs", "graphs", verify=True).files
    # The control: one operation less on the list, and it is back.
    feeds = [{"input_image": np.random.default_rng(0).standard_normal((1, 3, 32, 32), np.float32)}]
    assert not np.isnan(halved(path, feeds[0], names)[0]).any()
    assert any(not np.isfinite(halved(path, feeds[0], set(names) - {name})[0]).all() for name in names)


def test_squares_of_a_norm_overflow_where_it_is_taken_apart(tmp_path: Path) -> None:
    """The common complaint: opset 13 squares large activations, opset 17 leaves the norm to the NPU."""
    model = random_model()
    with torch.no_grad():
        model.visual_encoder.pos_embed.mul_(3000)
    for opset, found in ((13, True), (17, False)):
        exported(tmp_path / str(opset), model, "--audit-fp16", "--graphs", "image_feat", "--opset", opset)
        (record,) = json.loads((tmp_path / f"{opset}/graphs/fp16/audit.json").read_text("utf-8"))
        assert bool(record["overflowing"]) == found
        assert record["accuracy"][0]["kept"] < 0.1
        assert {each["op"] for each in record["overflowing"]} <= {"Pow", "ReduceMean", "Add"}
        assert record["largest"][0]["largest"] > 1000


def guarded(path: Path, eps: float = 1e-12) -> Path:
    """x / sqrt(mean(x * x) + eps), and its exponential, which has a divisor of its own."""
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"], "square"),
        helper.make_node("ReduceMean", ["square"], ["mean"], "mean"),
        helper.make_node("Add", ["mean", "eps"], ["sum"], "sum"),
        helper.make_node("Sqrt", ["sum"], ["root"], "root"),
        helper.make_node("Div", ["x", "root"], ["norm"], "norm"),
        helper.make_node("Tanh", ["norm"], ["bounded"], "bounded"),
        helper.make_node("Add", ["norm", "bounded"], ["y"], "last"),
    ]
    return graph_of(path, nodes, {"eps": np.full(4, eps, np.float32)}, ["x"], "y")


def test_planted_underflow(tmp_path: Path) -> None:
    """A divisor that becomes 0: what makes and reads it is kept, and nothing else."""
    path, x = guarded(tmp_path / "graph.onnx"), np.array([1e-5, -2e-5, 5e-6, 1e-5], np.float32)
    found = audit("graph", path, [{"x": x}])
    assert not found.overflowing
    assert np.isinf(found.accuracy[0].half)
    assert found.accuracy[0].kept < CLOSE
    assert found.keep == ("square", "mean", "sum", "root", "norm")
    assert len(found.lines()) == 1
    # The control: without any of them but the root and the quotient, whose own results float16 holds, the norm is another.
    exact = halved(path, {"x": x}, (*found.keep, "bounded", "last"))[0]
    for name in ("square", "mean", "sum"):
        with np.errstate(invalid="ignore"):
            assert not (abs(halved(path, {"x": x}, set(found.keep) - {name})[0] - exact) < 0.1).all()
    assert audit("graph", guarded(path, eps=1.0), [{"x": x}]).keep == ()


def test_what_no_list_removes_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, feeds = guarded(tmp_path / "graph.onnx"), [{"x": np.full(4, 1e-5, np.float32)}]
    monkeypatch.setattr(fp16_audit, "exploding", lambda *_: [])
    assert audit("graph", path, feeds).lines()[1:] == [
        "y of graph is infinite or NaN in float16 with these kept. "
        "Convert that graph in float32: blip-atc --precision graph=origin."
    ]
    broken = audit("graph", guarded(path, eps=0.0), [{"x": np.zeros(4, np.float32)}])
    assert broken.lines()[1:] == ["y of graph is infinite or NaN in float32 too: look at the checkpoint, and at the pictures."]


def worthless(path: Path) -> Path:
    """x * x * 1e4 * 1e4 + 1: finite, and 1 in place of 2 where float16 has no x * x. Beside it what vanishes for nobody."""
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"], "square"),
        helper.make_node("Mul", ["square", "large"], ["larger"], "larger"),
        helper.make_node("Mul", ["larger", "large"], ["scaled"], "scaled"),
        helper.make_node("Add", ["scaled", "one"], ["sum"], "sum"),
        helper.make_node("Tanh", ["square"], ["aside"], "aside"),
        helper.make_node("Relu", ["sum"], ["y"], "last"),
    ]
    constants = {"large": np.full(4, 1e4, np.float32), "one": np.ones(4, np.float32)}
    return graph_of(path, nodes, constants, ["x"], "y")


def test_an_output_that_is_finite_and_of_no_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, feeds = worthless(tmp_path / "graph.onnx"), [{"x": np.array([1e-4, -1e-4, 5e-5, 1e-5], np.float32)}]
    found = audit("graph", path, feeds)
    assert not found.overflowing
    assert found.accuracy[0].half > 0.4  # 1 in place of 2
    assert found.accuracy[0].kept < CLOSE
    assert found.keep == ("square", "larger")
    assert len(found.lines()) == 1
    assert audit("graph", path, [{"x": np.full(4, 0.01, np.float32)}]).keep == ()  # the control
    monkeypatch.setattr(fp16_audit, "vanishing", lambda *_: [])
    assert audit("graph", path, feeds).lines()[1:] == [
        "y of graph is 50% of its largest value off in float16 with these kept. "
        "Convert that graph in float32: blip-atc --precision graph=origin."
    ]


@pytest.mark.parametrize(("value", "infinite"), [(65504.0, 0), (65519.9, 0), (65520.0, 1), (-65520.0, 1)])
def test_where_float16_ends(squares: Path, value: float, infinite: int) -> None:
    """By rounding, as numpy rounds."""
    seen = {each.tensor: each for each in observe(squares, [{"x": np.array([value, 0, 0, 0], np.float32)}])}
    with np.errstate(over="ignore"):
        assert np.isinf(np.float32(value).astype(np.float16)) == bool(infinite)
    assert seen["x"].overflow == infinite


def test_weights_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(tmp_path / "one", overflowing(), "--graphs", "image_embed")
    monkeypatch.setattr(weights, "PROTOBUF_LIMIT", 1000)
    exported(tmp_path / "two", overflowing(), "--graphs", "image_embed")
    feeds = [{"input_image": np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)}]
    one, two = (audit("image_embed", tmp_path / name / "graphs/image_embed.onnx", feeds) for name in ("one", "two"))
    assert (tmp_path / "two/graphs/image_embed.onnx.data").exists()
    assert one.keep == two.keep
    assert one.accuracy == two.accuracy
    assert sorted(each.name for each in (tmp_path / "two/graphs").iterdir()) == [
        "image_embed.onnx",
        "image_embed.onnx.data",
        "manifest.json",
        "tokenizer",
    ]


def test_pictures_of_ones_own(tmp_path: Path) -> None:
    chain.write_pictures(tmp_path / "pictures")
    options = ("--audit-fp16", "--calibration", tmp_path / "pictures/images", "--graphs", "image,itm,itm_cached,text_embed")
    said = exported(tmp_path, random_blip2(), *options).output
    assert "graph            output               float16      kept  overflow  kept in float32" in said
    record = json.loads((tmp_path / "graphs/fp16/audit.json").read_text("utf-8"))
    assert [each["graph"] for each in record] == ["text_embed", "image", "itm", "itm_cached"]
    assert all(row["half"] < CLOSE for each in record for row in each["accuracy"])


def test_the_list_is_handed_to_atc(tmp_path: Path) -> None:
    exported(tmp_path, overflowing(), "--audit-fp16", "--graphs", "image,text_embed")
    options = ("--graphs", tmp_path / "graphs", "--keep", tmp_path / "graphs/fp16", "--soc", "Ascend310P3", "--batchsize", 4)
    said = chain.done(chain.call(export.atc.main, *options, "--out", tmp_path / "om", "--dry-run"))
    (image,) = (line for line in said.splitlines() if "image.onnx" in line)
    (text,) = (line for line in said.splitlines() if "text_embed.onnx" in line)
    assert "--keep_dtype=" in image
    assert "--keep_dtype=" not in text


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--target", "ort", "--audit-fp16"), 2, "--audit-fp16 tries float16 on graphs for Ascend: give --target ascend"),
        (("--calibration", "pictures"), 2, "--calibration names pictures for --audit-fp16; give both"),
        (("--audit-fp16", "--calibration", "nowhere"), 1, "There is no folder nowhere; --calibration takes one of pictures."),
        (("--audit-fp16", "--calibration", "."), 1, ". holds no pictures (.jpg, .png, ...); --calibration takes some"),
    ],
)
def test_misuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], code: int, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in chain.refusal(exported(tmp_path, random_model(), *options, code=code), code)
    assert not (tmp_path / "graphs").exists()
