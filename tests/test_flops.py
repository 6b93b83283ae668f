"""The operations of a graph, counted from its shapes, against a hand count from the sizes of the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bench.flops import count_flops
from export.graphs import module_for
from export.random_inputs import random_inputs
from export.to_onnx import write_onnx
from models.config import Blip2Config, BlipConfig, Config, TextConfig, VisionConfig
from models.errors import UserError
from models.presets import preset
from models.spec import GraphSpec, TensorSpec, graph_specs
from runtime.graphs import read_graphs
from tests import chain
from tests.tiny import TINY, random_model

BASE = preset("blip-retrieval-base-coco")
VIT_G = preset("blip2-stage1-vit-g")


def linear(rows: int, width: int, out: int) -> int:
    return 2 * rows * width * out


def vit(c: VisionConfig) -> int:
    """One picture to image_feat: patches, then per block qkv, scores and weighted sum, projection, MLP."""
    t, d = c.tokens, c.width
    block = linear(t, d, 3 * d) + 2 * linear(t, d, t) + linear(t, d, d) + 2 * linear(t, d, c.mlp)
    return linear(t - 1, 3 * c.patch**2, d) + c.depth * block


def keys_values(c: Config, layers: int) -> int:
    """One picture's keys and values for every layer that looks at it."""
    return layers * 2 * linear(c.vision.tokens, c.vision.width, c.text.width)


def layer(c: TextConfig, rows: int, tokens: int, looking: int, image_tokens: int) -> int:
    """`rows` that are computed look up all `tokens`, whose keys and values are computed; `looking` of them a picture."""
    d = c.width
    own = linear(rows, d, d) + 2 * linear(tokens, d, d) + 2 * linear(rows, d, tokens) + linear(rows, d, d)
    picture = 2 * linear(looking, d, d) + 2 * linear(looking, d, image_tokens)
    return own + picture + 2 * linear(rows, d, c.ffn)


def text(c: TextConfig, length: int, image_tokens: int) -> int:
    """One caption through BERT; with a picture every token looks at it. The last layer computes the first position only."""
    looking = min(image_tokens, 1)
    whole = layer(c, length, length, looking * length, image_tokens)
    return (c.depth - 1) * whole + layer(c, 1, length, looking, image_tokens)


def queries(c: Blip2Config, length: int) -> int:
    """One picture, and a caption if it has a length, through the Q-Former: the queries alone look at the picture, and alone
    are computed in the last layer."""
    q, count, last = c.qformer, c.qformer.queries, c.qformer.depth - 1
    return sum(
        layer(q, count + (length if n != last else 0), count + length, count if n in q.cross_layers else 0, c.vision.tokens)
        for n in range(q.depth)
    )


def by_hand(name: str, c: Config, batch: int, length: int) -> int:
    """Graph `name` of design's table on a batch."""
    return batch * (blip2_graphs if isinstance(c, Blip2Config) else blip_graphs)(c, length)[name]


def blip_graphs(c: BlipConfig, length: int) -> dict[str, int]:
    """Every graph on one sample."""
    image, caption, kv = vit(c.vision), text(c.text, length, 0), keys_values(c, c.text.depth)
    pair = text(c.text, length, c.vision.tokens) + linear(1, c.text.width, 2)
    image_proj, text_proj = linear(1, c.vision.width, c.embed), linear(1, c.text.width, c.embed)
    return {
        "text_embed": caption + text_proj,
        "image_embed": image + image_proj,
        "image_feat": image,
        "image": image + image_proj,
        "image_kv": kv,
        "itm": pair + kv,
        "itm_cached": pair,
    }


