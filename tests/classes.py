"""Pictures in classes, tiny graphs of both models, `blip-run classify` over them, and the same by transformers.

Theirs: pictures and prompts one at a time, the softmax written out. Nothing is shared but the weights.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

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
from tests.tiny import random_blip2, random_model

CLASSES = ("long1er1", "word1 word2", "word3", "word4, word5 word6 word7", "word8.")  # in the order of their folders
EACH = 4  # pictures of a class
MODELS: dict[str, Callable[[], Retrieval]] = {"blip": random_model, "blip2": random_blip2}

# Bar of the product, on scores. Measured over the cases here: at most 1.7e-6 (at temperature 0.02; 1.4e-6 at 0.07).
TOLERANCE = 1e-4


def write_classes(folder: Path, seed: int = 0) -> Path:
    """EACH pictures of every class, in a folder of its own; returns the folder of folders."""
    random = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for n in range(EACH):
            height, width = random.integers(20, 70, 2)
            # Smooth blobs: white noise would be averaged to the same grey in every picture.
            coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((int(width), int(height))).save(folder / name / f"{n}.png")
    return folder


def prepare(folder: Path, graphs: Path) -> Path:
    """blip-pre classify of new pictures to folder/data."""
    named = ("--images", write_classes(folder / "images"), "--graphs", graphs, "--out", folder / "data")
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
        return theirs(MODELS[self.name](), read_data(self.data), labels, **asked)


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
) -> np.ndarray:
    """(N, C): what mindformers' Blip2Classifier says with `query` FIRST, and what compute_sim_matrix compares with MAX."""
    rival = their_model(model.cfg, model.state_dict())
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
    """Scores within the bar, labels in the same order."""
    assert float(np.abs(found.probability[:] - wanted).max()) <= TOLERANCE
    np.testing.assert_array_equal(np.argsort(-found.probability[:], axis=1), np.argsort(-wanted, axis=1))


def with_temperature(graphs: Path, out: Path, value: object) -> Path:
    """A copy of a graphs/ folder whose manifest holds the temperature `value`."""
    shutil.copytree(graphs, out)
    content = {**manifest.read(out, "graphs").content, "temperature": value}
    (out / manifest.NAME).unlink()
    manifest.write(out, "graphs", content)
    return out
