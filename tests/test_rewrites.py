"""The forms that an NPU may run faster: the same numbers as the model as it is, counted operations, and an open batch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.nn import functional as F

import export.__main__
from export import packed, parity
from export.graphs import module_for
from export.rewrites import Forms
from export.sizes import fixed, of_graph
from export.targets import ASCEND, ATC, PACKED, PADDED, REWRITES, ROWS, TANH_GELU
from export.to_onnx import write_onnx
from export.write import blank_inputs
from models.blip2 import Retrieval
from models.fit import Generator
from models.spec import graph_specs
from models.vit import VisionTransformer
from tests import chain
from tests.graph_files import MEASURED
from tests.tiny import GENERATORS, TINY, TINY2, random_blip2, random_generator, random_model

EXACT = (ROWS, PACKED, PADDED)


def written(
    model: Retrieval | Generator, name: str, path: Path, rewrites: Sequence[str], target: str = ATC, opset: int = 17
) -> tuple[list[parity.Parity], onnx.ModelProto]:
    """The graph with two prompts, written so, and its differences from the model as it is."""
    sizes = of_graph(fixed(model.cfg, 2, 3, None), name)
    symbolic, module = graph_specs(model.cfg, static=True)[name], module_for(name, model, static=True)
    example = sizes.bind(symbolic)
    spec = sizes.opened(symbolic) if target == ASCEND else example
    write_onnx(module, spec, blank_inputs(example), path, target, opset, rewrites)
    cases = [sizes, sizes._replace(batch=5 * sizes.batch)] if target == ASCEND else [sizes]
    return parity.measure(model, module, spec, path, cases), onnx.load(path)


def model_of(kind: str) -> Retrieval | Generator:
    if kind in GENERATORS:
        return random_generator(GENERATORS[kind])
    return random_model(TINY) if kind == "blip" else random_blip2(TINY2)


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def shapes_of(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Of the tensors within a graph of fixed axes."""
    found = onnx.shape_inference.infer_shapes(model).graph.value_info
    return {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in found}


@pytest.mark.parametrize("target", [ATC, ASCEND])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("blip", "image"),
        ("blip", "itm"),
        ("blip2", "image"),
        ("blip2", "itm_cached"),
        ("caption", "text_decoder"),
        ("vqa", "question_encoder"),
        ("opt", "llm_decode"),
        ("llama", "llm_prefill"),
        ("t5", "t5_decoder"),
    ],
)
def test_the_same_numbers(tmp_path: Path, kind: str, name: str, target: str) -> None:
    rows, _ = written(model_of(kind), name, tmp_path / "graph.onnx", EXACT, target)
    for row in rows:
        assert row.max_rel <= MEASURED, row


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_every_opset(tmp_path: Path, opset: int) -> None:
    rows, _ = written(random_model(), "image", tmp_path / "graph.onnx", EXACT, opset=opset)
    assert max(row.max_rel for row in rows) <= MEASURED


