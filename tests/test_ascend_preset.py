"""`--as ascend-modelzoo`: the Ascend recipe's retrieval by one option for each step, and what k_test 20 does to a figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import postprocess.__main__
import preprocess.__main__
import runtime.__main__
from models.errors import Misuse
from models.recipe import ASCEND_MODELZOO, RECIPES, departures, recipe, wanted
from postprocess import recall
from preprocess.dataset import read_retrieval as read_data
from runtime.outputs import I2T, T2I, RetrievalOutputs, read_retrieval
from tests import chain
from tests.retrieval_run import make_run
from tests.test_recall import dense_recall, outputs_of
from tests.tiny import TINY2, random_blip2

AS = ("--as", ASCEND_MODELZOO)
# As BLIP_postprocess.py of the recipe prints them.
NAMES = ["text_r1", "text_r5", "text_r10", "text_r_mean", "image_r1", "image_r5", "image_r10", "image_r_mean", "r_mean"]


@pytest.fixture(scope="module")
def data(ort_graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain.prepare(tmp_path_factory.mktemp("as"), ort_graphs, *AS)


def prepared(folder: Path, graphs: Path, *options: object) -> tuple[Path, str]:
    """As chain.prepare; and what was said on stderr."""
    named = ("--annotations", chain.write_pictures(folder), "--images", folder / "images", "--graphs", graphs)
    result = chain.call(preprocess.__main__.main, "retrieval", *named, "--out", folder / "data", "--workers", 1, *options)
    chain.done(result)
    return folder / "data", result.stderr


def warnings(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("Warning:")]


# The vocabulary


def test_the_recipe_is_what_its_scripts_do() -> None:
    found = recipe(ASCEND_MODELZOO)
    assert (found.interpolation, found.max_words, found.max_length, found.k_test, found.keys) == (
        "bilinear",
        30,
        35,
        20,
        "ascend",
    )


def test_what_was_asked_for_counts() -> None:
    assert wanted(ASCEND_MODELZOO, "k_test", None) == 20
    assert wanted(ASCEND_MODELZOO, "k_test", 7) == 7
    assert wanted(None, "k_test", 7) == 7
    assert wanted(None, "k_test", None) is None
    assert departures(ASCEND_MODELZOO, {"k_test": 20, "mean": 0}) == departures(None, {"k_test": 7}) == []
    assert departures(ASCEND_MODELZOO, {"k_test": 7}) == ["Warning: k_test is 7, which is not as ascend-modelzoo has it, 20."]


def test_an_unknown_recipe_is_misuse(tmp_path: Path) -> None:
    with pytest.raises(Misuse, match="no evaluation 'modelzoo' to follow; there is: ascend-modelzoo"):
        recipe("modelzoo")
    with pytest.raises(Misuse, match="modelzoo"):
        wanted("modelzoo", "k_test", None)
    for command, words in (
        (preprocess.__main__.main, ("retrieval", "--annotations", "a.json", "--images", "i")),
        (runtime.__main__.main, ("retrieval",)),
        (postprocess.__main__.main, ("--recall",)),
    ):
        said = chain.refusal(chain.call(command, *words, "--as", "modelzoo", "--out", tmp_path / "o"), code=2)
        assert "'modelzoo' is not" in said
        assert set(RECIPES) <= set(said.replace("'", " ").replace(".", " ").split())
    assert not list(tmp_path.iterdir())


def test_it_is_of_retrieval_alone() -> None:
    said = chain.refusal(chain.call(postprocess.__main__.main, "--top1", *AS), code=2)
    assert said == "--as belongs to --recall; leave it out with --top1."


# Each step


def test_pictures_are_bilinear(ort_graphs: Path, data: Path, tmp_path: Path) -> None:
    usual = chain.prepare(tmp_path / "usual", ort_graphs)
    asked = chain.prepare(tmp_path / "asked", ort_graphs, "--interpolation", "bilinear")
    assert read_data(data).protocol["interpolation"] == "bilinear"
    np.testing.assert_array_equal(np.load(data / "img.npy"), np.load(asked / "img.npy"))
    assert np.abs(np.load(data / "img.npy") - np.load(usual / "img.npy")).max() > 0.01
    for name in ("ids", "mask"):  # 30 words and 35 tokens are BLIP's own
        np.testing.assert_array_equal(np.load(data / f"{name}.npy"), np.load(usual / f"{name}.npy"))


def test_another_interpolation_is_taken_and_said(ort_graphs: Path, tmp_path: Path) -> None:
    made, said = prepared(tmp_path, ort_graphs, *AS, "--interpolation", "bicubic")
    assert said == "Warning: interpolation is bicubic, which is not as ascend-modelzoo has it, bilinear.\n"
    assert read_data(made).protocol["interpolation"] == "bicubic"


def test_what_follows_the_recipe_has_no_word_of_it(ort_graphs: Path, tmp_path: Path) -> None:
    """But that it departs from the model's own protocol, as without the option."""
    _, said = prepared(tmp_path, ort_graphs, *AS)
    assert said == "Warning: bilinear deviates from the model's protocol, bicubic; the figures will differ.\n"


