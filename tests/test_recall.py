"""Recall from sparse pairs against a plain reading of the original's evaluation over dense matrices."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from models.errors import UserError
from models.manifest import Manifest
from postprocess import recall
from postprocess.recall import NO_ANSWER, NOT_FOUND, Pairs, Ranking
from runtime.outputs import I2T, T2I, RetrievalOutputs


def dense_recall(
    i2t: np.ndarray, t2i: np.ndarray, image_of_text: np.ndarray, kind: Literal["stable"] | None = None
) -> dict[str, float]:
    """What salesforce/BLIP train_retrieval.py `itm_eval` computes, written down anew: full matrices, one query at a time.

    `kind` "stable" makes the order among equal scores definite; the original leaves it to numpy's default sort.
    """
    best = []
    for picture, row in enumerate(i2t):
        order = list(np.argsort(row, kind=kind)[::-1])
        best.append(min(order.index(caption) for caption in np.flatnonzero(image_of_text == picture)))
    found = [list(np.argsort(row, kind=kind)[::-1]).index(image_of_text[caption]) for caption, row in enumerate(t2i)]
    values = {}
    for side, rank in (("txt", np.array(best)), ("img", np.array(found))):
        for k in (1, 5, 10):
            values[f"{side}_r{k}"] = 100.0 * len(np.where(rank < k)[0]) / len(rank)
        values[f"{side}_r_mean"] = (values[f"{side}_r1"] + values[f"{side}_r5"] + values[f"{side}_r10"]) / 3
    values["r_mean"] = (values["txt_r_mean"] + values["img_r_mean"]) / 2
    values["agg_metrics"] = values["txt_r_mean"]
    return values


def dense_pairs(scores: np.ndarray, query_image: np.ndarray, item_image: np.ndarray) -> Pairs:
    """Every cell of a matrix as a pair."""
    query, item = np.nonzero(np.ones(scores.shape))
    return Pairs(query, item, scores.reshape(-1), query_image, item_image)


def outputs_of(arrays: dict[str, np.ndarray]) -> RetrievalOutputs:
    return RetrievalOutputs(Manifest(Path("outputs"), "outputs", {}, {}, {}), **arrays)


def random_run(random: np.random.Generator, k_test: int | None, levels: int | None = None) -> tuple[RetrievalOutputs, np.ndarray]:
    """A run over a few pictures with unequal numbers of captions. `levels` makes scores collide."""
    own = random.integers(1, 8, random.integers(2, 40))
    image_of_text = random.permutation(np.repeat(np.arange(len(own)), own))
    images, texts = (random.normal(size=(n, 6)).astype(np.float32) for n in (len(own), len(image_of_text)))
    sim = images @ texts.T  # (N, M)
    bits = np.zeros(sim.shape, np.uint8)
    k = k_test or sim.size
    for picture, row in enumerate(sim):
        bits[picture, np.argsort(-row)[:k]] |= I2T
    for caption, column in enumerate(sim.T):
        bits[np.argsort(-column)[:k], caption] |= T2I
    image, text = np.nonzero(bits)
    match = random.normal(size=len(image)) * 2 + (image_of_text[text] == image)
    pair_sim = sim[image, text]
    if levels:
        match, pair_sim = np.round(match * levels), np.zeros_like(pair_sim)
    arrays: dict[str, np.ndarray] = {
        "image_embed": images,
        "text_embed": texts,
        "pair_image": image.astype(np.int32),
        "pair_text": text.astype(np.int32),
        "pair_direction": bits[image, text],
        "pair_sim": pair_sim,
        "itm_logits": np.stack([-match, match], 1).astype(np.float32),
    }
    return outputs_of(arrays), image_of_text


def test_golden_values() -> None:
    """The definition in three code bases (BLIP, mindformers, the Ascend recipe) gives these on this random set."""
    random = np.random.default_rng(0)
    i2t, t2i = random.normal(size=(20, 100)), random.normal(size=(100, 20))
    pictures, image_of_text = np.arange(20), np.repeat(np.arange(20), 5)
    own = pictures[:, None] == image_of_text
    i2t[own] += 1.5
    t2i[own.T] += 1.5
    ranking = Ranking(
        recall.ranks(dense_pairs(i2t, pictures, image_of_text)), recall.ranks(dense_pairs(t2i, image_of_text, pictures))
    )
    values = recall.metrics(ranking)
    assert (values["txt_r1"], values["txt_r5"], values["txt_r10"]) == (65, 90, 95)
    assert (values["img_r1"], values["img_r5"], values["img_r10"]) == (32, 79, 95)
    assert [round(values[name], 4) for name in ("txt_r_mean", "img_r_mean", "r_mean", "agg_metrics")] == [
        83.3333,
        68.6667,
        76,
        83.3333,
    ]


@pytest.mark.parametrize("seed", range(50))
def test_equals_the_dense_evaluation(seed: int) -> None:
    """k_test in 10 .. far beyond the set: every metric is identical, not just close."""
    random = np.random.default_rng(seed)
    outputs, image_of_text = random_run(random, (10, 16, 1000, None)[seed % 4])
    found = recall.assess(outputs, image_of_text)
    assert recall.metrics(found.reranked) == dense_recall(*recall.score_matrices(outputs), image_of_text)


@pytest.mark.parametrize("seed", range(20))
def test_equal_scores_put_the_higher_index_first(seed: int) -> None:
    outputs, image_of_text = random_run(np.random.default_rng(seed), (12, None)[seed % 2], levels=1)
    assert len(np.unique(outputs.itm_logits[:, 1])) < 20  # most scores collide
    want = dense_recall(*recall.score_matrices(outputs), image_of_text, "stable")
    assert recall.metrics(recall.assess(outputs, image_of_text).reranked) == want


@pytest.mark.parametrize("k_test", [1, 3, 5, 7])
def test_recall_up_to_a_small_k_test_equals_the_dense_evaluation(k_test: int) -> None:
    """Beyond k_test the original counts items tied at -100 in the order of an unstable sort; here they are not found."""
    outputs, image_of_text = random_run(np.random.default_rng(k_test), k_test)
    values = recall.metrics(recall.assess(outputs, image_of_text).reranked)
    want = dense_recall(*recall.score_matrices(outputs), image_of_text)
    for side in ("txt", "img"):
        for k in (k for k in recall.CUTS if k <= k_test):
            assert values[f"{side}_r{k}"] == want[f"{side}_r{k}"]


def test_a_small_k_test_finds_nothing_beyond_it() -> None:
    outputs, image_of_text = random_run(np.random.default_rng(3), 1)
    reranked = recall.assess(outputs, image_of_text).reranked
    for rank in (reranked.txt, reranked.img):
        assert set(rank.tolist()) == {0, NOT_FOUND}
        assert recall.recall_at(rank, 1) == recall.recall_at(rank, 10) < 100


@pytest.mark.parametrize("seed", range(10))
def test_itc_equals_the_dense_evaluation_in_any_block(seed: int) -> None:
    outputs, image_of_text = random_run(np.random.default_rng(seed), None)
    images, texts = np.asarray(outputs.image_embed), np.asarray(outputs.text_embed)
    sim = images @ texts.T
    want = dense_recall(sim, sim.T, image_of_text)
    pictures = np.arange(len(images))
    for cells in (1, 3 * len(texts), 1 << 20):  # a row at a time, a few rows, all at once
        ranking = Ranking(
            recall.itc_ranks(images, texts, pictures, image_of_text, cells),
            recall.itc_ranks(texts, images, image_of_text, pictures, cells),
        )
        assert recall.metrics(ranking) == want


@pytest.mark.parametrize("seed", range(10))
def test_itc_of_several_queries_equals_the_dense_evaluation_in_any_block(seed: int) -> None:
    """BLIP-2: the best of the picture's queries counts, in both directions."""
    outputs, image_of_text = random_run(np.random.default_rng(seed), None)
    texts = np.asarray(outputs.text_embed)
    images = np.random.default_rng(seed).normal(size=(len(outputs.image_embed), 3, texts.shape[1])).astype(np.float32)
    sim = np.einsum("nqe,me->nqm", images, texts).max(axis=1)
    want = dense_recall(sim, sim.T, image_of_text)
    found = recall.assess(dataclasses.replace(outputs, image_embed=images), image_of_text)
    assert recall.metrics(found.itc) == want
    for cells in (1, 3 * len(texts), 1 << 20):
        ranking = Ranking(
            recall.itc_ranks(images, texts, np.arange(len(images)), image_of_text, cells),
            recall.itc_ranks(texts, images, image_of_text, np.arange(len(images)), cells),
        )
        assert recall.metrics(ranking) == want
    assert not np.array_equal(sim, images[:, 0] @ texts.T)  # the first query alone would be another evaluation