def test_counted_operations(tmp_path: Path) -> None:
    model, path = random_model(), tmp_path / "graph.onnx"
    layers = TINY.vision.depth
    plain = kinds(written(model, "image", path, ())[1])
    one = kinds(written(model, "image", path, (PACKED,))[1])
    assert one["MatMul"] == plain["MatMul"] - 2 * layers
    assert one["Split"] == layers
    rows = written(model, "image", path, (ROWS,))[1]
    shapes, weights = shapes_of(rows), {tensor.name for tensor in rows.graph.initializer}
    products = [node for node in rows.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    assert products
    assert all(len(shapes[node.input[0]]) == 2 for node in products)
    tanh = kinds(written(model, "image", path, (TANH_GELU,))[1])
    assert (tanh["Tanh"], tanh["Erf"]) == (plain["Erf"], 0)
    assert plain["Tanh"] == 0


def test_tokens_are_filled_up(tmp_path: Path) -> None:
    """17 to 32; 577, as of BLIP base, to 592."""
    assert -577 % 16 == 592 - 577
    graph = written(random_model(), "image_feat", tmp_path / "graph.onnx", (PADDED,))[1]
    shapes = shapes_of(graph)
    scores = [shapes[node.input[0]] for node in graph.graph.node if node.op_type == "Softmax"]
    assert scores == [[2, TINY.vision.heads, 32, 32]] * TINY.vision.depth


def test_what_fills_up_is_not_looked_at() -> None:
    """The control: without their mask the spare tokens change the picture's."""
    vit = random_model().visual_encoder
    assert isinstance(vit, VisionTransformer)
    image = torch.randn(2, 3, TINY.vision.image_size, TINY.vision.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = vit(image)
        vit.spare = 15
        torch.testing.assert_close(vit(image), wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))
        vit.blocks[0].register_forward_pre_hook(lambda block, given: (given[0], None))
        assert float((vit(image) - wanted).abs().max()) > 1e-3 * float(wanted.abs().max())


def test_gelu_by_tanh_is_near(tmp_path: Path) -> None:
    rows, _ = written(random_model(), "image", tmp_path / "graph.onnx", (TANH_GELU,))
    for row in rows:
        assert MEASURED < row.max_rel < parity.bound_of("image", (TANH_GELU,)), row
    x = torch.linspace(-8, 8, 4001)
    with Forms([TANH_GELU]):
        found = F.gelu(x)
    assert 4e-4 < float((found - F.gelu(x)).abs().max()) < 5e-4


def test_a_wrong_split_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in the place of queries: the parity that every export measures is beyond its bound."""
    real = packed._split
    monkeypatch.setattr(packed, "_split", lambda model, source, widths, outputs: real(model, source, widths, outputs[::-1]))
    rows, _ = written(random_model(), "image", tmp_path / "graph.onnx", (PACKED,))
    assert not all(row.ok for row in rows)


def test_the_command(tmp_path: Path) -> None:
    """An open batch, the forms in the manifest, and how many operations they cost or save on screen."""
    named = chain.write_model(tmp_path / "model", random_model())
    options = ("--out", tmp_path / "graphs", "--target", ASCEND, "--graphs", "text_embed,image", "--rewrites", "packed, padded")
    said = chain.done(chain.call(export.__main__.main, *named, *options))
    content = json.loads((tmp_path / "graphs/manifest.json").read_text("utf-8"))
    assert (content["target"], content["opset"], content["rewrites"]) == (ASCEND, 17, [PACKED, PADDED])
    assert content["sizes"] == {"length": 35}
    for name, graph in content["graphs"].items():
        assert f"{name:<16} packed, padded: {graph['nodes']} nodes, {graph['nodes_without_rewrites']} without" in said
        assert all(tensor["shape"][0] == "B" and "L" not in tensor["shape"] for tensor in graph["inputs"] + graph["outputs"])
    session = onnxruntime.InferenceSession(str(tmp_path / "graphs/image.onnx"), providers=["CPUExecutionProvider"])
    size = TINY.vision.image_size
    images = np.random.default_rng(0).standard_normal((7, 3, size, size), np.float32)
    whole, single = session.run(None, {"input_image": images}), session.run(None, {"input_image": images[3:4]})
    np.testing.assert_allclose(whole[1][3:4], single[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rewrites", "packed"), "--rewrites are of graphs for Ascend: give --target ascend"),
        (("--target", "ascend", "--rewrites", "paked"), f"There is no rewrite 'paked'; known rewrites: {', '.join(REWRITES)}."),
        (("--target", "ascend", "--batchsize", 4), "--target ascend leaves the batch open: give --batchsize to blip-atc"),
        (("--target", "ascend", "--beams", 4), "--beams and --slots fix axes of graphs that write words"),
    ],
)
def test_misuse(tmp_path: Path, options: tuple[object, ...], said: str) -> None:
    named = chain.write_model(tmp_path / "model", random_model())
    assert said in chain.refusal(chain.call(export.__main__.main, *named, "--out", tmp_path / "graphs", *options), code=2)
    assert not (tmp_path / "graphs").exists()