def blip2_graphs(c: Blip2Config, length: int) -> dict[str, int]:
    """Every graph on one sample."""
    q, kv, both = c.qformer, keys_values(c, len(c.qformer.cross_layers)), queries(c, length)
    looked = kv + queries(c, 0) + linear(q.queries, q.width, c.embed)
    pair = both + linear(q.queries, q.width, 2)
    return {
        "text_embed": text(q, length, 0) + linear(1, q.width, c.embed),
        "image_feat": vit(c.vision),
        "qformer": looked,
        "image": vit(c.vision) + looked,  # the image encoder once, for all three outputs
        "image_kv": kv,
        "itm": pair + kv,
        "itm_cached": pair,
        "text_feat": q.depth * layer(q, length, length, 0, 0) + linear(length, q.width, c.embed),
        "multimodal": both + kv,
    }


@pytest.mark.parametrize(("batch", "length"), [(1, 2), (3, 11), (5, 35)])
@pytest.mark.parametrize("name", list(graph_specs(TINY)))
def test_every_graph(ort_graphs: Path, name: str, batch: int, length: int) -> None:
    graphs = read_graphs(ort_graphs)
    found = count_flops(graphs.path(name), graphs.symbolic[name].bind(batch, length))
    assert sum(found.values()) == by_hand(name, TINY, batch, length)


@pytest.mark.parametrize("name", list(graph_specs(TINY)))
def test_every_static_graph(atc_graphs: Path, name: str) -> None:
    graphs = read_graphs(atc_graphs)
    found = count_flops(graphs.path(name), graphs.written[name])
    assert sum(found.values()) == by_hand(name, TINY, chain.STATIC, TINY.protocol.max_length)


def test_by_operator(ort_graphs: Path) -> None:
    graphs = read_graphs(ort_graphs)
    found = count_flops(graphs.path("image"), graphs.symbolic["image"].bind(2, 1))
    vision = TINY.vision
    assert found["Conv"] == 2 * linear(vision.tokens - 1, 3 * vision.patch**2, vision.width)
    assert sum(n for op, n in found.items() if op != "Conv") == by_hand("image", TINY, 2, 1) - found["Conv"]


def test_base_sizes_by_hand() -> None:
    """1e9 operations: 111.0 for a picture, 16.3 for its keys and values, and of the 7.73 that twelve whole layers take for a
    caption of 35 tokens 7.18, because the last layer computes one position."""
    one, two = (text(dataclasses.replace(BASE.text, depth=depth), 35, BASE.vision.tokens) for depth in (1, 2))
    assert 12 * (two - one) / 1e9 == pytest.approx(7.73, abs=0.005)
    for name, wanted in {"image": 110.97, "image_kv": 16.34, "itm": 23.52, "itm_cached": 7.18, "text_embed": 5.59}.items():
        assert by_hand(name, BASE, 1, 35) / 1e9 == pytest.approx(wanted, abs=0.005)


