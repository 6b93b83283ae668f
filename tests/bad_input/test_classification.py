"""blip-run classify: labels, templates and temperatures that cannot be; data and graphs that are damaged or of another model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests import chain
from tests.bad_input.damage import changed, flipped, given, gone, holding, signed, tensor, together, without_graph
from tests.bad_input.table import Case, Spoil, Work, options, refused

STEP = "run classify"
VOCABULARY = "graphs/tokenizer/vocab.txt"


def _labels(data: str | bytes) -> Spoil:
    return together(holding("labels.txt", data), given("--labels-file", "labels.txt"))


def _misuse(name: str, said: tuple[str, ...], *values: object) -> Case:
    return Case(name, STEP, said, options(*values), 2)


def _data(change: Callable[[Any], object]) -> Spoil:
    return signed("label-data", change)


def _graphs(change: Callable[[Any], object]) -> Spoil:
    return signed("graphs", change)


def _label(change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    return tensor("label-data", "label", change)


LABELS = [
    Case("no file of labels", STEP, ("nowhere.txt", "no such file"), options("--labels-file", "nowhere.txt")),
    Case("a folder of labels", STEP, ("images", "is a directory"), given("--labels-file", "images")),
    Case("empty file of labels", STEP, ("labels.txt is empty", "one label"), _labels("")),
    Case("labels not UTF-8", STEP, ("labels.txt is not UTF-8: byte 6",), _labels(b"word1\n\xff\n")),
    Case("labels in UTF-16", STEP, ("labels.txt is not UTF-8",), _labels("word1\n".encode("utf-16"))),
    Case("labels in JSON", STEP, ("labels.txt begins with '['", "one label a line"), _labels('["word1", "word2"]')),
    Case("label twice", STEP, ("line 3 is 'word1', as 1 is",), _labels("word1\nword2\nword1\n")),
    Case("label blank", STEP, ("line 2 is blank",), _labels("word1\n\nword2\n")),
    Case("label too long", STEP, ("longer than 35 tokens", "a shorter label"), _labels("word1 " * 99), begun=True),
    Case("label unknown to the model", STEP, ("knows nothing of the label 'zebra'",), _labels("word1\nzebra\n"), begun=True),
    Case("labels but for their case", STEP, ("'word1' and 'WORD1'",), options("--labels", "word1,WORD1"), begun=True),
    _misuse("no label", ("Label 1 is blank",), "--labels", ""),
    _misuse("a comma too many", ("Label 2 is blank",), "--labels", "word1,"),
    _misuse("label given twice", ("Label 2 is 'word1', as 1 is",), "--labels", "word1,word1"),
    _misuse("labels and a file of them", ("Both --labels and --labels-file",), "--labels", "a", "--labels-file", "x"),
    _misuse("template without a place", ("'a picture' must hold one {}",), "--template", "a picture"),
    _misuse("template with two places", ("'{} of {}' must hold one {}",), "--template", "{} of {}"),
    _misuse("template with a number", ("'{0}' must hold one {}",), "--template", "{0}"),
    _misuse("template that looks into objects", ("{0.__class__}' must hold one {}",), "--template", "{0.__class__}"),
    _misuse("empty template", ("'' must hold one {}",), "--template", ""),
    _misuse("one good template", ("'x' must hold one {}",), "--template", "{}", "--template", "x"),
    _misuse("temperature 0", ("temperature is 0.0", "above 0"), "--temperature", 0),
    _misuse("temperature below 0", ("temperature is -1.0", "above 0"), "--temperature", -1),
    _misuse("temperature NaN", ("temperature is nan",), "--temperature", "nan"),
    _misuse("temperature infinite", ("temperature is inf",), "--temperature", "inf"),
    _misuse("temperature a word", ("--temperature", "hot"), "--temperature", "hot"),
    _misuse("unknown query", ("--query", "last", "'first'"), "--query", "last"),
    _misuse("unknown evaluation", ("--protocol", "clip", "'lavis'"), "--protocol", "clip"),
    _misuse("option of another task", ("--k-test",), "--k-test", 3),
]
DATA = [
    Case("data of captions", STEP, ("task 'retrieval', expected 'classify'", "Use blip-pre classify"), given("--data", "data")),
    Case("outputs for data", STEP, ("is a 'outputs' folder",), given("--data", "label-outputs")),
    Case("no data", STEP, ("no folder nowhere", "blip-pre"), options("--data", "nowhere")),
    Case("labels lost", STEP, ("label.npy is missing",), gone("label-data/label.npy")),
    Case("one bit of the labels", STEP, ("label.npy", "sha256"), changed("label-data/label.npy", flipped, "--verify")),
    Case("labels of no class", STEP, ("a label is beyond the 5 classes",), _label(lambda a: a + 99)),
    Case("labels below 0", STEP, ("a label is beyond the 5 classes",), _label(lambda a: a - 1)),
    Case("labels that are fractions", STEP, ("label.npy holds float32",), _label(lambda a: a.astype("f4"))),
    Case("fewer labels than pictures", STEP, ("label.npy holds int64 (19,)",), _label(lambda a: a[:19])),
    Case("classes lost", STEP, ("garbles 'classes'",), _data(lambda m: m.pop("classes"))),
    Case("classes a text", STEP, ("its classes, expected a list",), _data(lambda m: m.update(classes="cat"))),
    Case("classes alike", STEP, ("its classes are not names",), _data(lambda m: m.update(classes=["cat"] * 5))),
    Case("classes but for a blank", STEP, ("its classes are not names",), _data(lambda m: m["classes"].append("word3 "))),
    Case("fewer classes than labels", STEP, ("a label is beyond the 1 classes",), _data(lambda m: m.update(classes=["cat"]))),
    Case("fewer pictures than labels", STEP, ("'images': 19",), _data(lambda m: m["images"].pop())),
    Case("half a class", STEP, ("expected a text",), _data(lambda m: m["classes"].__setitem__(0, "\ud800")), 2),
    Case("protocol lost", STEP, ("garbles 'protocol'",), _data(lambda m: m.pop("protocol"))),
    Case("data of another size", STEP, ("image_size 64", "want 32"), _data(lambda m: m["protocol"].update(image_size=64))),
    Case("data of another vocabulary", STEP, ("vocab 60", "want 59"), _data(lambda m: m["protocol"].update(vocab=60))),
    Case("NaN in a picture", STEP, ("NaN",), tensor("label-data", "img", lambda a: a * np.float32("nan")), begun=True),
]
GRAPHS = [
    Case("graphs of BLIP", STEP, ("vocab 59", "want 60"), given("--graphs", "graphs of BLIP")),
    Case("no graph for texts", STEP, ("has no graph 'text_embed'", "blip-export"), without_graph("text_embed")),
    Case("no graph for pictures", STEP, ("has no graph 'image'", "blip-export"), without_graph("image")),
    Case(
        "damaged graph", STEP, ("image.onnx cannot be loaded",), changed("graphs/image.onnx", lambda b: bytes(len(b))), begun=True
    ),
    Case("graph of another form", STEP, ("other inputs",), _graphs(lambda m: m["config"]["qformer"].update(queries=7))),
    Case(
        "another vocabulary",
        STEP,
        ("vocab.txt", "sha256"),
        changed(VOCABULARY, lambda b: b.replace(b"word1\n", b"wordX\n")),
        begun=True,
    ),
    Case("temperature of the graphs 0", STEP, ("has the temperature 0",), _graphs(lambda m: m.update(temperature=0))),
    Case("temperature of the graphs a text", STEP, ("the temperature '0.07'",), _graphs(lambda m: m.update(temperature="0.07"))),
    Case("graphs of no model", STEP, ("garbles 'model'",), _graphs(lambda m: m.pop("model"))),
    Case("graphs without a parity", STEP, ("garbles 'parity'",), _graphs(lambda m: m.pop("parity"))),
    Case("vocabulary without a hash", STEP, ("garbles 'sha256'",), _graphs(lambda m: m["tokenizer"].pop("sha256"))),
    Case("temperature of 400 digits", STEP, ("the temperature 1000",), _graphs(lambda m: m.update(temperature=10**400))),
    Case("provider absent", STEP, ("CUDAExecutionProvider", "--provider cpu"), options("--provider", "cuda")),
]


@pytest.mark.parametrize("case", LABELS + DATA + GRAPHS, ids=str)
def test_classification(case: Case, work2: Work) -> None:
    refused(case, work2)


def test_a_query_for_blip(work2: Work) -> None:
    """It has one vector for a picture."""
    named = ("--graphs", work2["graphs of BLIP"])
    chain.done(work2.call("pre classify", *named, "--out", work2["other"]))
    said = ("The query 'max' was asked for, but these graphs are of BLIP",)
    asked = (*named, "--data", work2["other"], "--query", "max")
    refused(Case("query", STEP, said, options(*asked), 2), work2)


@pytest.mark.parametrize(
    "labels",
    [
        "\N{DOG FACE} word1\nword2",
        "一只棕色的狗 word1\nword2",
        "word1\0\nword2",
        "\x1b[31m word1\nword2",
        "word1 [SEP]\nword2",
        "word1",
    ],
    ids=["emoji", "Chinese", "NUL", "terminal code", "special token", "one alone"],
)
def test_odd_labels_are_all_right(work2: Work, labels: str) -> None:
    work2["labels.txt"].write_text(labels, "utf-8")
    chain.done(work2.call(STEP, "--labels-file", work2["labels.txt"], "--template", "{} {0.__class__}"))
    report = work2.call("post top1", "--outputs", work2.out, "--out", work2["new report"])
    assert "report.html" in chain.done(report)
