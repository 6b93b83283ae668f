"""The whole chain through .onnx against an independent evaluation over transformers, on random models.

Our features, embeddings, logits and scores come from blip-export, blip-pre, blip-run and blip-post, theirs from
tests/independent.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.blip import BlipRetrieval
from models.config import BlipConfig, Protocol
from models.presets import MED, VIT_B
from postprocess import recall
from preprocess.dataset import read_retrieval as read_data
from runtime.outputs import read_retrieval, scores
from tests import chain
from tests.independent import Evaluation, evaluate, itm_eval, read_pictures, transformers_model
from tests.tiny import TINY, random_model

# Bar of the product, on embeddings, features, logits and scores. Measured over the cases here: at most 6.2e-7 (embeddings
# and their similarities), 3.1e-6 (features, whose largest value is 4.5), 3.4e-6 (logits and scores, which reach 3).
TOLERANCE = 1e-4

SMALLER, PICTURES, CAPTIONS, LARGER = 11, len(chain.OWN), sum(chain.OWN), 1000


def theirs(model: BlipRetrieval, data: Path, k: int) -> Evaluation:
    """The independent evaluation of the pictures and token ids of a data/ folder."""
    found = read_data(data)
    paths = [Path(found.source.content["images_root"]) / each["image"] for each in found.images]
    pictures = read_pictures(paths, model.cfg.vision.image_size)
    ids, mask = torch.from_numpy(np.array(found.ids[:])), torch.from_numpy(np.array(found.mask[:]))
    return evaluate(transformers_model(model), pictures, ids, mask, found.encode_id, k)


@cache
def expected(seed: int, data: Path, k: int) -> Evaluation:
    return theirs(random_model(seed=seed), data, k)


def differences(outputs: Path, wanted: Evaluation) -> dict[str, float]:
    """The largest difference of each kind of number; infinity when other pairs were scored."""
    found = read_retrieval(outputs)
    pairs = list(zip(found.pair_image[:].tolist(), found.pair_text[:].tolist(), strict=True))
    i2t, t2i = recall.score_matrices(found)
    same = set(pairs) == set(wanted.logits) and len(pairs) == len(wanted.logits)
    same = same and np.array_equal(i2t == -100, wanted.i2t == -100) and np.array_equal(t2i == -100, wanted.t2i == -100)
    compared = {
        "image_embed": (found.image_embed, wanted.image_embed),
        "image_feat": (np.load(outputs / "image_feat.npy"), wanted.image_feat),
        "text_embed": (found.text_embed, wanted.text_embed),
        "itm_logits": (found.itm_logits, np.array([wanted.logits[pair] for pair in pairs if pair in wanted.logits])),
        "pair_sim": (found.pair_sim, wanted.sims[found.pair_image[:], found.pair_text[:]]),
        "score_i2t": (i2t, wanted.i2t),
        "score_t2i": (t2i, wanted.t2i),
    }
    if not same:
        return dict.fromkeys(compared, float("inf"))
    return {name: float(np.abs(ours[:].astype(np.float64) - other).max()) for name, (ours, other) in compared.items()}


def metrics(outputs: Path, data: Path) -> dict[str, float]:
    """The metrics as blip-post computes them."""
    found = recall.assess(read_retrieval(outputs), read_data(data).image_of_text)
    return recall.metrics(found.reranked)


def owners(data: Path) -> list[int]:
    """The picture of each caption."""
    found: list[int] = read_data(data).image_of_text.tolist()
    return found


def assert_equal(outputs: Path, data: Path, wanted: Evaluation, tolerance: float = TOLERANCE) -> None:
    found = differences(outputs, wanted)
    assert max(found.values()) <= tolerance, found
    assert metrics(outputs, data) == pytest.approx(itm_eval(wanted.i2t, wanted.t2i, owners(data)), abs=1e-9)


NEEDED = ("--graphs", "text_embed,image,image_kv,itm_cached")


@pytest.fixture(scope="module")
def second_seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs a run needs, of another random model."""
    return chain.export_graphs(tmp_path_factory.mktemp("seed1"), *NEEDED, model=random_model(seed=1))


@pytest.mark.parametrize("k", [SMALLER, PICTURES, CAPTIONS, LARGER])
def test_dynamic_graphs(ort_graphs: Path, tiny_data: Path, tmp_path: Path, k: int) -> None:
    chain.done(chain.run(ort_graphs, tiny_data, tmp_path / "outputs", "--k-test", k))
    assert_equal(tmp_path / "outputs", tiny_data, expected(0, tiny_data, k))


