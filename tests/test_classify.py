"""`blip-run classify` against two judges on random models; what it keeps, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from models import manifest
from models.errors import UserError
from preprocess.dataset import read_classify as read_data
from runtime import classify
from runtime.classify import FIRST, MAX, probabilities
from runtime.journal import Journal
from runtime.labels import TEMPERATURE
from runtime.outputs import read_classify
from tests import chain
from tests.classes import (
    CLASSES,
    JUDGES,
    MODELS,
    TOLERANCE,
    PlainEmbedding,
    Work,
    assert_equal,
    blip2_graphs,
    data_for,
    prepare,
    theirs,
    with_temperature,
)
from tests.tiny import TINY_CLIP, random_blip2

TEMPLATES = ("word20 word21 {}", "{}", "Word22: {}, word23.")  # case and punctuation reach the tokenizer


@pytest.fixture
def blip(ort_graphs: Path, tmp_path: Path) -> Work:
    return Work("blip", ort_graphs, data_for(ort_graphs), tmp_path)


@pytest.fixture
def blip2(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Work:
    graphs = blip2_graphs(tmp_path_factory.getbasetemp())
    return Work("blip2", graphs, data_for(graphs), tmp_path)


@pytest.fixture(params=MODELS)
def work(request: pytest.FixtureRequest) -> Work:
    made: Work = request.getfixturevalue(request.param)
    return made


def test_equals_both_judges(work: Work) -> None:
    found = work.run()
    assert found.labels == [*CLASSES]
    assert found.run["templates"] == ["a picture of {}"]
    assert_equal(found, work.expected())
    np.testing.assert_allclose(np.linalg.norm(found.label_embed[:], axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found.probability[:].sum(axis=1), 1, atol=1e-6)
    # Equality would say little if the picture did not matter, or the label.
    assert found.probability[:].std(axis=0).min() > 10 * TOLERANCE  # measured 3.4e-3
    assert found.probability[:].std(axis=1).min() > 10 * TOLERANCE  # measured 0.12


def test_clip(tmp_path: Path) -> None:
    """BLIP-2 over CLIP's encoder, which transformers does not have; the first query and the best."""
    model = random_blip2(TINY_CLIP)
    graphs = chain.export_graphs(tmp_path, "--graphs", "text_embed,image", model=model)
    work = Work("clip", graphs, prepare(tmp_path, graphs), tmp_path)
    for query in (FIRST, MAX):
        wanted = theirs(model, read_data(work.data), CLASSES, query=query, judge=PlainEmbedding)
        assert_equal(work.run("--query", query), wanted)
        assert wanted.std(axis=0).min() > 10 * TOLERANCE  # measured 1.2e-3


@pytest.mark.parametrize("temperature", [0.02, 0.5, 1.0])
def test_temperatures(work: Work, temperature: float) -> None:
    found = work.run("--temperature", temperature)
    assert (found.run["temperature"], found.run["temperature_from"]) == (temperature, "option")
    assert_equal(found, work.expected(temperature=temperature))


def test_several_templates(work: Work) -> None:
    options = [part for template in TEMPLATES for part in ("--template", template)]
    found = work.run(*options, "--template", TEMPLATES[0])  # the same once more counts once
    assert found.run["templates"] == [*TEMPLATES]
    assert_equal(found, work.expected(templates=TEMPLATES))
    assert np.abs(found.probability[:] - work.expected(templates=TEMPLATES[:1])).max() > 10 * TOLERANCE


def test_labels_of_ones_own(work: Work) -> None:
    assert_equal(work.run("--labels", "word9, word10 word11,long2er3"), work.expected(["word9", "word10 word11", "long2er3"]))


def test_bare_labels(work: Work) -> None:
    found = work.run("--protocol", "lavis")
    assert (found.run["protocol"], found.run["templates"]) == ("lavis", ["{}"])
    assert_equal(found, work.expected(templates=["{}"]))


def test_queries(blip2: Work) -> None:
    """All of them, or the first: the two differ."""
    most = blip2.run("--query", MAX)
    assert most.run["query"] == MAX
    assert_equal(most, blip2.expected(query=MAX))
    first = blip2.run("--query", FIRST)
    assert_equal(first, blip2.expected(query=FIRST))
    assert np.abs(blip2.expected(query=MAX) - first.probability[:]).max() > 10 * TOLERANCE


@pytest.mark.parametrize("batchsize", [1, 3, 64])
def test_batches(work: Work, batchsize: int) -> None:
    """One picture at a time, all at once, and batches that leave a rest."""
    assert_equal(work.run("--batchsize", batchsize), work.expected())


@pytest.mark.parametrize(("name", "graphs"), [("blip", ("image",)), ("blip2", ("image_feat", "qformer"))])
def test_other_graphs_for_the_same_numbers(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, graphs: tuple[str, ...]
) -> None:
    work = request.getfixturevalue(name)
    work.graphs = chain.with_only(work.graphs, tmp_path / "graphs", "text_embed", *graphs)
    found = work.run()
    assert found.run["graphs"]["used"] == ["text_embed", *graphs]
    assert_equal(found, work.expected())


