"""Results of an earlier step that are damaged, unfinished, of another run or in the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models import manifest
from tests import chain
from tests.bad_input.damage import changed, edited, flipped, given, gone, signed, tensor, without_graph
from tests.bad_input.table import Case, Work, options, refused


def _other_data(work: Work) -> list[object]:
    """Data of the same pictures with another caption."""
    work.annotate({"image": "1.png", "caption": "word3"})
    chain.done(work.call("pre", "--out", work["other"]))
    return ["--data", work["other"]]


def _unfinished(work: Work) -> list[object]:
    """Outputs as a run leaves them that was stopped."""
    (work["outputs"] / manifest.NAME).unlink()
    work["outputs"].rename(work[".later.part"])
    return ["--outputs", work["later"]]


def _foreign(work: Work) -> list[object]:
    work["other"].mkdir()
    (work["other"] / "thesis.txt").write_text("all of it")
    return ["--out", work["other"]]


def _below_a_file(work: Work) -> list[object]:
    return ["--out", work["annotations.json"] / "below"]


def _around(work: Work) -> list[object]:
    work["link"].symlink_to("link")
    return ["--out", work["link"]]


def _nothing(data: bytes) -> bytes:
    return bytes(len(data))


DAMAGED = [
    Case(
        "damaged .onnx of the same size",
        "run",
        ("image.onnx cannot be loaded",),
        changed("graphs/image.onnx", _nothing),
        begun=True,
    ),
    Case("one bit of an .onnx", "run", ("image.onnx", "sha256"), changed("graphs/image.onnx", flipped, "--verify")),
    Case("one bit of a tensor", "run", ("img.npy", "sha256"), changed("data/img.npy", flipped, "--verify")),
    Case("one bit of the outputs", "post", ("pair_sim.npy", "sha256"), changed("outputs/pair_sim.npy", flipped, "--verify")),
    Case("truncated .onnx", "run", ("image.onnx has", "its manifest says"), changed("graphs/image.onnx", lambda b: b[:-9])),
    Case("truncated tensor", "run", ("img.npy has", "its manifest says"), changed("data/img.npy", lambda b: b[:-9])),
    Case("graph gone", "run", ("image.onnx is missing",), gone("graphs/image.onnx")),
    Case("vocabulary gone", "pre", ("vocab.txt is missing",), gone("graphs/tokenizer/vocab.txt")),
    Case("tensor of another dtype", "run", ("img.npy holds float64",), tensor("data", "img", lambda a: a.astype("f8"))),
    Case("tensor of another shape", "run", ("ids.npy holds int64 (7, 35)",), tensor("data", "ids", lambda a: a[:7])),
    Case("NaN in a picture", "run", ("NaN",), tensor("data", "img", lambda a: a * np.float32("nan")), begun=True),
    Case("token beyond the vocabulary", "run", ("text_embed",), tensor("data", "ids", lambda a: a + 1000), begun=True),
    Case("scores that are NaN", "post", ("not finite",), tensor("outputs", "itm_logits", lambda a: a * np.float32("nan"))),
    Case("pairs of pictures there are not", "post", ("pair_image goes",), tensor("outputs", "pair_image", lambda a: a + 99)),
]
MANIFESTS = [
    Case("manifest truncated", "run", ("graphs/manifest.json is damaged",), changed("graphs/manifest.json", lambda b: b[:99])),
    Case("manifest empty", "run", ("data/manifest.json is damaged",), changed("data/manifest.json", lambda b: b"")),
    Case("manifest a list", "post", ("outputs/manifest.json is damaged",), changed("outputs/manifest.json", lambda b: b"[]")),
    Case("manifest of a later format", "run", ("has format 2",), edited("data", lambda m: m.update(format=2))),
    Case("manifest of another step", "run", ("is a 'graphs' folder",), given("--data", "graphs")),
    Case("no manifest", "run", ("holds no manifest.json",), gone("graphs/manifest.json")),
    Case("unknown task", "run", ("the task 'weather'",), signed("data", lambda m: m.update(task="weather"))),
    Case("no tensors", "run", ("no usable tensor 'img'",), signed("data", lambda m: m.update(tensors={}))),
    Case("captions lost", "run", ("contradicts itself",), signed("data", lambda m: m["captions"].pop())),
    Case("caption of no picture", "run", ("contradicts itself",), signed("data", lambda m: m.update(image_of_text=[99] * 8))),
    Case("graph of another form", "run", ("other inputs",), signed("graphs", lambda m: m["graphs"]["itm"]["inputs"].pop())),
    Case(
        "graph of another release",
        "bench",
        ("'video'",),
        signed("graphs", lambda m: m["graphs"].update(video=m["graphs"]["itm"])),
    ),
]
MIXED = [
    Case(
        "data of other graphs",
        "run",
        ("image_size 64", "want 32"),
        signed("data", lambda m: m["protocol"].update(image_size=64)),
    ),
    Case(
        "data of another vocabulary",
        "run",
        ("tokenizer_sha256",),
        signed("data", lambda m: m["protocol"].update(tokenizer_sha256="0" * 64)),
    ),
    Case("outputs of other data", "post", ("made from another data folder",), _other_data),
    Case("outputs unfinished", "post", ("no folder", "blip-run"), _unfinished),
    Case("no outputs", "post", ("no folder nowhere",), options("--outputs", "nowhere")),
    Case("no data", "run", ("no folder nowhere", "blip-pre"), options("--data", "nowhere")),
    Case("no graphs", "pre", ("no folder nowhere", "blip-export"), options("--graphs", "nowhere")),
    Case("no graphs to time", "bench", ("no folder nowhere", "blip-export"), options("--graphs", "nowhere")),
    Case("graph that was not exported", "run", ("no graph", "blip-export --graphs"), without_graph("itm")),
]
OUT = [
    Case(f"{what} in {step}", step, said, spoil, code)
    for step in ("pre", "export", "run", "post")
    for what, said, spoil, code in (
        ("--out a file", ("annotations.json is a file",), given("--out", "annotations.json"), 2),
        ("--out a foreign folder", ("is not empty and is not a",), _foreign, 2),
        ("--out of another step", ("is not empty and is not a",), given("--out", "images"), 2),
        ("--out below a file", ("annotations.json",), _below_a_file, 1),
        ("--out a link to itself", ("link that leads back to itself",), _around, 2),
    )
] + [
    Case("--record a file in bench", "bench", ("annotations.json",), given("--record", "annotations.json"), 2),
]


@pytest.mark.parametrize("case", DAMAGED + MANIFESTS + MIXED + OUT, ids=str)
def test_folders(case: Case, work: Work) -> None:
    refused(case, work)


def test_file_in_place_of_aedited(work: Work) -> None:
    """A folder there, which root cannot read either."""
    path: Path = work["graphs"] / manifest.NAME
    path.unlink()
    path.mkdir()
    refused(Case("folder", "run", ("holds no manifest.json",)), work)