@pytest.mark.parametrize("k", [SMALLER, LARGER])
def test_another_model_and_other_pictures(second_seed: Path, tmp_path: Path, k: int) -> None:
    data = chain.prepare(tmp_path, second_seed, seed=1)
    chain.done(chain.run(second_seed, data, tmp_path / "outputs", "--k-test", k, "--batchsize", 5, "--itm-batchsize", 2))
    assert_equal(tmp_path / "outputs", data, theirs(random_model(seed=1), data, k))


@pytest.mark.parametrize("k", [SMALLER, CAPTIONS, LARGER])
def test_static_graphs(atc_graphs: Path, tiny_data: Path, tmp_path: Path, k: int) -> None:
    """Batches of 3 and the full length, padded and cut in the runtime."""
    chain.done(chain.run(atc_graphs, tiny_data, tmp_path / "outputs", "--k-test", k))
    assert_equal(tmp_path / "outputs", tiny_data, expected(0, tiny_data, k))


def test_static_graphs_for_shorter_captions(tmp_path: Path) -> None:
    """--length makes graphs and data agree: captions are cut to 12 tokens, and the runtime takes them."""
    graphs = chain.export_graphs(tmp_path, *NEEDED, "--target", "atc", "--batchsize", 4, "--length", 12)
    data = chain.prepare(tmp_path, graphs)
    mask = read_data(data).mask[:]
    assert mask.shape == (CAPTIONS, 12)
    assert mask.sum(axis=1).max() == 12
    chain.done(chain.run(graphs, data, tmp_path / "outputs", "--k-test", SMALLER))
    assert_equal(tmp_path / "outputs", data, theirs(random_model(), data, SMALLER))


@pytest.mark.parametrize("seed", [2, 3])
def test_more_models_with_static_graphs(tmp_path: Path, seed: int) -> None:
    model = random_model(seed=seed)
    graphs = chain.export_graphs(tmp_path, *NEEDED, "--target", "atc", "--batchsize", 4, "--opset", 11, model=model)
    data = chain.prepare(tmp_path, graphs, seed=seed, own=(2, 1, 4) * 5)
    chain.done(chain.run(graphs, data, tmp_path / "outputs", "--k-test", SMALLER))
    assert_equal(tmp_path / "outputs", data, theirs(model, data, SMALLER))


