"""blip-run features: what it writes, against two independent recomputations; what it refuses; that it can be stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

import postprocess.__main__
import preprocess.__main__
from models import manifest
from models.blip2 import Blip2Retrieval
from preprocess.dataset import read_retrieval as read_data
from runtime import features
from runtime.outputs import read_features
from runtime.session import Session
from tests import chain
from tests import independent_blip2 as independent
from tests.independent import read_pictures
from tests.independent_blip2 import Plain, Transformers
from tests.tiny import TINY2, TINY_CLIP, random_blip2

# Measured over the cases here: at most 3.0e-6 (pictures), 2.6e-6 (captions) and 3.7e-6 (both), of values that reach 4; 5.1e-7
# (of unit length).
TOLERANCE = 1e-4
NAMES = ("image_embeds", "image_embeds_proj", "text_embeds", "text_embeds_proj", "multimodal_embeds")
ATC = ("--target", "atc", "--batchsize", chain.STATIC)
NEEDED = ("--graphs", "image,text_feat,multimodal")


@cache
def model(name: str) -> Blip2Retrieval:
    return random_blip2({"eva": TINY2, "clip": TINY_CLIP}[name], seed=4)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Graphs by model and target."""
    wanted = {
        ("eva", "ort"): NEEDED,
        ("eva", "atc"): (*ATC, "--graphs", "image_feat,qformer,image,text_feat,multimodal"),
        ("clip", "atc"): (*ATC, *NEEDED),
    }
    made = {}
    for (name, target), options in wanted.items():
        made[name, target] = chain.export_graphs(tmp_path_factory.mktemp("graphs"), *options, model=model(name))
    return made


