"""Zero-shot classification from pictures to report, through the command line, on CIFAR-100 in its two forms."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

import export.__main__
import postprocess.__main__
import preprocess.__main__
import runtime.__main__
from tests import chain, classes
from tests.test_cifar import COUNT, batch, write_cifar100
from tests.tiny import TINY2, random_blip2

NEEDED = ("--graphs", "text_embed,image")


def report(graphs: Path, folder: Path, *source: object) -> dict[str, Any]:
    """The three commands; returns report.json."""
    data, outputs, out = folder / "data", folder / "outputs", folder / "report"
    chain.done(chain.call(preprocess.__main__.main, "classify", *source, "--graphs", graphs, "--out", data, "--workers", 1))
    named = ("--graphs", graphs, "--data", data, "--out", outputs, "--threads", 1)
    chain.done(chain.call(runtime.__main__.main, "classify", *named))
    assert "Top-1" in chain.done(chain.call(postprocess.__main__.main, "--top1", "--outputs", outputs, "--out", out))
    assert "<svg" in (out / "report.html").read_text("utf-8")
    predictions = json.loads((out / "predictions.json").read_text("utf-8"))
    found: dict[str, Any] = json.loads((out / "report.json").read_text("utf-8"))
    # Counted again from the predictions that were written.
    truth = json.loads((data / "manifest.json").read_text("utf-8"))
    labels = [truth["classes"][n] for n in classes.read_data(data).label[:]]
    right = [best[0]["label"] == label for best, label in zip(predictions, labels, strict=True)]
    assert found["metrics"]["top1"] == pytest.approx(100 * sum(right) / len(right))
    return found


def test_a_pickle_in_the_official_form(tmp_path: Path) -> None:
    graphs = chain.export_graphs(tmp_path / "graphs", *NEEDED, model=random_blip2())
    cifar = write_cifar100(tmp_path, batch(), fine=["word1", "word2_word3", "word4"])
    found = report(graphs, tmp_path, "--cifar", cifar)
    assert (found["counts"]["pictures"], found["counts"]["labels"]) == (COUNT, 3)


@pytest.mark.real_data
def test_pictures_of_cifar_100(tmp_path: Path) -> None:
    """300 pictures, their 100 names in BERT's vocabulary. The weights are random: chance is 1 %."""
    root = Path(os.environ["BLIP_REAL_DATA"])
    model = random_blip2(dataclasses.replace(TINY2, qformer=dataclasses.replace(TINY2.qformer, vocab=30523)))
    named = chain.write_model(tmp_path / "model", model)
    named[-1] = root / "tokenizers" / "bert-base-uncased"
    chain.done(chain.call(export.__main__.main, *named, "--out", tmp_path / "graphs", *NEEDED))
    source = ("--annotations", root / "cifar100_300" / "annotations.json", "--images", root / "cifar100_300")
    found = report(tmp_path / "graphs", tmp_path, *source)
    assert (found["counts"]["pictures"], found["counts"]["labels"]) == (300, 100)
    assert found["metrics"]["top1"] < 10
