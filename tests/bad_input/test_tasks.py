"""What one task has made is given to another; blip-run features; blip-post of classification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from models import manifest
from tests.bad_input.damage import changed, flipped, given, gone, signed, tensor, without_graph
from tests.bad_input.table import Case, Spoil, Work, options, refused

FEATURES, TOP1 = "run features", "post top1"
NAN = np.float32("nan")


def _outputs(change: Callable[[Any], object]) -> Spoil:
    return signed("label-outputs", change)


def _data(change: Callable[[Any], object]) -> Spoil:
    """Data that are damaged, and outputs that say they were made of just these."""

    def spoil(work: Work) -> None:
        signed("label-data", change)(work)
        digest = manifest.read(work["label-data"], "data").digest
        _outputs(lambda m: m["data"].update(digest=digest))(work)

    return spoil


def _probability(change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    return tensor("label-outputs", "probability", change)


def _unfinished(work: Work) -> list[object]:
    """As a run leaves them that was stopped."""
    (work["label-outputs"] / manifest.NAME).unlink()
    work["label-outputs"].rename(work[".later.part"])
    return ["--outputs", work["later"]]


OTHER_TASKS = [
    Case("labels for features", FEATURES, ("task 'classify', expected 'retrieval'",), given("--data", "label-data")),
    Case("features for data", FEATURES, ("is a 'outputs' folder",), given("--data", "features")),
    Case("accuracy of features", TOP1, ("task 'features'", "'classify'"), given("--outputs", "features")),
    Case("accuracy of data", TOP1, ("is a 'data' folder",), given("--outputs", "label-data")),
    Case("accuracy over captions", TOP1, ("task 'retrieval', expected 'classify'",), given("--data", "data")),
    Case("accuracy over outputs", TOP1, ("is a 'outputs' folder",), given("--data", "label-outputs")),
    Case("both reports", TOP1, ("--recall and --top1",), options("--recall"), 2),
    Case("keys of the other report", TOP1, ("--keys", "--top1"), options("--keys", "blip"), 2),
    Case("labels over features", "run classify", ("'features'", "'classify'"), given("--out", "features"), 2),
    Case("features over labels", FEATURES, ("'classify'", "'features'"), given("--out", "label-outputs"), 2),
    Case("captions over labels", "pre", ("'classify'", "'retrieval'"), given("--out", "label-data"), 2),
    Case("labels over captions", "pre classify", ("'retrieval'", "'classify'"), given("--out", "data"), 2),
]
OF_CAPTIONS = [  # there is no older result of theirs here
    Case("labels for captions", "run", ("task 'classify'", "Use blip-pre retrieval"), given("--data", "label-data")),
    Case("recall of labels", "post", ("task 'classify'", "blip-post --top1"), given("--outputs", "label-outputs")),
    Case("recall of features", "post", ("task 'features'", "'retrieval'"), given("--outputs", "features")),
]
DESCRIBED = [
    Case("unknown mode", FEATURES, ("no mode 'video'", "image,text,multimodal"), options("--modes", "video"), 2),
    Case("no mode", FEATURES, ("no mode ''",), options("--modes", ""), 2),
    Case("a comma too many", FEATURES, ("no mode ''",), options("--modes", "image,"), 2),
    Case("option of another task", FEATURES, ("--labels",), options("--labels", "cat"), 2),
    Case("features of BLIP", FEATURES, ("graphs of BLIP", "give graphs of BLIP-2"), given("--graphs", "graphs of BLIP")),
    Case("no graph for texts", FEATURES, ("has no graph 'text_feat'", "blip-export"), without_graph("text_feat")),
    Case("no graph for both", FEATURES, ("has no graph 'multimodal'", "blip-export"), without_graph("multimodal")),
    Case("no graph for pictures", FEATURES, ("has no graph 'image'", "blip-export"), without_graph("image")),
    Case("damaged graph", FEATURES, ("text_feat.onnx has", "manifest says"), changed("graphs/text_feat.onnx", lambda b: b[:-9])),
    Case("one bit of a graph", FEATURES, ("text_feat.onnx", "sha256"), changed("graphs/text_feat.onnx", flipped, "--verify")),
    Case("NaN in a picture", FEATURES, ("NaN",), tensor("data", "img", lambda a: a * NAN), begun=True),
    Case("token beyond the vocabulary", FEATURES, ("multimodal",), tensor("data", "ids", lambda a: a + 1000), begun=True),
    Case("captions of no picture", FEATURES, ("contradicts itself",), signed("data", lambda m: m.update(image_of_text=[9] * 8))),
    Case("captions in a table", FEATURES, ("(8, 1)",), signed("data", lambda m: m.update(image_of_text=[[0]] * 8))),
]
REPORTED = [
    Case("outputs unfinished", TOP1, ("no folder", "blip-run"), _unfinished),
    Case("no manifest", TOP1, ("holds no manifest.json",), gone("label-outputs/manifest.json")),
    Case("no probabilities", TOP1, ("probability.npy is missing",), gone("label-outputs/probability.npy")),
    Case("one bit of them", TOP1, ("probability.npy", "sha256"), changed("label-outputs/probability.npy", flipped, "--verify")),
    Case("one bit of the data", TOP1, ("img.npy", "sha256"), changed("label-data/img.npy", flipped, "--verify")),
    Case("data truncated", TOP1, ("img.npy has", "manifest says"), changed("label-data/img.npy", lambda b: b[:-9])),
    Case("no such data", TOP1, ("no folder nowhere", "blip-pre"), options("--data", "nowhere")),
    Case(
        "outputs of other data", TOP1, ("made from another data folder",), signed("label-data", lambda m: m["broken"].append({}))
    ),
    Case("probabilities NaN", TOP1, ("100 of 100 values", "from 0 to 1"), _probability(lambda a: a * NAN)),
    Case("probabilities below 0", TOP1, ("not numbers from 0 to 1",), _probability(lambda a: a - 1)),
    Case("probabilities of 2", TOP1, ("add up to 2",), _probability(lambda a: a * 2)),
    Case("fewer of them", TOP1, ("holds float32 (3, 5)",), _probability(lambda a: a[:3])),
    Case("labels lost", TOP1, ("garbles 'labels'",), _outputs(lambda m: m.pop("labels"))),
    Case("fewer labels", TOP1, ("contradicts itself: it has 4 labels",), _outputs(lambda m: m["labels"].pop())),
    Case("labels alike", TOP1, ("a label is there twice",), _outputs(lambda m: m.update(labels=["cat"] * 5))),
    Case("templates lost", TOP1, ("garbles 'templates'",), _outputs(lambda m: m.pop("templates"))),
    Case("templates a number", TOP1, ("garbles", "not iterable"), _outputs(lambda m: m.update(templates=7))),
    Case("graphs used a number", TOP1, ("garbles", "not iterable"), _outputs(lambda m: m["graphs"].update(used=7))),
    Case("timings without a stage", TOP1, ("garbles 'stage'",), _outputs(lambda m: m.update(timings=[{}]))),
    Case("origin lost", TOP1, ("does not say which data",), _outputs(lambda m: m.pop("data"))),
    Case("picture without a width", TOP1, ("picture 0 lacks 'width'",), _data(lambda m: m["images"][0].pop("width"))),
    Case("mean of one channel", TOP1, ("lacks a usable mean",), _data(lambda m: m["protocol"].update(mean=[0.5]))),
    Case("pictures that are numbers", TOP1, ("picture 0 lacks",), _data(lambda m: m.update(images=[7] * 20))),
    Case("--out the outputs", TOP1, ("is not empty and is not a report",), given("--out", "label-outputs"), 2),
]


@pytest.mark.parametrize("case", OTHER_TASKS + DESCRIBED + REPORTED, ids=str)
def test_tasks(case: Case, work2: Work) -> None:
    refused(case, work2)


@pytest.mark.parametrize("case", OF_CAPTIONS, ids=str)
def test_tasks_of_captions(case: Case, work2: Work) -> None:
    refused(case, work2, older=False)


def test_accuracy_of_captions(work: Work) -> None:
    """Outputs of retrieval; there are none of BLIP-2 here."""
    asked = ("--outputs", work["outputs"], "--data", work["data"], "--out", work["report"])
    refused(Case("accuracy", TOP1, ("task 'retrieval'", "blip-post --recall"), options(*asked)), work, older=False)
