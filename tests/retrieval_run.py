"""A tiny data/ folder and the outputs/ of a run over it, made of random numbers: what blip-post reads, without a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models import manifest
from models.config import BlipConfig, Protocol, TextConfig, VisionConfig
from models.config_file import to_dict
from preprocess.tensors import PACKED, Writer
from runtime.outputs import I2T, T2I

CONFIG = BlipConfig(
    VisionConfig(image_size=24, patch=8, width=16, depth=1, heads=2, mlp=16),
    TextConfig(vocab=40, width=16, depth=1, heads=2, ffn=16, positions=40),
    embed=8,
    protocol=Protocol(k_test=12),
)
SIZE, LENGTH = 24, 35


@dataclass(frozen=True)
class Run:
    """The two folders and what was put into them."""

    data: Path
    outputs: Path
    image_of_text: np.ndarray  # (M,)
    pixels: np.ndarray  # (N, S, S, 3) uint8


def make_run(
    root: Path,
    own: Sequence[int] = (5,) * 14,
    k_test: int = 12,
    captions: Sequence[str] = (),
    seed: int = 0,
    data: dict[str, Any] | None = None,
    outputs: dict[str, Any] | None = None,
    layout: str = PACKED,
) -> Run:
    """`own` says how many captions each picture has; `captions` replaces the first ones; `data` and `outputs` replace
    parts of the manifests."""
    random = np.random.default_rng(seed)
    image_of_text = np.repeat(np.arange(len(own)), own)
    pixels = random.integers(0, 256, (len(own), SIZE, SIZE, 3), dtype=np.uint8)
    for folder in (root / "data", root / "outputs"):
        folder.mkdir(parents=True)
    texts = [*captions, *(f"caption {n} of picture {image_of_text[n]}" for n in range(len(captions), len(image_of_text)))]
    content = _data(root / "data", pixels, texts, image_of_text, layout) | (data or {})
    made = manifest.write(root / "data", "data", content)
    tensors = _outputs(random, image_of_text, len(own), k_test)
    info = {name: _write(root / "outputs", name, values, layout) for name, values in tensors.items()}
    facts = _facts(made, k_test) | {"tensors": info, "layout": layout}
    manifest.write(root / "outputs", "outputs", facts | (outputs or {}))
    return Run(root / "data", root / "outputs", image_of_text, pixels)


def _outputs(random: np.random.Generator, image_of_text: np.ndarray, pictures: int, k_test: int) -> dict[str, np.ndarray]:
    """The tensors of outputs/: embeddings that know a little, the pairs of both directions, scores that know more."""
    base = random.normal(size=(pictures, CONFIG.embed))
    images = base + 0.3 * random.normal(size=base.shape)
    texts = base[image_of_text] + random.normal(size=(len(image_of_text), CONFIG.embed))
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))
    sim = (images @ texts.T).astype(np.float32)  # (N, M)
    bits = np.zeros(sim.shape, np.uint8)
    np.put_along_axis(bits, np.argsort(-sim, axis=1)[:, :k_test], I2T, axis=1)
    chosen = np.argsort(-sim, axis=0)[:k_test]
    np.put_along_axis(bits, chosen, np.take_along_axis(bits, chosen, 0) | T2I, axis=0)
    image, text = np.nonzero(bits)
    match = 2 * sim[image, text] + (image_of_text[text] == image) + random.normal(size=len(image))
    return {
        "image_embed": images.astype(np.float32),
        "text_embed": texts.astype(np.float32),
        "pair_image": image.astype(np.int32),
        "pair_text": text.astype(np.int32),
        "pair_direction": bits[image, text],
        "pair_sim": sim[image, text],
        "itm_logits": np.stack([-match, match], 1).astype(np.float32),
    }


def _write(folder: Path, name: str, values: np.ndarray, layout: str) -> dict[str, Any]:
    writer = Writer(folder, name, values.dtype.name, values.shape, layout)
    writer.write(0, values)
    writer.close()
    return writer.info()


def _data(folder: Path, pixels: np.ndarray, texts: list[str], image_of_text: np.ndarray, layout: str) -> dict[str, Any]:
    protocol = CONFIG.protocol
    mean, std = np.array(protocol.mean, np.float32), np.array(protocol.std, np.float32)
    img = ((pixels.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)  # (N, 3, S, S)
    ids = np.ones((len(texts), LENGTH), np.int64)
    return {
        "task": "retrieval",
        "layout": layout,
        "tensors": {name: _write(folder, name, values, layout) for name, values in (("img", img), ("ids", ids), ("mask", ids))},
        "protocol": {
            **dataclasses.asdict(protocol),
            "image_size": SIZE,
            "vocab": 40,
            "encode_id": 39,
            "tokenizer_sha256": "0" * 64,
            "pillow": "13.0.0",
        },
        "images": [{"image": f"set/{n:03d}.jpg", "width": 60 + n, "height": 40} for n in range(len(pixels))],
        "captions": texts,
        "image_of_text": image_of_text.tolist(),
        "broken": [],
    }


def _facts(data: manifest.Manifest, k_test: int) -> dict[str, Any]:
    row = {
        "graph": "itm_cached",
        "output": "itm_logits",
        "cases": "(1, 35) (3, 12)",
        "max_abs": 1.5e-6,
        "max_rel": 2e-6,
        "bound": 1e-4,
    }
    return {
        "task": "retrieval",
        "k_test": k_test,
        "graphs": {
            "digest": "1" * 64,
            "folder": "build/graphs",
            "model": "blip-demo",
            "config": to_dict(CONFIG),
            "opset": 18,
            "target": "ort",
            "precision": "float32",
            "checkpoint": {"file": "weights.safetensors", "sha256": "2" * 64},
            "parity": [row],
            "used": ["image", "text_embed", "image_kv", "itm_cached"],
        },
        "data": {"digest": data.digest, "folder": str(data.folder)},
        "backend": {
            "provider": "cpu",
            "onnxruntime": "1.31.1",
            "threads": 2,
            "batchsize": 8,
            "itm_batchsize": 64,
            "feat_dtype": "float32",
        },
        "timings": [
            {"stage": "pictures", "items": 14, "seconds": 0.5, "resumed": 4},
            {"stage": "plan", "items": 14, "seconds": 0.0, "resumed": 0},
        ],
    }
