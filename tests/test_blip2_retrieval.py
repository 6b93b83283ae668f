"""BLIP-2's retrieval through the whole chain against two independent evaluations, on random models.

Ours comes from blip-export, blip-pre, blip-run and blip-post, theirs from tests/independent_blip2.py: in float64 from the
published description, and over transformers where it has the model.
"""

from __future__ import annotations

import dataclasses
import html.parser
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import postprocess.__main__
import preprocess.__main__
from models import manifest
from models.blip2 import Blip2Retrieval
from models.config import STAGE1, Blip2Config, VisionConfig
from models.presets import CLIP_L, EVA_G, QFORMER
from models.spec import graph_specs
from postprocess import inputs, recall
from preprocess.dataset import read_classify as read_classes
from preprocess.dataset import read_retrieval as read_data
from runtime.outputs import read_classify, read_features, read_retrieval
from runtime.session import Session
from tests import chain, classes
from tests.independent import Evaluation, itm_eval, read_pictures
from tests.independent_blip2 import Plain, Transformers, evaluate, features
from tests.tiny import TINY2, TINY_CLIP, random_blip2

# Bar of the product, on embeddings, features, logits and scores. Measured over the cases here: at most 7.3e-7 (embeddings and
# their similarities), 1.3e-6 (features, whose largest value is 2.3), 2.6e-6 (logits and scores).
TOLERANCE = 1e-4

SMALLER, PICTURES, CAPTIONS, LARGER = 11, len(chain.OWN), sum(chain.OWN), 1000
EVERY = ("--graphs", "text_embed,image_feat,qformer,image,image_kv,itm,itm_cached")
NEEDED = ("--graphs", "text_embed,image,image_kv,itm_cached")
ATC = ("--target", "atc", "--batchsize", chain.STATIC)
CLIP = dataclasses.replace(  # fewer layers: most of the time here is the exporter's, layer by layer
    TINY_CLIP,
    vision=dataclasses.replace(TINY_CLIP.vision, depth=2),
    qformer=dataclasses.replace(TINY_CLIP.qformer, depth=2),
)
MODELS = {"eva": (TINY2, 0), "eva, another seed": (TINY2, 1), "clip": (CLIP, 2)}


@cache
def model(name: str) -> Blip2Retrieval:
    config, seed = MODELS[name]
    return random_blip2(config, seed)