@pytest.fixture(scope="module")
def data(graphs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain.prepare(tmp_path_factory.mktemp("pictures"), graphs["eva", "atc"])


def run(graphs: Path, data: Path, out: Path, *options: object) -> Result:
    return chain.run(graphs, data, out, *options, task="features")


def theirs(judge: Plain | Transformers, data: Path) -> dict[str, np.ndarray]:
    """The independent features of the pictures and token ids of a data/ folder."""
    found = read_data(data)
    paths = [Path(found.source.content["images_root"]) / each["image"] for each in found.images]
    ids, mask = torch.from_numpy(np.array(found.ids[:])), torch.from_numpy(np.array(found.mask[:]))
    pictures = read_pictures(paths, found.img.shape[-1])
    return independent.features(judge, pictures, ids, mask, torch.from_numpy(found.image_of_text))


@cache
def expected(name: str, judge: type[Plain] | type[Transformers], data: Path) -> dict[str, np.ndarray]:
    return theirs(judge(model(name)), data)


def differences(outputs: Path, wanted: dict[str, np.ndarray]) -> dict[str, float]:
    found = read_features(outputs)
    return {name: float(np.abs(getattr(found, name)[:].astype(np.float64) - wanted[name]).max()) for name in NAMES}


CASES = [("eva", "ort", Plain), ("eva", "ort", Transformers), ("eva", "atc", Plain), ("clip", "atc", Plain)]


@pytest.mark.parametrize(("name", "target", "judge"), CASES)
def test_features(graphs: Any, data: Path, tmp_path: Path, name: str, target: str, judge: type[Plain]) -> None:
    printed = chain.done(run(graphs[name, target], data, tmp_path / "o"))
    assert printed == f"Outputs: {tmp_path / 'o'}\n"
    found = differences(tmp_path / "o", expected(name, judge, data))
    assert max(found.values()) <= TOLERANCE, found


def test_form(graphs: Any, data: Path, tmp_path: Path) -> None:
    """Shapes and names; unit length up to the end of a caption, zero behind it, though the static graph was fed padding."""
    chain.done(run(graphs["eva", "atc"], data, tmp_path / "o"))
    found, mask = read_features(tmp_path / "o", verify=True), read_data(data).mask[:]
    pictures, captions, length = len(chain.OWN), sum(chain.OWN), TINY2.protocol.max_length
    queries, width, embed = TINY2.qformer.queries, TINY2.qformer.width, TINY2.embed
    shapes = {name: getattr(found, name).shape for name in NAMES}
    assert shapes == {
        "image_embeds": (pictures, queries, width),
        "image_embeds_proj": (pictures, queries, embed),
        "text_embeds": (captions, length, width),
        "text_embeds_proj": (captions, length, embed),
        "multimodal_embeds": (captions, queries, width),
    }
    assert found.text_embeds is not None
    assert found.text_embeds_proj is not None
    assert mask.sum(axis=1).min() < length // 2
    np.testing.assert_array_equal(found.text_embeds[:][mask == 0], 0)
    np.testing.assert_allclose(np.linalg.norm(found.text_embeds_proj[:], axis=2), mask, atol=1e-5)
    content = found.source.content
    assert (content["task"], content["modes"], content["layout"]) == ("features", ["image", "text", "multimodal"], "packed")
    assert content["graphs"]["used"] == ["image", "multimodal", "text_feat"]
    assert content["data"]["digest"] == manifest.read(data, "data").digest
    assert {row["stage"]: row["items"] for row in content["timings"]} == {"pictures": pictures, "captions": captions}


@pytest.mark.parametrize(
    ("modes", "names", "used"),
    [
        ("image", NAMES[:2], ["image"]),
        ("text", NAMES[2:4], ["text_feat"]),
        ("multimodal", NAMES[4:], ["image_feat", "multimodal"]),
        ("text,image,text", NAMES[:4], ["image", "text_feat"]),
    ],
)
def test_some_modes(graphs: Any, data: Path, tmp_path: Path, modes: str, names: tuple[str, ...], used: list[str]) -> None:
    chain.done(run(graphs["eva", "atc"], data, tmp_path / "o", "--modes", modes))
    assert sorted(path.stem for path in (tmp_path / "o").glob("*.npy")) == sorted(names)
    found, wanted = read_features(tmp_path / "o"), expected("eva", Plain, data)
    assert found.source.content["graphs"]["used"] == used
    for name in NAMES:
        if name in names:
            np.testing.assert_allclose(getattr(found, name)[:], wanted[name], atol=TOLERANCE)
        else:
            assert getattr(found, name) is None


def test_the_q_former_after_the_encoder(graphs: Any, data: Path, tmp_path: Path) -> None:
    some = chain.with_only(graphs["eva", "atc"], tmp_path / "graphs", "image_feat", "qformer", "text_feat", "multimodal")
    chain.done(run(some, data, tmp_path / "o"))
    assert max(differences(tmp_path / "o", expected("eva", Plain, data)).values()) <= TOLERANCE


def test_pictures_are_looked_at_once(graphs: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many captions a picture has; and captions of like length go together, not padded beyond their batch."""
    looked, lengths = list[int](), list[int]()
    real = Session.run

    def counting(self: Session, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        if "input_image" in feeds:
            looked.append(len(feeds["input_image"]))
        if self.spec.name == "multimodal":
            lengths.append(feeds["text_ids"].shape[1])
        return real(self, **feeds)

    monkeypatch.setattr(Session, "run", counting)
    chain.done(run(graphs["eva", "ort"], data, tmp_path / "o", "--batchsize", 7))
    assert looked == [7, 7]
    assert min(lengths) < 10 < max(lengths)


def test_captions_that_are_not_in_the_order_of_the_pictures(graphs: Any, tmp_path: Path) -> None:
    """BLIP's training form: one entry per caption, collected under its picture, whose captions need not be neighbours."""
    entries = json.loads(chain.write_pictures(tmp_path, (1,) * 6).read_text("utf-8"))
    mixed = [{"image": entries[n % 6]["image"], "caption": f"word{n} word{n + 1} word{n}"} for n in (0, 3, 1, 6, 9, 4, 2, 5, 12)]
    (tmp_path / "mixed.json").write_text(json.dumps(mixed), "utf-8")
    named = ("--annotations", tmp_path / "mixed.json", "--images", tmp_path / "images", "--workers", 1)
    made = ("--graphs", graphs["eva", "atc"], "--out", tmp_path / "data")
    chain.done(chain.call(preprocess.__main__.main, "retrieval", *named, *made))
    owners = read_data(tmp_path / "data").image_of_text.tolist()
    assert owners != sorted(owners)
    chain.done(run(graphs["eva", "atc"], tmp_path / "data", tmp_path / "o", "--batchsize", 2))
    found = differences(tmp_path / "o", theirs(Plain(model("eva")), tmp_path / "data"))
    assert max(found.values()) <= TOLERANCE, found


def test_batch_of_one_and_of_many(graphs: Any, data: Path, tmp_path: Path) -> None:
    """Measured: no difference at all."""
    for size in (1, 64):
        chain.done(run(graphs["eva", "ort"], data, tmp_path / str(size), "--batchsize", size))
    one, many = read_features(tmp_path / "1"), read_features(tmp_path / "64")
    for name in NAMES:
        np.testing.assert_allclose(getattr(one, name)[:], getattr(many, name)[:], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("weight", "names"),
    [
        ("query_tokens", {"image_embeds", "image_embeds_proj", "multimodal_embeds"}),
        ("Qformer.bert.encoder.layer.1.output.dense.weight", {"text_embeds", "text_embeds_proj", "multimodal_embeds"}),
        ("text_proj.bias", {"text_embeds_proj"}),
    ],
)
def test_the_comparison_sees_one_wrong_weight(graphs: Any, data: Path, tmp_path: Path, weight: str, names: set[str]) -> None:
    chain.done(run(graphs["eva", "atc"], data, tmp_path / "o"))
    other = random_blip2(seed=4)
    dict(other.named_parameters())[weight].data.view(-1)[-1] += 0.05
    found = differences(tmp_path / "o", theirs(Plain(other), data))
    assert {name for name, difference in found.items() if difference > TOLERANCE} == names


def test_other_captions_for_a_picture_are_seen(graphs: Any, data: Path, tmp_path: Path) -> None:
    """Captions paired with the picture after their own would be far beyond the tolerance."""
    chain.done(run(graphs["eva", "atc"], data, tmp_path / "o"))
    found = read_features(tmp_path / "o").multimodal_embeds
    assert found is not None
    assert np.abs(np.roll(found[:], 1, axis=0) - expected("eva", Plain, data)["multimodal_embeds"]).max() > 1000 * TOLERANCE


def test_unknown_mode(graphs: Any, data: Path, tmp_path: Path) -> None:
    for modes, wrong in (("image,sound", "sound"), ("", ""), ("image, speech", "speech")):
        message = chain.refusal(run(graphs["eva", "atc"], data, tmp_path / "o", "--modes", modes), code=2)
        assert message == f"There is no mode {wrong!r}; known modes, with commas between: image,text,multimodal."
    assert not (tmp_path / "o").exists()


def test_graphs_of_blip(atc_graphs: Path, tiny_data: Path, tmp_path: Path) -> None:
    message = chain.refusal(run(atc_graphs, tiny_data, tmp_path / "o"))
    assert message == f"{atc_graphs} holds graphs of BLIP, but features are of BLIP-2's Q-Former: give graphs of BLIP-2."


def test_data_of_another_model(graphs: Any, tiny_data: Path, tmp_path: Path) -> None:
    message = chain.refusal(run(graphs["eva", "atc"], tiny_data, tmp_path / "o"))
    assert message.startswith(f"{tiny_data} was made with vocab 60, the graphs want 59. Write the data again: ")


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (("text_feat", "multimodal", "image_feat"), "image"),
        (("image", "multimodal"), "text_feat"),
        (("image", "text_feat"), "multimodal"),
    ],
)
def test_missing_graphs(graphs: Any, data: Path, tmp_path: Path, names: tuple[str, ...], missing: str) -> None:
    some = chain.with_only(graphs["eva", "atc"], tmp_path / "graphs", *names)
    message = chain.refusal(run(some, data, tmp_path / "o"))
    assert message == f"{some} has no graph {missing!r}. Export it: blip-export --graphs {missing} ..."
    assert not (tmp_path / "o").exists()