def test_graphs_for_longer_captions_settle_their_length(tmp_path: Path) -> None:
    graphs = chain.export_graphs(tmp_path, "--graphs", "text_embed", model=random_blip2(TINY2))
    made, said = prepared(tmp_path, graphs, *AS, "--interpolation", "bilinear")
    assert "Warning: max_words is 50, which is not as ascend-modelzoo has it, 30." in said.splitlines()
    assert read_data(made).protocol["max_words"] == 50


def test_twenty_candidates(ort_graphs: Path, data: Path, tmp_path: Path) -> None:
    printed = chain.done(chain.run(ort_graphs, data, tmp_path / "as", *AS))
    assert not warnings(printed)
    assert "pairs at k_test 20: 280 for the pictures, 490 for the captions" in printed  # of 14 and 35, and there are 14 pictures
    chain.done(chain.run(ort_graphs, data, tmp_path / "asked", "--k-test", 20))
    for name in ("pair_image", "pair_text", "itm_logits"):
        np.testing.assert_array_equal(np.load(tmp_path / "as" / f"{name}.npy"), np.load(tmp_path / "asked" / f"{name}.npy"))
    assert read_retrieval(tmp_path / "as").run["k_test"] == 20


def test_other_candidates_and_other_pictures_are_taken_and_said(ort_graphs: Path, tmp_path: Path) -> None:
    bicubic = chain.prepare(tmp_path, ort_graphs)
    printed = chain.done(chain.run(ort_graphs, bicubic, tmp_path / "o", *AS, "--k-test", 6))
    assert warnings(printed) == [
        "Warning: interpolation is bicubic, which is not as ascend-modelzoo has it, bilinear.",
        "Warning: k_test is 6, which is not as ascend-modelzoo has it, 20.",
    ]
    assert read_retrieval(tmp_path / "o").run["k_test"] == 6


def test_the_report_has_its_names_and_the_deviations(ort_graphs: Path, data: Path, tmp_path: Path) -> None:
    chain.done(chain.run(ort_graphs, data, tmp_path / "outputs", *AS))
    printed, report = posted(tmp_path, *AS)
    assert list(report["metrics"]["reranked"]) == NAMES
    assert f"eval_result: {report['metrics']['reranked']}" in printed
    by_keys = posted(tmp_path, "--keys", "ascend")[1]
    assert (report["metrics"], report["keys"]) == (by_keys["metrics"], by_keys["keys"])
    assert report["deviations"] == [
        {"name": "interpolation", "model": "bicubic", "used": "bilinear"},
        {"name": "k_test", "model": 5, "used": 20},
    ]