def test_scores_that_say_nothing_give_the_chance_level() -> None:
    """One score for everything: an order by index, in which a query finds its answer as often as by luck, never always."""
    pictures, image_of_text = np.arange(40), np.repeat(np.arange(40), 5)
    equal = np.zeros((40, 200), np.float32)
    txt = recall.ranks(dense_pairs(equal, pictures, image_of_text))
    img = recall.ranks(dense_pairs(equal.T, image_of_text, pictures))
    assert recall.recall_at(txt, 1) == recall.recall_at(img, 1) == 100 / 40
    embed = np.ones((200, 4), np.float32)
    np.testing.assert_array_equal(recall.itc_ranks(embed[:40], embed, pictures, image_of_text), txt)
    np.testing.assert_array_equal(recall.itc_ranks(embed, embed[:40], image_of_text, pictures), img)


def test_chance_is_what_random_orders_reach() -> None:
    random = np.random.default_rng(0)
    image_of_text = np.repeat(np.arange(12), [1, 2, 3, 4] * 3)
    expected = recall.chance(image_of_text, 12)
    rounds, pictures = 400, np.arange(12)
    sums = dict.fromkeys(expected, 0.0)
    for _ in range(rounds):
        scores = random.normal(size=(12, 30))
        ranking = Ranking(
            recall.ranks(dense_pairs(scores, pictures, image_of_text)),
            recall.ranks(dense_pairs(scores.T, image_of_text, pictures)),
        )
        for name, value in recall.metrics(ranking).items():
            sums[name] += value / rounds
    # 400 rounds of 12 pictures: one standard deviation of a mean is at most 50 / sqrt(4800) = 0.72 percent points.
    for name, value in expected.items():
        assert sums[name] == pytest.approx(value, abs=2.2), name
    assert recall.chance(np.array([0, 0]), 1) == dict.fromkeys(expected, 100.0)
    assert expected["img_r1"] == pytest.approx(100 / 12)