def test_blip2_sizes_by_hand() -> None:
    """1e9 operations: ViT-g takes nearly all of a picture. A pair of 32 tokens takes 17.9, of which 6.7 are the keys and
    values that do not depend on the caption; one of 12 tokens with them at hand takes 8.0."""
    for name, length, wanted in (
        ("image_feat", 32, 520.72),
        ("image", 32, 533.48),
        ("image_kv", 32, 6.67),
        ("itm", 32, 17.91),
        ("itm_cached", 32, 11.24),
        ("itm_cached", 12, 8.01),
    ):
        assert by_hand(name, VIT_G, 1, length) / 1e9 == pytest.approx(wanted, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text_embed", "image", "image_kv", "itm", "itm_cached"])
def test_base_graphs(tmp_path: Path, name: str) -> None:
    # The count does not depend on the vocabulary, and a small one saves memory.
    config = dataclasses.replace(BASE, text=dataclasses.replace(BASE.text, vocab=60))
    model, spec, path = random_model(config, std=0.02), graph_specs(config)[name], tmp_path / "graph.onnx"
    write_onnx(module_for(name, model), spec, random_inputs(name, model, 2, 8, seed=0), path, "ort", 18)
    for batch, length in ((1, 35), (16, 12)):
        assert sum(count_flops(path, spec.bind(batch, length)).values()) == by_hand(name, config, batch, length)


def one_node(path: Path, node: onnx.NodeProto, inputs: dict[str, tuple[int, ...]], weight: np.ndarray | None = None) -> GraphSpec:
    """A graph of one operator, whose output has a shape that only inference knows."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(shape)) for name, shape in inputs.items()]
    output = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", values, [output], [] if weight is None else [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return GraphSpec("g", tuple(TensorSpec(name, "float32", shape) for name, shape in inputs.items()), ())


@pytest.mark.parametrize(
    ("node", "inputs", "weight", "wanted"),
    [
        (helper.make_node("MatMul", ["x", "w"], ["y"]), {"x": (5, 2, 3)}, (3, 7), 2 * 5 * 2 * 3 * 7),
        (helper.make_node("MatMul", ["x", "z"], ["y"]), {"x": (1, 4, 2, 3), "z": (6, 1, 3, 7)}, None, 2 * 6 * 4 * 2 * 3 * 7),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), {"x": (3,)}, (3, 7), 2 * 3 * 7),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), {"x": (2, 3)}, (7, 3), 2 * 2 * 3 * 7),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transA=1), {"x": (3, 2)}, (3, 7), 2 * 2 * 3 * 7),
        (helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2]), {"x": (5, 3, 8, 6)}, (7, 3, 2, 2), 2 * 5 * 7 * 12 * 12),
        (helper.make_node("Conv", ["x", "w"], ["y"], group=2), {"x": (1, 4, 3, 3)}, (6, 2, 3, 3), 2 * 6 * 1 * 18),
    ],
    ids=["MatMul", "broadcast", "vector", "Gemm transB", "Gemm transA", "Conv", "grouped Conv"],
)
def test_one_operator(
    tmp_path: Path, node: onnx.NodeProto, inputs: dict[str, tuple[int, ...]], weight: tuple[int, ...] | None, wanted: int
) -> None:
    spec = one_node(tmp_path / "g.onnx", node, inputs, None if weight is None else np.ones(weight, np.float32))
    assert count_flops(tmp_path / "g.onnx", spec) == {node.op_type: wanted}


def test_elementwise_operators_are_not_counted(tmp_path: Path) -> None:
    spec = one_node(tmp_path / "g.onnx", helper.make_node("Erf", ["x"], ["y"]), {"x": (5,)})
    assert count_flops(tmp_path / "g.onnx", spec) == {}


def test_an_operator_that_is_not_counted_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Einsum", ["x", "z"], ["y"], equation="ij,jk->ik")
    spec = one_node(tmp_path / "g.onnx", node, {"x": (2, 3), "z": (3, 2)})
    with pytest.raises(UserError, match="has the operator Einsum, whose operations are not counted"):
        count_flops(tmp_path / "g.onnx", spec)


def test_a_shape_that_does_not_follow_from_the_inputs_is_refused(tmp_path: Path) -> None:
    """NonZero gives as many rows as the values say."""
    nodes = [
        helper.make_node("NonZero", ["x"], ["at"]),
        helper.make_node("Cast", ["at"], ["rows"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "rows"], ["y"], name="product"),
    ]
    x, y = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None]), helper.make_empty_tensor_value_info("y")
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y])), tmp_path / "g.onnx")
    with pytest.raises(UserError, match=r"the shape of 'y', at the operator MatMul 'product', does not follow .*\(\[2, \?\]\)"):
        count_flops(tmp_path / "g.onnx", GraphSpec("g", (TensorSpec("x", "float32", (2, 2)),), ()))


def test_weights_beside_the_graph_are_not_read(ort_graphs: Path, tmp_path: Path) -> None:
    """Over 2 GB the weights lie in a file of their own; here that file is missing."""
    graphs = read_graphs(ort_graphs)
    model = onnx.load(graphs.path("itm_cached"))
    onnx.save_model(model, tmp_path / "g.onnx", save_as_external_data=True, location="g.data", size_threshold=1024)
    (tmp_path / "g.data").unlink()
    found = count_flops(tmp_path / "g.onnx", graphs.symbolic["itm_cached"].bind(3, 11))
    assert sum(found.values()) == by_hand("itm_cached", TINY, 3, 11)