def test_other_names_are_taken_and_said(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    result = chain.call(
        *(postprocess.__main__.main, "--recall", "--outputs", run.outputs, "--out", tmp_path / "r", *AS, "--keys", "blip")
    )
    assert "'txt_r1'" in chain.done(result)
    assert result.stderr == "Warning: keys is blip, which is not as ascend-modelzoo has it, ascend.\n"


def posted(folder: Path, *options: object) -> tuple[str, dict[str, Any]]:
    """What blip-post prints of the outputs in `folder`, and report.json."""
    named = ("--recall", "--outputs", folder / "outputs", "--out", folder / "report")
    printed = chain.done(chain.call(postprocess.__main__.main, *named, *options))
    return printed, json.loads((folder / "report" / "report.json").read_text("utf-8"))


# What 20 candidates do to a figure


def evaluated(k_test: int, seed: int = 0, pictures: int = 60) -> tuple[np.ndarray, np.ndarray, RetrievalOutputs, np.ndarray]:
    """As the recipe scores: every row of -100 but for the k best by similarity, which have their ITM logit and the similarity.
    Five captions a picture. Returns i2t (N, M), t2i (M, N), the same pairs as our outputs/, and each caption's picture."""
    random = np.random.default_rng(seed)
    image_of_text = np.repeat(np.arange(pictures), 5)
    images = random.normal(size=(pictures, 8)).astype(np.float32)
    texts = (images[image_of_text] + 1.5 * random.normal(size=(5 * pictures, 8))).astype(np.float32)
    sim = images @ texts.T
    logit = (sim + 3 * random.normal(size=sim.shape)).astype(np.float32)
    i2t, t2i = np.full(sim.shape, -100, np.float32), np.full(sim.T.shape, -100, np.float32)
    bits = np.zeros(sim.shape, np.uint8)
    for picture in range(pictures):
        best = np.argsort(-sim[picture])[:k_test]
        i2t[picture, best] = logit[picture, best] + sim[picture, best]
        bits[picture, best] |= I2T
    for caption in range(len(texts)):
        best = np.argsort(-sim[:, caption])[:k_test]
        t2i[caption, best] = logit[best, caption] + sim[best, caption]
        bits[best, caption] |= T2I
    image, text = np.nonzero(bits)
    arrays = {
        "image_embed": images,
        "text_embed": texts,
        "pair_image": image,
        "pair_text": text,
        "pair_direction": bits[image, text],
        "pair_sim": sim[image, text],
        "itm_logits": np.stack([-logit[image, text], logit[image, text]], 1),
    }
    return i2t, t2i, outputs_of(arrays), image_of_text


def shuffled(matrix: np.ndarray, seed: int) -> np.ndarray:
    """The same with the order among the -100 drawn: what an unstable sort may make of it."""
    return np.where(matrix == -100, matrix - np.random.default_rng(seed).random(matrix.shape), matrix)


@pytest.mark.parametrize("seed", range(10))
def test_recall_at_20_candidates_is_the_recipes(seed: int) -> None:
    """To the last digit, whatever the order of what was not re-ranked, though right answers are among that."""
    i2t, t2i, outputs, image_of_text = evaluated(20, seed)
    ranking = recall.assess(outputs, image_of_text).reranked
    assert (ranking.img == recall.NOT_FOUND).any()
    ours = recall.metrics(ranking)
    for order in range(3):
        assert dense_recall(shuffled(i2t, order), shuffled(t2i, order), image_of_text) == ours
    assert list(recall.rename(ours, "ascend")) == NAMES


def test_below_ten_candidates_the_recipes_own_figure_is_open() -> None:
    """The control of the above: at k_test 5 what stands at -100 reaches into R@10, and only there."""
    i2t, t2i, outputs, image_of_text = evaluated(5)
    ours = recall.metrics(recall.assess(outputs, image_of_text).reranked)
    theirs = [dense_recall(shuffled(i2t, order), shuffled(t2i, order), image_of_text) for order in range(5)]
    assert {(found["txt_r1"], found["txt_r5"], found["img_r1"], found["img_r5"]) for found in theirs} == {
        (ours["txt_r1"], ours["txt_r5"], ours["img_r1"], ours["img_r5"])
    }
    tenth = {found["img_r10"] for found in theirs}
    assert len(tenth) > 1
    assert min(tenth) >= ours["img_r10"]


def test_more_candidates_find_more() -> None:
    """Why 20 is not the model's 256: an answer that similarity puts at place 21 is lost to re-ranking."""
    found = [
        (recall.assess(outputs, own).reranked.img == recall.NOT_FOUND).sum() for *_, outputs, own in map(evaluated, (20, 60))
    ]
    assert found[0] > 0
    assert found[1] == 0