def inputs_of(data: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures (N, 3, S, S), read here, and the token ids and mask (M, L) of a data/ folder."""
    found = read_data(data)
    paths = [Path(found.source.content["images_root"]) / each["image"] for each in found.images]
    pictures = read_pictures(paths, found.img.shape[-1])
    return pictures, torch.from_numpy(np.array(found.ids[:])), torch.from_numpy(np.array(found.mask[:]))


def theirs(judge: Plain | Transformers, data: Path, k: int) -> Evaluation:
    """The independent evaluation of the pictures and token ids of a data/ folder."""
    return evaluate(judge, *inputs_of(data), k)


@cache
def expected(name: str, judge: type[Plain] | type[Transformers], data: Path, k: int) -> Evaluation:
    return theirs(judge(model(name)), data, k)


def largest(ours: Any, other: np.ndarray) -> float:
    """The largest difference of two arrays of one shape."""
    assert ours.shape == other.shape
    return float(np.abs(ours[:].astype(np.float64) - other).max())


def differences(outputs: Path, wanted: Evaluation) -> dict[str, float]:
    """The largest difference of each kind of number; infinity when other pairs were scored."""
    found = read_retrieval(outputs)
    pairs = list(zip(found.pair_image[:].tolist(), found.pair_text[:].tolist(), strict=True))
    i2t, t2i = recall.score_matrices(found)
    if set(pairs) != set(wanted.logits) or not np.array_equal(i2t == -100, wanted.i2t == -100):
        return {"pairs": float("inf")}
    compared = {
        "image_embed": (found.image_embed, wanted.image_embed),
        "image_feat": (np.load(outputs / "image_feat.npy"), wanted.image_feat),
        "text_embed": (found.text_embed, wanted.text_embed),
        "itm_logits": (found.itm_logits, np.array([wanted.logits[pair] for pair in pairs])),
        "pair_sim": (found.pair_sim, wanted.sims[found.pair_image[:], found.pair_text[:]]),
        "score_i2t": (i2t, wanted.i2t),
        "score_t2i": (t2i, wanted.t2i),
    }
    return {name: largest(ours, other) for name, (ours, other) in compared.items()}


def metrics(outputs: Path) -> tuple[dict[str, float], dict[str, float], list[int]]:
    """The metrics as blip-post computes them, re-ranked and by similarity alone, and the picture of each caption."""
    run, data = inputs.read(outputs, None, verify=False)
    found = recall.assess(run, data.image_of_text)
    return recall.metrics(found.reranked), recall.metrics(found.itc), data.image_of_text.tolist()


def assert_equal(outputs: Path, wanted: Evaluation, tolerance: float = TOLERANCE) -> None:
    found = differences(outputs, wanted)
    assert max(found.values()) <= tolerance, found
    reranked, itc, owners = metrics(outputs)
    assert reranked == pytest.approx(itm_eval(wanted.i2t, wanted.t2i, owners), abs=1e-9)
    assert itc == pytest.approx(itm_eval(wanted.sims, wanted.sims.T, owners), abs=1e-9)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Graphs by model and target. Of one model every graph that a run may take, of the others the preferred ones."""
    wanted = {
        ("eva", "atc"): (*ATC, *EVERY),
        ("eva", "ort"): NEEDED,
        ("eva, another seed", "atc"): (*ATC, *NEEDED),
        ("clip", "ort"): NEEDED,
        ("clip", "atc"): (*ATC, *NEEDED),
    }
    made = {}
    for (name, target), options in wanted.items():
        folder = tmp_path_factory.mktemp("graphs")
        made[name, target] = chain.export_graphs(folder, *options, model=model(name))
    return made


@pytest.fixture(scope="module")
def data(graphs: dict[tuple[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and captions for all of them: they share sizes, protocol and vocabulary."""
    return chain.prepare(tmp_path_factory.mktemp("pictures"), graphs["eva", "atc"])


@pytest.fixture(scope="module")
def scored(graphs: dict[tuple[str, str], Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over every pair. Read only."""
    out = tmp_path_factory.mktemp("scored") / "outputs"
    chain.done(chain.run(graphs["eva", "atc"], data, out, "--k-test", LARGER))
    return out


@pytest.mark.parametrize("judge", [Plain, Transformers])
@pytest.mark.parametrize("target", ["ort", "atc"])
@pytest.mark.parametrize("k", [SMALLER, PICTURES, CAPTIONS, LARGER])
def test_eva(graphs: Any, data: Path, tmp_path: Path, k: int, target: str, judge: type[Plain] | type[Transformers]) -> None:
    chain.done(chain.run(graphs["eva", target], data, tmp_path / "outputs", "--k-test", k))
    assert_equal(tmp_path / "outputs", expected("eva", judge, data, k))


@pytest.mark.parametrize("target", ["ort", "atc"])
@pytest.mark.parametrize("k", [SMALLER, PICTURES, LARGER])
def test_clip(graphs: Any, data: Path, tmp_path: Path, k: int, target: str) -> None:
    chain.done(chain.run(graphs["clip", target], data, tmp_path / "outputs", "--k-test", k))
    assert_equal(tmp_path / "outputs", expected("clip", Plain, data, k))


def test_another_model_and_other_pictures(graphs: Any, tmp_path: Path) -> None:
    name = "eva, another seed"
    other = chain.prepare(tmp_path, graphs[name, "atc"], seed=1, own=(2, 1, 4) * 5)
    chain.done(chain.run(graphs[name, "atc"], other, tmp_path / "outputs", "--k-test", SMALLER))
    for judge in (Plain, Transformers):
        assert_equal(tmp_path / "outputs", theirs(judge(model(name)), other, SMALLER))


@pytest.mark.parametrize(
    "names",
    [("text_embed", "image_feat", "qformer", "image_kv", "itm_cached"), ("text_embed", "image", "itm")],
    ids=["the Q-Former after the ViT", "pair by pair"],
)
def test_other_graphs_for_the_same_numbers(graphs: Any, data: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    some = chain.with_only(graphs["eva", "atc"], tmp_path / "graphs", *names)
    chain.done(chain.run(some, data, tmp_path / "outputs", "--k-test", SMALLER))
    order = ["image", "image_feat", "qformer", "text_embed", "image_kv", "itm_cached", "itm"]
    assert read_retrieval(tmp_path / "outputs").run["graphs"]["used"] == sorted(names, key=order.index)
    assert_equal(tmp_path / "outputs", expected("eva", Plain, data, SMALLER))


def test_one_pass_of_the_encoder(graphs: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each picture enters one graph, once, and what is not read later is not kept."""
    fed: list[tuple[str, int]] = []
    real = Session.run

    def counting(self: Session, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        fed.extend((self.spec.name, len(value)) for name, value in feeds.items() if name == "input_image")
        return real(self, **feeds)

    monkeypatch.setattr(Session, "run", counting)
    chain.done(chain.run(graphs["eva", "ort"], data, tmp_path / "outputs"))
    assert {name for name, _ in fed} == {"image"}
    assert sum(rows for _, rows in fed) == PICTURES
    assert sorted(path.stem for path in (tmp_path / "outputs").glob("*.npy")) == [
        *("image_embed", "image_feat", "itm_logits", "pair_direction", "pair_image", "pair_sim", "pair_text", "text_embed"),
    ]
    assert read_retrieval(tmp_path / "outputs").image_embed.shape == (PICTURES, TINY2.qformer.queries, TINY2.embed)
    assert read_retrieval(tmp_path / "outputs").run["k_test"] == TINY2.protocol.k_test


def test_batch_of_one_and_of_many(graphs: Any, data: Path, tmp_path: Path) -> None:
    """To float rounding: measured 1.9e-7."""
    found = []
    for n, options in enumerate([("--batchsize", 1, "--itm-batchsize", 1), ("--batchsize", 64, "--itm-batchsize", 64)]):
        chain.done(chain.run(graphs["eva", "ort"], data, tmp_path / str(n), "--k-test", LARGER, *options))
        found.append(read_retrieval(tmp_path / str(n)))
    for name in ("image_embed", "text_embed", "itm_logits", "pair_sim"):
        np.testing.assert_allclose(getattr(found[0], name)[:], getattr(found[1], name)[:], rtol=0, atol=2e-5)


def test_half_precision_features(graphs: Any, data: Path, tmp_path: Path) -> None:
    """--feat-dtype float16 rounds what the ITM graphs read; the Q-Former has read the features before they were rounded."""
    some = chain.with_only(graphs["eva", "atc"], tmp_path / "graphs", "text_embed", "image_feat", "qformer", "itm")
    chain.done(chain.run(some, data, tmp_path / "outputs", "--k-test", LARGER, "--feat-dtype", "float16"))
    found = differences(tmp_path / "outputs", expected("eva", Plain, data, LARGER))
    assert np.load(tmp_path / "outputs" / "image_feat.npy").dtype == np.float16
    assert 1e-5 < found["itm_logits"] < 3e-3  # measured 1.3e-4
    assert max(found[name] for name in ("image_embed", "text_embed", "pair_sim")) <= TOLERANCE


@pytest.mark.parametrize("name", list(MODELS))
def test_scores_are_spread(data: Path, name: str) -> None:
    """Equality would say little if all scores were alike, if the picture did not matter, or if one query always won."""
    wanted = expected(name, Plain, data, LARGER)
    assert wanted.i2t.std(axis=0).mean() > 0.01  # of one caption over the pictures; measured 0.016 (CLIP) to 0.19
    assert wanted.i2t.std(axis=1).mean() > 0.1  # of one picture over the captions; measured 0.22 to 0.36
    products = np.einsum("nqe,me->nqm", wanted.image_embed, wanted.text_embed)
    assert len(np.unique(products.argmax(axis=1))) > 1
    assert np.abs(products.max(axis=1) - products[:, 0]).max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        "visual_encoder.blocks.1.attn.v_bias",
        "ln_vision.weight",
        "query_tokens",
        "Qformer.bert.encoder.layer.2.crossattention.self.value.weight",
        "Qformer.bert.encoder.layer.3.output_query.dense.weight",
        "Qformer.bert.encoder.layer.1.output.dense.bias",
        "vision_proj.bias",
        "itm_head.bias",
    ],
)
def test_the_comparison_sees_one_wrong_weight(scored: Path, data: Path, name: str) -> None:
    other = random_blip2()
    dict(other.named_parameters())[name].data.view(-1)[-1] += 0.05
    found = differences(scored, theirs(Plain(other), data, LARGER))
    assert max(found.values()) > TOLERANCE, found


def test_the_comparison_sees_the_wrong_query(graphs: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first query instead of the best one: embeddings as before, other similarities."""
    monkeypatch.setattr("runtime.similarity.similarities", lambda images, texts: images[:, 0] @ texts.T)
    chain.done(chain.run(graphs["eva", "atc"], data, tmp_path / "outputs", "--k-test", LARGER))
    found = differences(tmp_path / "outputs", expected("eva", Plain, data, LARGER))
    assert found["image_embed"] <= TOLERANCE < found["pair_sim"]


class Page(html.parser.HTMLParser):
    """Counts the elements of a page and keeps its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


def test_report(graphs: Any, data: Path, tmp_path: Path) -> None:
    chain.done(chain.run(graphs["eva", "ort"], data, tmp_path / "outputs", "--k-test", SMALLER))
    found = chain.recall(tmp_path / "outputs", tmp_path / "report")
    wanted = expected("eva", Transformers, data, SMALLER)
    assert found == pytest.approx(itm_eval(wanted.i2t, wanted.t2i, metrics(tmp_path / "outputs")[2]), abs=1e-9)
    assert list(found) == [
        *(f"{side}_{part}" for side in ("txt", "img") for part in ("r1", "r5", "r10", "r_mean")),
        *("r_mean", "agg_metrics"),
    ]
    page = Page((tmp_path / "report" / "report.html").read_text("utf-8"))
    assert page.tags.count("svg") >= 2
    assert page.tags.count("img") > 0
    record = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    assert record["protocol"]["evaluation"] == "lavis"


def test_embeddings_that_do_not_fit_each_other(scored: Path, tmp_path: Path) -> None:
    shutil.copytree(scored, tmp_path / "outputs")
    path = tmp_path / "outputs" / "manifest.json"
    record = json.loads(path.read_text("utf-8"))
    record["tensors"]["image_embed"]["shape"] = shape = [PICTURES, TINY2.qformer.queries * TINY2.embed]
    np.save(path.with_name("image_embed.npy"), np.zeros(shape, np.float32))
    record["files"]["image_embed.npy"] = manifest.file_record(path.with_name("image_embed.npy"))
    path.write_text(json.dumps(record), "utf-8")
    message = chain.refusal(
        chain.call(postprocess.__main__.main, "--recall", "--outputs", path.parent, "--out", tmp_path / "report")
    )
    assert "image_embed has the shape (14, 120), (14, 20) belongs to its data." in message


def prepared(annotations: Path, images: Path, graphs: Path, out: Path, *options: object) -> Path:
    """blip-pre retrieval."""
    named = ("--annotations", annotations, "--images", images, "--graphs", graphs, "--out", out, "--workers", 1)
    chain.done(chain.call(preprocess.__main__.main, "retrieval", *named, *options))
    return out


def caption(random: np.random.Generator) -> str:
    """Nine words: no two captions of a test are alike, as short ones may be, whose order would be left to rounding."""
    return " ".join(random.choice(chain.WORDS, 9)) + " ."


def test_the_evaluation_of_mindformers(graphs: Any, tmp_path: Path) -> None:
    """Of 104 pictures the last four, which fill no batch, and their captions are neither asked for nor found."""
    annotations, images, random = chain.write_pictures(tmp_path, (2,) * 104), tmp_path / "images", np.random.default_rng(0)
    entries = [{**entry, "caption": [caption(random), caption(random)]} for entry in json.loads(annotations.read_text("utf-8"))]
    annotations.write_text(json.dumps(entries), "utf-8")
    whole = prepared(annotations, images, graphs["eva", "ort"], tmp_path / "whole")
    first = prepared(annotations, images, graphs["eva", "ort"], tmp_path / "first", "--limit", 100)
    run = (graphs["eva", "ort"], whole, tmp_path / "outputs", "--k-test", SMALLER)
    printed = chain.done(chain.run(*run, "--protocol", "mindformers"))
    assert printed.startswith("4 pictures fill no batch of mindformers: they and their captions are left out.\n")
    assert read_retrieval(tmp_path / "outputs").image_embed.shape[0] == 100
    assert_equal(tmp_path / "outputs", theirs(Plain(model("eva")), first, SMALLER))
    found = chain.recall(tmp_path / "outputs", tmp_path / "report")
    record = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    assert record["protocol"]["evaluation"] == "mindformers, 4 pictures left out"
    assert (record["counts"]["pictures"], record["counts"]["captions"]) == (100, 200)
    assert "holds a complete run that differs in protocol" in chain.done(chain.run(*run))  # that of LAVIS, which counts all
    assert read_retrieval(tmp_path / "outputs").image_embed.shape[0] == 104
    assert metrics(tmp_path / "outputs")[0] != found


def test_too_few_pictures_for_mindformers(graphs: Any, data: Path, tmp_path: Path) -> None:
    message = chain.refusal(chain.run(graphs["eva", "ort"], data, tmp_path / "o", "--protocol", "mindformers"))
    assert message.endswith(f"and {data} has 14: none is left. Use --protocol lavis.")
    assert not (tmp_path / "o").exists()


def test_flickr30k(graphs: Any, tmp_path: Path) -> None:
    """The layout that LAVIS and mindformers expect: flickr30k/annotations/test.json, flickr30k/images/flickr30k-images/*.jpg."""
    root, random = tmp_path / "flickr30k", np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    (root / "images" / "flickr30k-images").mkdir(parents=True)
    entries = []
    for n in range(12):
        name = f"flickr30k-images/{1000092795 + n}.jpg"
        blobs = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blobs).resize((50, 37)).save(root / "images" / name)
        entries.append({"image": name, "caption": [caption(random) for _ in range(5)]})
    (root / "annotations" / "test.json").write_text(json.dumps(entries), "utf-8")
    found = prepared(root / "annotations" / "test.json", root / "images", graphs["eva", "ort"], tmp_path / "data")
    assert read_data(found).image_of_text.tolist() == [n // 5 for n in range(60)]
    assert read_data(found).images[3] == {"image": "flickr30k-images/1000092798.jpg", "width": 50, "height": 37}
    chain.done(chain.run(graphs["eva", "ort"], found, tmp_path / "outputs", "--k-test", 12))
    assert_equal(tmp_path / "outputs", theirs(Transformers(model("eva")), found, 12))
    assert set(chain.recall(tmp_path / "outputs", tmp_path / "report")) >= {"txt_r1", "img_r1", "agg_metrics"}


# Encoders at full width with two of their blocks, and the judges that know them.
FULL: dict[str, tuple[VisionConfig, list[type[Plain] | type[Transformers]]]] = {
    "eva": (EVA_G, [Plain, Transformers]),
    "clip": (CLIP_L, [Plain]),
}
OF_CLASSIFICATION: dict[Any, classes.Judge] = {Plain: classes.PlainEmbedding, Transformers: classes.transformers_embedding}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_width(tmp_path: Path, name: str) -> None:
    """The whole Q-Former on two blocks of ViT-g or ViT-L at 224 pixels: retrieval, features and classification, one by one
    and many at once. Only the vocabulary is short, which no number depends on."""
    vision, judges = FULL[name]
    config = Blip2Config(
        dataclasses.replace(vision, depth=2),
        dataclasses.replace(QFORMER, vocab=TINY2.qformer.vocab),
        protocol=dataclasses.replace(STAGE1, k_test=6),  # every pair: among captions left out, the cut at 10 falls by chance
    )
    big = random_blip2(config, seed=2, std=0.05)
    exported = chain.export_graphs(tmp_path / "big", "--graphs", f"{NEEDED[1]},text_feat,multimodal", model=big)
    assert graph_specs(config)["image_kv"].outputs[0].shape == ("B", 12, 12, 257, 64)
    captions = chain.prepare(tmp_path / "captions", exported, seed=2, own=(1, 3, 2))
    labelled = classes.prepare(tmp_path / "classes", exported, each=1)
    batches: dict[str, tuple[object, ...]] = {"one": ("--batchsize", 1), "many": ("--batchsize", 64)}
    for batch, option in batches.items():
        chain.done(chain.run(exported, captions, tmp_path / batch, *option, "--itm-batchsize", option[1]))
        for task, data in (("features", captions), ("classify", labelled)):
            chain.done(chain.run(exported, data, tmp_path / f"{task} {batch}", *option, task=task))

    for kind in judges:
        judge = kind(big)
        wanted = theirs(judge, captions, config.protocol.k_test)
        arrays = features(judge, *inputs_of(captions), torch.from_numpy(read_data(captions).image_of_text))
        scores = classes.theirs(big, read_classes(labelled), classes.CLASSES, judge=OF_CLASSIFICATION[kind])
        # Measured, the larger of both judges, EVA and CLIP: 4.2e-7 and 3.4e-7 (embeddings and similarities), 8.2e-7 and 2.8e-7
        # (image_feat), 2.4e-5 and 7.8e-6 (logits and scores), 6.2e-6 and 5.2e-6 (image and text features, which reach 4),
        # 2.3e-5 and 1.7e-5 (multimodal), 6.8e-7 and 8.1e-7 (classification). Plain in PyTorch's float32 is as far from float64,
        # on CLIP: 2.8e-7, 2.1e-7, 1.2e-5, 4.7e-6, 1.7e-5.
        for batch in batches:
            found = read_features(tmp_path / f"features {batch}")
            measured = {key: largest(getattr(found, key), array) for key, array in arrays.items()}
            assert_equal(tmp_path / batch, wanted)  # and the metrics, identical
            assert max(measured.values()) <= TOLERANCE, measured
            classes.assert_equal(read_classify(tmp_path / f"classify {batch}"), scores)
    alike = {
        f"{folder}{path.stem}": largest(np.load(path), np.load(tmp_path / f"{folder}many" / path.name))
        for folder in ("", "features ", "classify ")
        for path in (tmp_path / f"{folder}one").glob("*.npy")
    }
    assert max(alike.values()) <= 2e-5, alike  # measured 4.8e-7, on CLIP (logits)