def test_the_cheapest_graphs_are_used(work: Work) -> None:
    used = work.run().run["graphs"]["used"]
    assert used == ["text_embed", "image_embed" if work.name == "blip" else "image"]


def test_static_graphs(work: Work, tmp_path: Path) -> None:
    """Fixed batch and length: batches and prompts are padded, the scores are the same."""
    options = ("--target", "atc", "--batchsize", chain.STATIC, "--graphs", "text_embed,image")
    work.graphs = chain.export_graphs(tmp_path, *options, model=MODELS[work.name]())
    assert_equal(work.run("--template", TEMPLATES[0]), work.expected(templates=TEMPLATES[:1]))
    message = chain.refusal(work.call("--template", "word1 " * 33 + "{}", "--labels", "word2,word3 word4"))
    assert message.startswith("The prompt 'word1 word1 ")
    assert message.endswith("is longer than 35 tokens, which the graph takes. Give a shorter label or template.")


@pytest.mark.parametrize(
    "change", ["visual_encoder.blocks.1.attn.proj.weight", "vision_proj.bias", "text_proj.bias"], ids=lambda name: name
)
def test_the_comparison_sees_one_wrong_weight(work: Work, change: str) -> None:
    found, other = work.run(), MODELS[work.name]()
    dict(other.named_parameters())[change].data.view(-1)[-1] += 0.05
    for judge in JUDGES[work.name]:
        assert np.abs(found.probability[:] - theirs(other, read_data(work.data), CLASSES, judge=judge)).max() > TOLERANCE


def test_probabilities_at_the_ends() -> None:
    """A temperature near 0 leaves the best label alone, a large one makes all equal; nothing overflows."""
    sides = np.eye(3, dtype=np.float32)
    np.testing.assert_array_equal(probabilities(sides, sides, FIRST, 1e-300), np.eye(3))
    np.testing.assert_allclose(probabilities(sides, sides, FIRST, 1e9), 1 / 3, rtol=1e-6)


def test_what_it_says_and_keeps(work: Work) -> None:
    printed = chain.done(work.call()).splitlines()
    assert printed == [
        "Warning: These graphs hold no temperature: their checkpoint had none. 0.07 is used; another would change the scores, "
        "not their order.",
        "20 pictures, 5 labels as 'a picture of {}'.",
        f"Outputs: {work.out}",
    ]
    run = read_classify(work.out).run
    assert {row["stage"]: row["items"] for row in run["timings"]} == {"labels": 5, "pictures": 20, "scores": 20}
    assert run["data"]["digest"] == manifest.read(work.data, "data").digest
    kept = {key: run[key] for key in ("labels", "query", "protocol", "temperature", "temperature_from")}
    assert kept == {
        "labels": [*CLASSES],
        "query": FIRST,
        "protocol": "mindformers",
        "temperature": TEMPERATURE,
        "temperature_from": "default",
    }
    assert sorted(path.name for path in work.out.glob("*.npy")) == ["image_embed.npy", "label_embed.npy", "probability.npy"]


def test_the_temperature_of_the_checkpoint(work: Work, tmp_path: Path) -> None:
    work.graphs = with_temperature(work.graphs, tmp_path / "graphs", 0.031)
    assert "Warning" not in chain.done(work.call())
    found = read_classify(work.out)
    assert (found.run["temperature"], found.run["temperature_from"]) == (0.031, "checkpoint")
    assert_equal(found, work.expected(temperature=0.031))


def test_a_stopped_run_goes_on(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classify, "PICTURES_PER_SHARD", 6)
    monkeypatch.setattr(classify, "SCORES_PER_SHARD", 7)
    whole = work.run()
    wanted = {path.name: path.read_bytes() for path in work.out.glob("*.npy")}
    stages = {row["stage"]: row["items"] for row in whole.run["timings"]}
    shutil.rmtree(work.out)
    for stage in ("pictures", "scores"):
        with monkeypatch.context() as patch:
            stop_in(patch, stage, shard=1)
            with pytest.raises(RuntimeError, match="stopped"):
                work.call()
        assert work.part.is_dir()
        assert not work.out.exists()
    resumed = {row["stage"]: row["resumed"] for row in work.run().run["timings"]}
    assert resumed == {"labels": stages["labels"], "pictures": stages["pictures"], "scores": 7}
    assert {path.name: path.read_bytes() for path in work.out.glob("*.npy")} == wanted


