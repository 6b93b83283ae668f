"""A graphs/ folder with an open batch, made by hand: the smallest graphs that blip-atc has something to say about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from models import manifest
from models.spec import GraphSpec, TensorSpec, spec_to_dict

IDS, MASK = TensorSpec("text_ids", "int64", ("B", 5)), TensorSpec("text_atten_mask", "int64", ("B", 5))
IMAGE = TensorSpec("input_image", "float32", ("B", 3, 2, 2))
FEAT = TensorSpec("image_feat", "float32", ("B", 3, 4))
TEXT = GraphSpec("text_embed", (IDS, MASK), (TensorSpec("text_embed", "float32", ("B", 4)),))
PICTURE = GraphSpec("image_feat", (IMAGE,), (FEAT,))
KV = GraphSpec("image_kv", (FEAT,), (TensorSpec("cross_kv", "float32", ("B", 3, 4)),))
# What has an axis of several texts for each prompt.
DECODER = GraphSpec(
    "text_decoder",
    (TensorSpec("text_ids", "int64", ("B", 3, 1)), TensorSpec("past", "float32", ("B*M", 4, 2))),
    (TensorSpec("logits", "float32", ("B", 3, 7)), TensorSpec("present", "float32", ("B*M", 4, 2))),
)
SPECS = (TEXT, PICTURE, KV)


def write_folder(folder: Path, specs: Sequence[GraphSpec] = SPECS, target: str = "ascend", opset: int = 17, **sizes: int) -> Path:
    """A complete graphs/ folder with the graphs in `specs` that can be written, and an empty file for the others; returns it."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "vocab.txt").write_text("[PAD]\n", "utf-8")
    for spec in specs:
        path = folder / f"{spec.name}.onnx"
        if spec in SPECS:
            onnx.save(onnx_of(spec, opset), path)
        else:
            path.write_bytes(b"onnx")
    content = {
        **{"model": "hand-made", "config": {}, "checkpoint": {}, "temperature": 0.07, "precision": "float32", "parity": []},
        "target": target,
        "sizes": {"length": 5, **sizes},
        "opset": opset,
        "graphs": {spec.name: {**spec_to_dict(spec), "file": f"{spec.name}.onnx", "nodes": 3} for spec in specs},
        "tokenizer": {"file": "tokenizer/vocab.txt", "files": ["tokenizer/vocab.txt"], "sha256": "0", "size": 1},
    }
    manifest.write(folder, "graphs", content)
    return folder


def onnx_of(spec: GraphSpec, opset: int) -> onnx.ModelProto:
    """A graph of that form: texts are counted, pictures are flattened and multiplied, features passed on."""
    weights = {"text_embed": (5, 4), "image_feat": (12, 12), "image_kv": (4, 4)}[spec.name]
    nodes = {
        "text_embed": [
            helper.make_node("Mul", ["text_ids", "text_atten_mask"], ["counted"], "/Mul"),
            helper.make_node("Cast", ["counted"], ["float"], "/Cast", to=onnx.TensorProto.FLOAT),
            helper.make_node("MatMul", ["float", "weights"], ["text_embed"], "/MatMul"),
        ],
        "image_feat": [
            helper.make_node("Flatten", ["input_image"], ["flat"], "/Flatten", axis=1),
            helper.make_node("MatMul", ["flat", "weights"], ["product"], "/MatMul"),
            helper.make_node("Reshape", ["product", "shape"], ["image_feat"], "/Reshape"),
        ],
        "image_kv": [helper.make_node("MatMul", ["image_feat", "weights"], ["cross_kv"], "/key/MatMul")],
    }[spec.name]
    numbers = np.random.default_rng(0).normal(size=weights).astype(np.float32)
    held = [numpy_helper.from_array(numbers, "weights"), numpy_helper.from_array(np.array([-1, 3, 4]), "shape")]
    inputs, outputs = ([_value(tensor) for tensor in tensors] for tensors in (spec.inputs, spec.outputs))
    graph = helper.make_graph(nodes, spec.name, inputs, outputs, held[: 2 if spec.name == "image_feat" else 1])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _value(tensor: TensorSpec) -> onnx.ValueInfoProto:
    kind = onnx.TensorProto.INT64 if tensor.dtype == "int64" else onnx.TensorProto.FLOAT
    return helper.make_tensor_value_info(tensor.name, kind, list(tensor.shape))