def test_features_do_not_replace_a_retrieval(graphs: Any, data: Path, tmp_path: Path) -> None:
    """Which has the same data, and the same folder unless another is named."""
    (tmp_path / "o").mkdir()
    before = manifest.write(tmp_path / "o", "outputs", {"task": "retrieval"})
    message = chain.refusal(run(graphs["eva", "atc"], data, tmp_path / "o"), code=2)
    assert message.startswith(f"{tmp_path / 'o'} is of the task 'retrieval', this is 'features': its outputs would be lost. ")
    assert manifest.read(tmp_path / "o", "outputs") == before
    chain.done(run(graphs["eva", "atc"], data, tmp_path / "o", "--modes", "text", "--restart"))


def test_features_are_no_retrieval(graphs: Any, data: Path, tmp_path: Path) -> None:
    chain.done(run(graphs["eva", "atc"], data, tmp_path / "o", "--modes", "text"))
    message = chain.refusal(
        chain.call(postprocess.__main__.main, "--recall", "--outputs", tmp_path / "o", "--out", tmp_path / "report")
    )
    assert message == f"{tmp_path / 'o'} holds outputs of the task 'features', expected 'retrieval'."


# The command in a process of its own, with small shards, which kills itself before a write without a chance to clean up.
KILLED = """
import os, signal, sys
from preprocess.tensors import Writer
from runtime import features
from runtime.__main__ import main

features.PICTURES_PER_SHARD, features.CAPTIONS_PER_SHARD = 4, 10
left, write = [int(sys.argv[1])], Writer.write

def dying(self, start, rows):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, start, rows)

Writer.write = dying
sys.argv[1:] = sys.argv[2:]
main()
"""


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch, computed: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Shards of a few pictures or captions; collects those that are computed in this process."""
    monkeypatch.setattr(features, "PICTURES_PER_SHARD", 4)
    monkeypatch.setattr(features, "CAPTIONS_PER_SHARD", 10)
    return computed


@pytest.mark.parametrize(("count", "shards"), [(1, 0), (30, 2), (70, 5)])
def test_killed_and_run_again(
    graphs: Any, data: Path, tmp_path: Path, small_shards: list[tuple[str, int]], count: int, shards: int
) -> None:
    options = ("--graphs", graphs["eva", "atc"], "--data", data, "--threads", 1, "--batchsize", 3)
    command = [sys.executable, "-c", KILLED, count, "features", *options, "--out", tmp_path / "o"]
    killed = subprocess.run([str(part) for part in command], capture_output=True, cwd=Path(__file__).parent.parent)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "o").exists()
    lines = (tmp_path / ".o.part" / "journal.jsonl").read_text("utf-8").splitlines()[1:]
    before = {(line["stage"], line["shard"]) for line in map(json.loads, lines)}
    chain.done(run(graphs["eva", "atc"], data, tmp_path / "o", "--batchsize", 3))
    assert not before & set(small_shards)
    assert {stage: sum(name == stage for name, _ in before | set(small_shards)) for stage in ("pictures", "captions")} == {
        "pictures": 4,
        "captions": 4,
    }
    assert len(before) == shards
    small_shards.clear()
    chain.done(run(graphs["eva", "atc"], data, tmp_path / "undisturbed", "--batchsize", 3))
    for name in NAMES:
        assert (tmp_path / "o" / f"{name}.npy").read_bytes() == (tmp_path / "undisturbed" / f"{name}.npy").read_bytes()
    assert "already holds this run" in chain.done(run(graphs["eva", "atc"], data, tmp_path / "o", "--batchsize", 3))
    assert "differs in modes" in chain.done(run(graphs["eva", "atc"], data, tmp_path / "o", "--batchsize", 3, "--modes", "text"))