def stop_in(patch: pytest.MonkeyPatch, stage: str, shard: int) -> None:
    """Make the journal fail where it would note a shard."""
    note = Journal.note

    def stopping(self: Journal, at: str, number: int, items: int, seconds: float) -> None:
        if (at, number) == (stage, shard):
            raise RuntimeError("stopped")
        note(self, at, number, items, seconds)

    patch.setattr(Journal, "note", stopping)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (("--labels", "word1,word2"), "labels"),
        (("--template", "{} word1"), "templates"),
        (("--temperature", 0.5), "temperature, temperature_from"),
        (("--batchsize", 3), "batchsize"),
        (("--protocol", "lavis"), "protocol, templates"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_run_again(blip: Work, options: tuple[object, ...], key: str) -> None:
    """The same does nothing; another replaces it."""
    blip.run()
    before = (blip.out / manifest.NAME).read_bytes()
    said = "already holds this run; nothing to do (--restart runs it again)."
    assert said in chain.done(blip.call())
    assert (blip.out / manifest.NAME).read_bytes() == before
    assert f"{blip.out} holds a complete run that differs in {key}; it is replaced" in chain.done(blip.call(*options))
    assert said in chain.done(blip.call(*options))
    assert said not in chain.done(blip.call(*options, "--restart"))


@pytest.mark.parametrize("name", ["text_embed", "image_embed"])
def test_a_graph_that_gives_nan(blip: Work, tmp_path: Path, name: str) -> None:
    shutil.copytree(blip.graphs, tmp_path / "graphs")
    path = tmp_path / "graphs" / f"{name}.onnx"
    model = onnx.load(path)
    tensor = max((t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT), key=lambda t: len(t.raw_data))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32("nan"), tensor.name))
    path.write_bytes(model.SerializeToString())
    content = manifest.read(blip.graphs, "graphs").content
    (tmp_path / "graphs" / manifest.NAME).unlink()
    manifest.write(tmp_path / "graphs", "graphs", content)
    blip.graphs = tmp_path / "graphs"
    message = chain.refusal(blip.call())
    assert message.startswith("The graph gave NaN or infinity in ")
    assert not blip.out.exists()


def test_data_of_another_task(blip: Work, tiny_data: Path, tmp_path: Path) -> None:
    blip.data = tiny_data
    assert "was made for the task 'retrieval', expected 'classify'" in chain.refusal(blip.call())


def test_data_of_another_model(blip: Work, tmp_path: Path) -> None:
    shutil.copytree(blip.data, tmp_path / "data")
    content = manifest.read(blip.data, "data").content
    content["protocol"]["image_size"] = 64
    (tmp_path / "data" / manifest.NAME).unlink()
    manifest.write(tmp_path / "data", "data", content)
    blip.data = tmp_path / "data"
    said = f"{blip.data} was made with image_size 64, the graphs want 32. Write the data again: blip-pre classify --graphs "
    assert chain.refusal(blip.call()).startswith(said)


def test_missing_graphs(blip: Work, tmp_path: Path) -> None:
    whole = blip.graphs
    blip.graphs = chain.with_only(whole, tmp_path / "no pictures", "text_embed")
    assert "has no graph 'image_embed'. Export it: blip-export --graphs image_embed ..." in chain.refusal(blip.call())
    blip.graphs = chain.with_only(whole, tmp_path / "no texts", "image")
    assert "has no graph 'text_embed'." in chain.refusal(blip.call())


def outputs_of(out: Path, **change: Any) -> Path:
    """A small outputs/ folder whose manifest says `change`."""
    out.mkdir()
    tensors = {"image_embed": (3, 2), "label_embed": (2, 2), "probability": (3, 2)}
    for name, shape in tensors.items():
        np.save(out / f"{name}.npy", np.zeros(shape, np.float32))
    infos = {name: {"dtype": "float32", "shape": list(shape)} for name, shape in tensors.items()}
    manifest.write(out, "outputs", {"task": "classify", "layout": "packed", "tensors": infos, "labels": ["a", "b"], **change})
    return out


def test_outputs_are_checked(tmp_path: Path) -> None:
    assert read_classify(outputs_of(tmp_path / "good"), verify=True).labels == ["a", "b"]
    for n, (change, said) in enumerate(
        [
            ({"task": "retrieval"}, "holds outputs of the task 'retrieval', expected 'classify'."),
            ({"labels": ["a"]}, "contradicts itself: it has 1 labels and the tensors {'image_embed': [3, 2], "),
            ({"labels": None}, "lacks or garbles 'labels'. Write the folder again with blip-run classify."),
            ({"labels": [1, 2]}, "lacks or garbles 'labels'."),
            ({"tensors": {}}, "has no usable tensor 'image_embed'"),
        ]
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            read_classify(outputs_of(tmp_path / str(n), **change))


def test_manifest_is_plain_json(blip: Work) -> None:
    """What the report reads: every value survives JSON, and the identity holds no list of labels."""
    found = blip.run("--labels", ",".join(f"word{n}" for n in range(40)))
    again = json.loads((blip.out / manifest.NAME).read_text("utf-8"))
    assert again["labels"] == found.labels == [f"word{n}" for n in range(40)]
    assert len(again["identity"]["labels"]) == 64