def test_pictures_without_captions_are_not_asked() -> None:
    image_of_text = np.array([0, 0, 2])
    pictures = np.arange(3)
    scores = np.array([[1.0, 0, 2], [3, 3, 3], [0, 0, 1]])
    txt = recall.ranks(dense_pairs(scores, pictures, image_of_text))
    assert txt.tolist() == [1, NO_ANSWER, 0]
    assert recall.recall_at(txt, 1) == 50
    assert recall.itc_ranks(np.eye(3), np.eye(3), pictures, image_of_text).tolist()[1] == NO_ANSWER
    with pytest.raises(ValueError, match="no queries"):
        recall.recall_at(txt[1:2], 1)


def test_curve_passes_through_the_metrics_and_never_falls() -> None:
    outputs, image_of_text = random_run(np.random.default_rng(3), None)
    ranking = recall.assess(outputs, image_of_text).reranked
    values, curve = recall.metrics(ranking), recall.curve(ranking.img, 30)
    assert [curve[k - 1] for k in recall.CUTS] == [values[f"img_r{k}"] for k in recall.CUTS]
    assert curve == sorted(curve)
    assert len(curve) == 30


def test_names_of_both_recipes() -> None:
    values = recall.chance(np.array([0, 1]), 2)
    parts = ("r1", "r5", "r10", "r_mean")
    blip = [f"{side}_{part}" for side in ("txt", "img") for part in parts]
    assert list(recall.rename(values, "blip")) == [*blip, "r_mean", "agg_metrics"]
    ascend = recall.rename(values, "ascend")
    assert list(ascend) == [*(f"{side}_{part}" for side in ("text", "image") for part in parts), "r_mean"]
    assert ascend["image_r_mean"] == values["img_r_mean"]


def test_score_matrices_hold_each_pair_where_it_was_asked_for() -> None:
    outputs, image_of_text = random_run(np.random.default_rng(8), 3)
    i2t, t2i = recall.score_matrices(outputs)
    assert i2t.shape == t2i.T.shape == (len(outputs.image_embed), len(image_of_text))
    assert (np.count_nonzero(i2t != -100, axis=1) == min(3, i2t.shape[1])).all()
    assert (np.count_nonzero(t2i != -100, axis=1) == min(3, t2i.shape[1])).all()
    both = (i2t != -100) & (t2i.T != -100)
    assert both.any()
    np.testing.assert_array_equal(i2t[both], t2i.T[both])  # scored once


def test_score_matrices_refuse_a_size_that_memory_may_not_hold() -> None:
    empty = {
        name: np.zeros((0, 2), np.float32) for name in ("pair_image", "pair_text", "pair_direction", "pair_sim", "itm_logits")
    }
    embeds = {"image_embed": np.zeros((5000, 1)), "text_embed": np.zeros((25010, 1))}
    with pytest.raises(UserError, match="125,050,000 cells"):
        recall.score_matrices(outputs_of({**empty, **embeds}))


def test_a_large_set_needs_no_matrix() -> None:
    """400,000 pairs of 200,000 pictures and as many captions: a dense matrix would be 160 GB."""
    random = np.random.default_rng(0)
    count = 200_000
    query = np.repeat(np.arange(count), 2)
    item = np.stack([np.arange(count), (np.arange(count) + 1) % count], 1).reshape(-1)  # the right one, a wrong one
    score = random.normal(size=2 * count).astype(np.float32)
    rank = recall.ranks(Pairs(query, item, score, np.arange(count), np.arange(count)))
    pair = score.reshape(-1, 2)
    right_item, wrong_item = np.arange(count), (np.arange(count) + 1) % count
    behind = (pair[:, 1] > pair[:, 0]) | ((pair[:, 1] == pair[:, 0]) & (wrong_item > right_item))
    np.testing.assert_array_equal(rank, behind.astype(np.int64))
