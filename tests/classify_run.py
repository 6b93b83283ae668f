"""A tiny data/ folder of labelled pictures and the outputs/ of a classification run over it, made of random numbers: what
blip-post --top1 reads, without a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models import manifest
from models.config_file import to_dict
from preprocess.tensors import PACKED, Writer
from tests.tiny import TINY2

SIZE = 24
CLASSES = ("a cat", "a dog", "a red fox", "a bird", "a fish", "a horse", "a car")


@dataclass(frozen=True)
class ClassifyRun:
    """The two folders and what was put into them."""

    data: Path
    outputs: Path
    label: np.ndarray  # (N,) int64
    probability: np.ndarray  # (N, L) float32


def make_classify_run(
    root: Path,
    classes: Sequence[str] = CLASSES,
    labels: Sequence[str] | None = None,
    label: Sequence[int] | None = None,
    probability: np.ndarray | None = None,
    seed: int = 0,
    data: dict[str, Any] | None = None,
    outputs: dict[str, Any] | None = None,
    layout: str = PACKED,
) -> ClassifyRun:
    """`labels` are the classes unless they are given; `label` and `probability` are random, the right one being likelier;
    `data` and `outputs` replace parts of the manifests."""
    random = np.random.default_rng(seed)
    labels = list(classes if labels is None else labels)
    kinds = np.asarray(random.integers(0, len(classes), 60) if label is None else label, np.int64)  # (N,)
    if probability is None:
        probability = _probability(random, kinds, classes, labels)
    for folder in (root / "data", root / "outputs"):
        folder.mkdir(parents=True)
    made = manifest.write(root / "data", "data", _data(root / "data", random, classes, kinds, layout) | (data or {}))
    embed = random.normal(size=(len(kinds) + len(labels), TINY2.embed)).astype(np.float32)
    tensors = {"image_embed": embed[: len(kinds)], "label_embed": embed[len(kinds) :], "probability": probability}
    info = {name: write(root / "outputs", name, values) for name, values in tensors.items()}
    content = _facts(made, labels) | {"tensors": info, "layout": PACKED}
    manifest.write(root / "outputs", "outputs", content | (outputs or {}))
    return ClassifyRun(root / "data", root / "outputs", kinds, probability)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis, float32."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def write(folder: Path, name: str, values: np.ndarray, layout: str = PACKED) -> dict[str, Any]:
    writer = Writer(folder, name, values.dtype.name, values.shape, layout)
    writer.write(0, values)
    writer.close()
    return writer.info()


def _probability(random: np.random.Generator, kinds: np.ndarray, classes: Sequence[str], labels: list[str]) -> np.ndarray:
    logits = random.normal(size=(len(kinds), len(labels)))
    for picture, kind in enumerate(kinds):
        if classes[kind] in labels:
            logits[picture, labels.index(classes[kind])] += 1.5
    return softmax(2 * logits)


def _data(folder: Path, random: np.random.Generator, classes: Sequence[str], kinds: np.ndarray, layout: str) -> dict[str, Any]:
    protocol = TINY2.protocol
    mean, std = np.array(protocol.mean, np.float32), np.array(protocol.std, np.float32)
    pixels = random.integers(0, 256, (len(kinds), SIZE, SIZE, 3), dtype=np.uint8)
    img = ((pixels.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)  # (N, 3, S, S)
    return {
        "task": "classify",
        "layout": layout,
        "tensors": {"img": write(folder, "img", img, layout), "label": write(folder, "label", kinds, layout)},
        "protocol": {
            **dataclasses.asdict(protocol),
            "image_size": SIZE,
            "vocab": TINY2.qformer.vocab,
            "encode_id": 2,
            "tokenizer_sha256": "0" * 64,
            "pillow": "13.0.0",
        },
        "images": [{"image": f"set/{n:03d}.jpg", "width": 60 + n % 9, "height": 40} for n in range(len(kinds))],
        "classes": list(classes),
        "broken": [],
    }


def _facts(data: manifest.Manifest, labels: list[str]) -> dict[str, Any]:
    row = {"graph": "image", "output": "image_embed", "cases": "(1,) (3,)", "max_abs": 1.5e-6, "max_rel": 2e-6, "bound": 1e-4}
    return {
        "task": "classify",
        "labels": labels,
        "templates": ["a picture of {}"],
        "query": "first",
        "protocol": "mindformers",
        "temperature": 0.07,
        "temperature_from": "checkpoint",
        "graphs": {
            "digest": "1" * 64,
            "folder": "build/graphs",
            "model": "blip2-demo",
            "config": to_dict(TINY2),
            "opset": 18,
            "target": "ort",
            "precision": "float32",
            "checkpoint": {"file": "weights.safetensors", "sha256": "2" * 64},
            "parity": [row],
            "used": ["image", "text_embed"],
        },
        "data": {"digest": data.digest, "folder": str(data.folder)},
        "backend": {"provider": "cpu", "onnxruntime": "1.31.1", "threads": 2, "batchsize": 8},
        "timings": [
            {"stage": "labels", "items": len(labels), "seconds": 0.0, "resumed": 0},
            {"stage": "pictures", "items": 60, "seconds": 1.5, "resumed": 4},
        ],
    }
