"""Pictures in classes, tiny graphs of both models, `blip-run classify` over them, and the same by two judges.

Theirs: pictures and prompts one at a time, prompts as tokens by hand, the softmax written out. The judges embed: transformers,
set up with our weights by bench/theirs.py of the product, as its benchmark runs it; and for BLIP-2 `Plain` of
tests/independent_blip2.py, which shares with the product the names of the weights and no line, in float64.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from click.testing import Result
from PIL import Image

import preprocess.__main__
import runtime.__main__
from bench.theirs import their_model
from models import manifest
from models.blip2 import Retrieval
from preprocess.dataset import ClassifyData
from preprocess.dataset import read_classify as read_data
from runtime.classify import FIRST, MAX
from runtime.labels import TEMPERATURE
from runtime.outputs import ClassifyOutputs, read_classify
from tests import chain
from tests.independent import read_pictures
from tests.independent_blip2 import Plain, image_embed, text_embed
from tests.tiny import random_blip2, random_model

CLASSES = ("long1er1", "word1 word2", "word3", "word4, word5 word6 word7", "word8.")  # in the order of their folders
EACH = 4  # pictures of a class
MODELS: dict[str, Callable[[], Retrieval]] = {"blip": random_model, "blip2": random_blip2}

# Bar of the product, on scores. Measured over the cases here: at most 1.7e-6 (at temperature 0.02; at 0.07 1.4e-6 from
# transformers, 1.3e-6 from Plain).
TOLERANCE = 1e-4


class Embedding(Protocol):
    """What classification asks of a model: vectors of unit length. Float64 or float32, as the model computes."""

    def image_embed(self, images: torch.Tensor) -> torch.Tensor: ...  # (B, 3, S, S) -> (B, E) or (B, Q, E)
    def text_embed(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor: ...  # (B, L) -> (B, E)


class PlainEmbedding:
    """`Plain` with the weights of `ours`."""

    def __init__(self, ours: Any) -> None:
        self.model = Plain(ours)

    def image_embed(self, images: torch.Tensor) -> torch.Tensor:
        return image_embed(self.model, self.model.image_feat(images))

    def text_embed(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return text_embed(self.model, ids, mask)


def transformers_embedding(ours: Retrieval) -> Embedding:
    """transformers' model with the weights of `ours`."""
    return their_model(ours.cfg, ours.state_dict())


Judge = Callable[[Retrieval], Embedding]
JUDGES: dict[str, Sequence[Judge]] = {
    "blip": [transformers_embedding],
    "blip2": [transformers_embedding, PlainEmbedding],
}


def write_classes(folder: Path, seed: int = 0, each: int = EACH) -> Path:
    """`each` pictures of every class, in a folder of its own; returns the folder of folders."""
    random = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for n in range(each):
            height, width = random.integers(20, 70, 2)
            # Smooth blobs: white noise would be averaged to the same grey in every picture.
            coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((int(width), int(height))).save(folder / name / f"{n}.png")
    return folder


def prepare(folder: Path, graphs: Path, each: int = EACH) -> Path:
    """blip-pre classify of new pictures to folder/data."""
    named = ("--images", write_classes(folder / "images", each=each), "--graphs", graphs, "--out", folder / "data")
    chain.done(chain.call(preprocess.__main__.main, "classify", *named, "--workers", 1))
    return folder / "data"


class Work:
    """Graphs of a model in MODELS, data made for them, and the command."""

    def __init__(self, name: str, graphs: Path, data: Path, root: Path) -> None:
        self.name, self.graphs, self.data, self.out = name, graphs, data, root / "outputs"
        self.part = root / ".outputs.part"

    def call(self, *options: object) -> Result:
        named = ("--graphs", self.graphs, "--data", self.data, "--out", self.out, "--threads", 1)
        return chain.call(runtime.__main__.main, "classify", *named, *options)

    def run(self, *options: object) -> ClassifyOutputs:
        chain.done(self.call(*options))
        return read_classify(self.out, verify=True)

    def expected(self, labels: Sequence[str] = CLASSES, **asked: Any) -> np.ndarray:
        """(judges, N, C)."""
        found, data = MODELS[self.name](), read_data(self.data)
        return np.stack([theirs(found, data, labels, judge=judge, **asked) for judge in JUDGES[self.name]])


@cache
def blip2_graphs(base: Path) -> Path:
    """The graphs of TINY2 (seed 0) that classification and the Python interface need, dynamic, below `base`. Read only."""
    names = "text_embed,image_feat,qformer,image,image_kv,itm_cached,text_feat,multimodal"
    return chain.export_graphs(base / "blip2", "--graphs", names, model=random_blip2())


@cache
def data_for(graphs: Path) -> Path:
    """New pictures prepared for these graphs, beside them. Read only."""
    return prepare(graphs.parent / "classes", graphs)


def token_ids(text: str) -> torch.Tensor:
    """(1, L): the vocabulary of tests/chain.py, by hand."""
    found = ["[CLS]"]
    for word in re.findall(r"\w+|[^\w\s]", text.lower()):
        head, tail = word.split("er") if word.startswith("long") else (word, "")
        found += [part if part in chain.TOKENS else "[UNK]" for part in (head, f"##er{tail}" if tail else head)][
            : 2 if tail else 1
        ]
    return torch.tensor([[chain.TOKENS.index(token) for token in [*found, "[SEP]"]]])


@torch.no_grad()
def theirs(
    model: Retrieval,
    data: ClassifyData,
    labels: Sequence[str],
    templates: Sequence[str] = ("a picture of {}",),
    temperature: float = TEMPERATURE,
    query: str = FIRST,
    judge: Judge = transformers_embedding,
) -> np.ndarray:
    """(N, C): what mindformers' Blip2Classifier says with `query` FIRST, and what compute_sim_matrix compares with MAX."""
    rival = judge(model)
    rows = []
    for label in labels:
        ids = [token_ids(template.format(label)) for template in templates]
        mean = torch.cat([rival.text_embed(each, torch.ones_like(each)) for each in ids]).mean(0)  # (E,)
        rows.append(mean / mean.norm())
    text = torch.stack(rows)  # (C, E)
    found = []
    for image in data.images:
        path = Path(data.source.content["source"]["folder"]) / image["image"]
        embed = rival.image_embed(read_pictures([path], model.cfg.vision.image_size))[0]  # (E,) or (Q, E)
        sims = torch.atleast_2d(embed) @ text.T  # (Q, C), Q is 1 for BLIP
        sim = sims.max(0).values if query == MAX else sims[0]
        found.append(torch.softmax(sim / temperature, 0).numpy())
    return np.stack(found)


def assert_equal(found: ClassifyOutputs, wanted: np.ndarray) -> None:
    """Scores within the bar, labels in the same order: those of one judge (N, C), or of several (judges, N, C)."""
    for each in wanted.reshape(-1, *found.probability.shape):
        assert float(np.abs(found.probability[:] - each).max()) <= TOLERANCE
        np.testing.assert_array_equal(np.argsort(-found.probability[:], axis=1), np.argsort(-each, axis=1))


def with_temperature(graphs: Path, out: Path, value: object) -> Path:
    """A copy of a graphs/ folder whose manifest holds the temperature `value`."""
    shutil.copytree(graphs, out)
    content = {**manifest.read(out, "graphs").content, "temperature": value}
    (out / manifest.NAME).unlink()
    manifest.write(out, "graphs", content)
    return out