@pytest.mark.parametrize(
    "names",
    [("text_embed", "image_embed", "image_feat", "image_kv", "itm_cached"), ("text_embed", "image", "itm")],
    ids=["two passes of the ViT", "pair by pair"],
)
def test_other_graphs_for_the_same_numbers(ort_graphs: Path, tiny_data: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    graphs = chain.with_only(ort_graphs, tmp_path / "graphs", *names)
    chain.done(chain.run(graphs, tiny_data, tmp_path / "outputs", "--k-test", SMALLER))
    assert read_retrieval(tmp_path / "outputs").run["graphs"]["used"] == sorted(
        names, key=["image", "image_embed", "image_feat", "text_embed", "image_kv", "itm_cached", "itm"].index
    )
    # The data was made with the vocabulary and sizes of these graphs, so it may be used with any selection of them.
    assert_equal(tmp_path / "outputs", tiny_data, expected(0, tiny_data, SMALLER))


def test_report_of_the_command(ort_graphs: Path, tiny_data: Path, tmp_path: Path) -> None:
    """blip-post itself prints and writes the original's metrics."""
    chain.done(chain.run(ort_graphs, tiny_data, tmp_path / "outputs", "--k-test", SMALLER))
    wanted = expected(0, tiny_data, SMALLER)
    found = chain.recall(tmp_path / "outputs", tmp_path / "report")
    assert found == pytest.approx(itm_eval(wanted.i2t, wanted.t2i, owners(tiny_data)), abs=1e-9)
    # The metrics say something: neither nothing nor everything is found, and re-ranking changed the order.
    assert 0 < found["txt_r10"] < 100
    assert 0 < found["img_r10"] < 100


def test_k_test_below_ten(ort_graphs: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The original's R@10 then depends on how its sort leaves ties at -100; what does not depend on it is identical."""
    chain.done(chain.run(ort_graphs, tiny_data, tmp_path / "outputs", "--k-test", 5))
    wanted = expected(0, tiny_data, 5)
    assert max(differences(tmp_path / "outputs", wanted).values()) <= TOLERANCE
    found, original = metrics(tmp_path / "outputs", tiny_data), itm_eval(wanted.i2t, wanted.t2i, owners(tiny_data))
    for name in ("txt_r1", "txt_r5", "img_r1", "img_r5"):
        assert found[name] == pytest.approx(original[name], abs=1e-9)


def test_scores_are_spread(tiny_data: Path) -> None:
    """Equality would say little if all scores were alike, or if the picture did not matter to them."""
    wanted = expected(0, tiny_data, LARGER)
    assert wanted.i2t.std(axis=0).mean() > 0.1  # of one caption over the pictures; measured 0.52
    assert wanted.i2t.std(axis=1).mean() > 0.1  # of one picture over the captions; measured 0.30
    assert wanted.sims.std() > 0.05  # measured 0.14


@pytest.mark.parametrize(
    "name",
    [
        "visual_encoder.blocks.1.attn.qkv.weight",
        "text_encoder.encoder.layer.1.crossattention.self.value.weight",
        "text_encoder.embeddings.word_embeddings.weight",
        "vision_proj.bias",
        "itm_head.bias",
    ],
)
def test_the_comparison_sees_one_wrong_weight(ort_graphs: Path, tiny_data: Path, tmp_path: Path, name: str) -> None:
    chain.done(chain.run(ort_graphs, tiny_data, tmp_path / "outputs", "--k-test", LARGER))
    other = random_model()
    dict(other.named_parameters())[name].data.view(-1)[-1] += 0.05  # of the words, that is [ENC]
    found = differences(tmp_path / "outputs", theirs(other, tiny_data, LARGER))
    assert max(found.values()) > TOLERANCE, found


def change_cls(found: Any) -> Any:
    """[CLS] left in place, as transformers' own example and BLIP's demo do."""
    return dataclasses.replace(found, protocol={**found.protocol, "encode_id": 2})


def test_the_comparison_sees_a_missing_enc(
    ort_graphs: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Callable[..., Any] = read_data
    monkeypatch.setattr("runtime.retrieval.read_retrieval", lambda *args: change_cls(read(*args)))
    chain.done(chain.run(ort_graphs, tiny_data, tmp_path / "outputs", "--k-test", LARGER))
    assert differences(tmp_path / "outputs", expected(0, tiny_data, LARGER))["itm_logits"] > TOLERANCE


def test_half_precision_features(ort_graphs: Path, tiny_data: Path, tmp_path: Path) -> None:
    """--feat-dtype float16 rounds what the ITM graphs read, and nothing else."""
    chain.done(chain.run(ort_graphs, tiny_data, tmp_path / "outputs", "--k-test", LARGER, "--feat-dtype", "float16"))
    found = differences(tmp_path / "outputs", expected(0, tiny_data, LARGER))
    assert np.load(tmp_path / "outputs" / "image_feat.npy").dtype == np.float16
    assert read_retrieval(tmp_path / "outputs").run["backend"]["feat_dtype"] == "float16"
    # Measured: features 1.2e-3 (half a step of float16 above 4 is 2e-3), logits and scores 7.4e-4; embeddings as before.
    assert 1e-5 < found["image_feat"] < 3e-3
    assert 1e-5 < found["itm_logits"] < 3e-3
    assert max(found[name] for name in ("image_embed", "text_embed", "pair_sim")) <= TOLERANCE


def test_scores_are_logit_and_similarity(ort_graphs: Path, tiny_data: Path, tmp_path: Path) -> None:
    chain.done(chain.run(ort_graphs, tiny_data, tmp_path / "outputs", "--k-test", SMALLER))
    found = read_retrieval(tmp_path / "outputs")
    np.testing.assert_array_equal(scores(found), found.itm_logits[:, 1] + found.pair_sim[:])


@pytest.mark.slow
def test_full_base_size(tmp_path: Path) -> None:
    """ViT-B/16 at 384 pixels and BERT-base; only the vocabulary is short, which no number depends on."""
    config = BlipConfig(VIT_B, dataclasses.replace(MED, vocab=TINY.text.vocab), protocol=Protocol(k_test=4))
    model = random_model(config, seed=2, std=0.05)
    graphs = chain.export_graphs(tmp_path / "base", *NEEDED, model=model)
    data = chain.prepare(tmp_path, graphs, seed=2, own=(1, 3, 2))
    chain.done(chain.run(graphs, data, tmp_path / "outputs", "--batchsize", 2))
    found = differences(tmp_path / "outputs", theirs(model, data, 4))
    # Measured: 2.6e-7 (picture embeddings), 4.7e-7 (caption embeddings), 5.4e-6 (features), 2.4e-6 (logits and scores).
    assert max(found.values()) <= TOLERANCE, found
