"""Greedy decoding is transformers' word for word; drawing has its distribution, and depends on the seed and the prompt alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from models.errors import Misuse, UserError
from runtime.decode import ORIGINAL, ORIGINAL_BLIP, TRANSFORMERS, Decoding, Generated, Steps, check, generate
from runtime.decoding import RULES
from runtime.logits import keep_top_k, keep_top_p, log_softmax, penalise
from tests.uncached import Table, Uncached, language_model, read_language_model, read_t5, t5, table_model, up_to_stop

BOS = np.array([[0]])


def fixed(*row: float, count: int = 1) -> Uncached:
    """Prompts for which every word has the same logits, whatever was before."""
    return Uncached(count, lambda _, texts: np.tile(np.array(row, np.float32), (len(texts), 1)))


def one(steps: Steps, options: Decoding, stop_ids: tuple[int, ...] = (), counted: np.ndarray = BOS) -> Generated:
    (texts,) = generate(steps, counted, stop_ids, options)
    return texts[0]


# Greedy


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize(("least", "penalty"), [(0, 1.0), (10, 1.0), (0, 1.3), (10, 0.7)])
def test_greedy_is_transformers(kind: str, least: int, penalty: float) -> None:
    model = language_model(kind)
    ids = torch.tensor([[1, 1, 2, 14], [2, 9, 30, 11], [1, 2, 9, 41]])
    mask = (ids != 1).long()
    steps = Uncached(3, read_language_model(model, ids, mask))
    options = Decoding(max_length=18, min_length=least, repetition_penalty=penalty)
    texts = generate(steps, torch.where(mask == 1, ids, -1).numpy(), (3, 7), options)
    theirs = model.generate(
        ids,
        attention_mask=mask,
        max_length=18,
        min_length=least,
        repetition_penalty=penalty,
        eos_token_id=[3, 7],
        pad_token_id=1,
        do_sample=False,
    )
    for (text,), row in zip(texts, theirs[:, 4:].tolist(), strict=True):
        assert (list(text.ids), text.stopped) == up_to_stop(row, (3, 7))


def test_greedy_t5_is_transformers() -> None:
    model = t5()
    ids = torch.tensor([[5, 9, 12, 1], [8, 1, 0, 0]])
    mask = (ids != 0).long()
    texts = generate(Uncached(2, read_t5(model, ids, mask)), np.zeros((2, 1), np.int64), (1, 24), Decoding(max_length=14))
    theirs = model.generate(ids, attention_mask=mask, max_length=14, eos_token_id=[1, 24], do_sample=False)
    for (text,), row in zip(texts, theirs[:, 1:].tolist(), strict=True):
        assert (list(text.ids), text.stopped) == up_to_stop(row, (1, 24))


def test_greedy_over_tables_is_transformers() -> None:
    seen = set()
    for seed in range(40):
        table = Table(seed, 25, (5, 6), 2.0)
        counted = np.random.default_rng(seed).integers(9, 25, (3, 1 + seed % 4))
        options = Decoding(max_length=20, min_length=seed % 9, repetition_penalty=(1.0, 1.3, 0.8)[seed % 3])
        texts = generate(table.steps(counted), counted, (5, 6), options)
        theirs = table_model(table).generate(
            torch.from_numpy(counted),
            attention_mask=torch.ones(counted.shape, dtype=torch.int64),
            max_length=20,
            min_length=options.min_length,
            repetition_penalty=options.repetition_penalty,
            eos_token_id=[5, 6],
            pad_token_id=0,
            do_sample=False,
            use_cache=False,
        )
        for (text,), row in zip(texts, theirs[:, counted.shape[1] :].tolist(), strict=True):
            assert (list(text.ids), text.stopped) == up_to_stop(row, (5, 6))
            seen.add(text.stopped)
    assert seen == {True, False}


def test_one_beam_is_greedy_under_every_rule() -> None:
    table, counted = Table(0, 25, (5,), 1.0), np.array([[9], [14]])
    texts = [generate(table.steps(counted), counted, (5,), Decoding(max_length=9, rule=rule)) for rule in RULES]
    assert texts[0] == texts[1] == texts[2]


def test_score_is_what_the_model_gives_the_words() -> None:
    """Before penalty and minimum length, and with the stop word."""
    table = Table(1, 25, (5,), 4.0)
    counted = np.array([[9, 11]])
    text = one(table.steps(counted), Decoding(max_length=12, min_length=5, repetition_penalty=1.4), (5,), counted)
    assert text.stopped
    words, total = [*text.ids, 5], 0.0
    for place, word in enumerate(words):
        row = torch.from_numpy(table.logits(np.array([[9, 11, *words[:place]]]))[0])
        total += float(torch.log_softmax(row, 0)[word])
    assert text.score == pytest.approx(total, rel=1e-6)  # measured: 1e-7


def test_equal_words_give_the_lower() -> None:
    assert one(fixed(0.0, 2.0, 2.0), Decoding(max_length=3)).ids == (1, 1)


def test_stop_at_once_and_not_before_the_minimum() -> None:
    assert one(fixed(0.0, 1.0, 9.0), Decoding(max_length=6), (2,)) == Generated((), pytest.approx(-0.00046, abs=1e-5), True)
    assert one(fixed(0.0, 1.0, 9.0), Decoding(max_length=6, min_length=4), (2,)).ids == (1, 1, 1)
    none = one(fixed(0.0, 1.0, 9.0), Decoding(max_length=6, min_length=6), (2,))
    assert (none.ids, none.stopped) == ((1, 1, 1, 1, 1), False)


def test_nothing_before_the_first_word() -> None:
    text = one(fixed(0.0, 1.0, 9.0), Decoding(max_length=6), (2,), np.zeros((1, 0), np.int64))
    assert (text.ids, text.stopped) == ((), True)


def test_padding_is_no_word() -> None:
    """-1, or any id that the vocabulary has not, is neither penalised nor taken for the last word."""
    scores = np.array([[[2.0, -2.0, 4.0]]], np.float32)
    penalise(scores, np.array([[[-1, 0, 1, 0, 7]]]), 2.0)
    assert scores.tolist() == [[[1.0, -4.0, 4.0]]]


def test_finished_prompts_cost_nothing() -> None:
    table = Table(3, 25, (5,), 3.0)
    counted = np.arange(9, 17)[:, None]
    steps, told = table.steps(counted), list[int]()
    texts = generate(steps, counted, (5,), Decoding(max_length=30), told.append)
    assert steps.asked == told
    assert sum(told) == sum(len(text.ids) + text.stopped for (text,) in texts)
    assert 0 < steps.asked[-1] < steps.asked[0] == 8


def test_no_prompts() -> None:
    assert generate(fixed(0.0, count=0), np.zeros((0, 1), np.int64), (), Decoding(max_length=3)) == []


# Drawing

DRAWN = Decoding(max_length=2, do_sample=True, num_return=4000, seed=7)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.8},
    ],
    ids=str,
)
def test_distribution_is_transformers(how: dict[str, Any]) -> None:
    """Against the exact probabilities that its own warpers leave: chi-square, the 99.9 % quantile."""
    row = [1.3, -0.4, 0.9, 2.1, -1.5, 0.2, 1.1, -0.3]
    scores = torch.tensor([row])
    for name, warper in [("temperature", TemperatureLogitsWarper), ("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper)]:
        if name in how:
            scores = warper(how[name])(None, scores)
    wanted = 4000 * scores.softmax(1)[0].double().numpy()
    (texts,) = generate(fixed(*row), BOS, (), dataclasses.replace(DRAWN, **how))
    found = np.bincount([text.ids[0] for text in texts], minlength=8)
    assert not found[wanted == 0].any()
    assert chi_square(found, wanted) < {2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 7: 24.3}[np.count_nonzero(wanted) - 1]


def test_another_distribution_is_seen() -> None:
    row = np.array([1.3, -0.4, 0.9, 2.1, -1.5, 0.2, 1.1, -0.3])
    (texts,) = generate(fixed(*row), BOS, (), dataclasses.replace(DRAWN, temperature=1.15))
    found = np.bincount([text.ids[0] for text in texts], minlength=8)
    assert chi_square(found, 4000 * np.exp(row) / np.exp(row).sum()) > 24.3


def chi_square(found: np.ndarray, wanted: np.ndarray) -> float:
    some = wanted > 0
    return float(((found[some] - wanted[some]) ** 2 / wanted[some]).sum())


def test_each_sequence_goes_on_by_itself() -> None:
    """The second word is drawn from what the first one leaves: all 9 pairs of 3 words, and the score is the pair's own."""
    first, second = np.array([0.5, 0.0, 1.0]), np.array([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [-1.0, 3.0, 0.0]])
    steps = Uncached(1, lambda _, texts: (second[texts[:, -1]] if texts.shape[1] else first[None]).astype(np.float32))
    (texts,) = generate(steps, BOS, (), dataclasses.replace(DRAWN, max_length=3))
    odds = np.exp(first - np.log(np.exp(first).sum()))[:, None] * np.exp(second) / np.exp(second).sum(axis=1, keepdims=True)
    found = np.zeros((3, 3))
    for text in texts:
        found[text.ids] += 1
        assert text.score == pytest.approx(math.log(odds[text.ids]), abs=1e-6)
    assert chi_square(found, 4000 * odds) < 26.1


def test_drawn_texts_keep_their_own_past() -> None:
    table, counted = Table(5, 25, (5,), 1.0), np.array([[9], [14]])
    drawn = generate(table.steps(counted), counted, (5,), Decoding(max_length=8, do_sample=True, num_return=6))
    for prompt, texts in zip(counted.tolist(), drawn, strict=True):
        for text in texts:
            words = [*prompt, *text.ids, *([5] if text.stopped else [])]
            rows = [log_softmax(table.logits(np.array([words[:place]])))[0, words[place]] for place in range(1, len(words))]
            assert text.score == pytest.approx(sum(rows), rel=1e-6)


def test_penalty_and_minimum_come_before_temperature() -> None:
    """3 was there before, and 5 would stop."""
    (texts,) = generate(
        fixed(1.0, 0.5, 0.0, 3.0, -1.0, 2.0),
        np.array([[3]]),
        (5,),
        dataclasses.replace(DRAWN, repetition_penalty=2.0, temperature=0.5, min_length=2),
    )
    odds = np.exp(np.array([1.0, 0.5, 0.0, 3.0 / 2, -1.0, -np.inf]) / 0.5)
    found = np.bincount([text.ids[0] for text in texts], minlength=6)
    assert found[5] == 0
    assert chi_square(found, 4000 * odds / odds.sum()) < 18.5


@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}], ids=str)
def test_the_narrowest_draw_is_greedy(how: dict[str, Any]) -> None:
    for seed in range(10):
        table, counted = Table(seed, 25, (5,), 1.0), np.array([[9], [14], [20]])
        drawn = generate(table.steps(counted), counted, (5,), Decoding(max_length=12, do_sample=True, num_return=2, **how))
        greedy = generate(table.steps(counted), counted, (5,), Decoding(max_length=12))
        assert drawn == [[text, text] for (text,) in greedy]


def test_a_text_depends_on_seed_and_prompt_alone() -> None:
    table, counted = Table(0, 25, (5,), 1.0), np.arange(9, 15)[:, None]
    options = Decoding(max_length=12, do_sample=True, num_return=3, seed=4)

    def drawn(rows: list[int], options: Decoding) -> list[list[Generated]]:
        return generate(table.steps(counted[rows]), counted[rows], (5,), options, numbers=rows)

    together = drawn([0, 1, 2, 3, 4, 5], options)
    assert together == drawn([0, 1, 2, 3, 4, 5], options)
    assert [together[5], together[2]] == drawn([5, 2], options)
    assert [texts[:1] for texts in together] == drawn([0, 1, 2, 3, 4, 5], dataclasses.replace(options, num_return=1))
    assert together != drawn([0, 1, 2, 3, 4, 5], dataclasses.replace(options, seed=5))
    same = generate(table.steps(counted[[0, 0]]), counted[[0, 0]], (5,), options, numbers=[0, 1])
    assert same[0] == together[0] != same[1]
    assert len({text.ids for text in together[0]}) > 1


def test_a_prompt_stays_until_all_its_texts_are_finished() -> None:
    table, counted = Table(2, 25, (5,), 1.5), np.array([[9], [14]])
    steps, told = table.steps(counted), list[int]()
    options = Decoding(max_length=40, do_sample=True, num_return=3)
    texts = generate(steps, counted, (5,), options, told.append)
    lengths = [[len(text.ids) + text.stopped for text in each] for each in texts]
    assert sum(told) == sum(itertools.chain(*lengths))
    assert len({*lengths[0]}) > 1
    longest = [max(each) for each in lengths]
    assert longest[0] != longest[1]
    assert steps.asked == [sum(length > step for length in longest) for step in range(max(longest))]
    assert all(5 not in text.ids and isinstance(text.stopped, bool) for each in texts for text in each)


@pytest.mark.parametrize("size", [8, 1000])
def test_top_p_and_top_k_are_transformers(size: int) -> None:
    scores = (np.random.default_rng(size).standard_normal((20, size)) * 2).astype(np.float32)
    for mass in (0.05, 0.5, 0.9, 0.999):
        ours = scores.copy()
        keep_top_p(ours, mass)
        np.testing.assert_array_equal(ours, TopPLogitsWarper(mass)(None, torch.from_numpy(scores)).numpy())
    for number in (1, 3, size, 2 * size):
        ours = scores.copy()
        keep_top_k(ours, number)
        np.testing.assert_array_equal(ours, TopKLogitsWarper(number)(None, torch.from_numpy(scores)).numpy())


def test_log_softmax_is_torch() -> None:
    logits = (np.random.default_rng(0).standard_normal((4, 50272)) * 5).astype(np.float32)
    wanted = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
    # Measured: 3.8e-6 at -45, one step of float32 there.
    np.testing.assert_allclose(log_softmax(logits), wanted, rtol=0, atol=8e-6)


# What is refused


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits(options: dict[str, Any], bad: float) -> None:
    with pytest.raises(UserError, match="The graph gave NaN or infinity in logits"):
        generate(fixed(0.0, bad, 1.0, 2.0), BOS, (), Decoding(max_length=3, **options))


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=str)
def test_no_word_has_a_chance(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="logits"):
        generate(fixed(-math.inf, 1.0), BOS, (1,), Decoding(max_length=3, min_length=3, **options))


def test_stop_word_of_another_vocabulary() -> None:
    with pytest.raises(UserError, match="The stop word 50118 is not among the 3 words"):
        generate(fixed(0.0, 0.0, 0.0), BOS, (50118,), Decoding(max_length=3))


def test_no_room() -> None:
    with pytest.raises(Misuse, match="max_length 4 leaves no room for a new word after the 4"):
        generate(fixed(0.0, 0.0), np.zeros((1, 4), np.int64), (), Decoding(max_length=4))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_length": 0}, "max_length is 0; expected a whole number, 1 or more"),
    ({"max_length": True}, "max_length is True"),
    ({"max_length": 20.0}, "max_length is 20.0"),
    ({"max_length": "20"}, "max_length is '20'"),
    ({"max_length": None}, "max_length is None"),
    ({"min_length": -1}, "min_length is -1; expected a whole number, 0 or more"),
    ({"min_length": 31}, "min_length 31 is above max_length 20"),
    ({"num_beams": 0}, "num_beams is 0"),
    ({"num_beams": math.nan}, "num_beams is nan"),
    ({"num_return": 2}, "num_return 2 is above num_beams 1. Ask for more beams, or for do_sample"),
    ({"num_return": 0, "do_sample": True}, "num_return is 0"),
    ({"num_beams": 3, "do_sample": True}, "do_sample goes with num_beams 1, not 3"),
    ({"do_sample": 1}, "do_sample is 1; expected True or False"),
    ({"temperature": 0.0}, "temperature is 0.0; expected at least 0.001. For the likeliest word"),
    ({"temperature": -1.0}, "temperature is -1.0"),
    ({"temperature": math.nan}, "temperature is nan; expected a number"),
    ({"temperature": True}, "temperature is True"),
    ({"top_p": 0.0}, "top_p is 0.0; expected a number above 0, at most 1"),
    ({"top_p": 1.1}, "top_p is 1.1"),
    ({"top_p": "0.9"}, "top_p is '0.9'"),
    ({"top_k": -1}, "top_k is -1"),
    ({"top_k": 2.5}, "top_k is 2.5"),
    ({"seed": -1}, "seed is -1"),
    ({"length_penalty": math.inf}, "length_penalty is inf"),
    ({"length_penalty": 1e9}, "length_penalty is 1000000000.0; expected a number from -10 to 10"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; expected a number from 0.001 to 1000"),
    ({"repetition_penalty": -1.2}, "repetition_penalty is -1.2"),
    ({"early_stopping": "always"}, "early_stopping is 'always'; expected True, False or 'never'"),
    ({"early_stopping": 1}, "early_stopping is 1"),
    ({"early_stopping": "never", "rule": ORIGINAL_BLIP}, "'original-4.15' knows no early_stopping 'never'"),
    ({"rule": "hf"}, "There is no rule 'hf'; known rules: original, original-4.15, transformers"),
    ({"rule": None}, "There is no rule None"),
]


@pytest.mark.parametrize(("wrong", "said"), REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_options_that_cannot_be(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(Misuse) as refused:
        check(dataclasses.replace(Decoding(max_length=20), **wrong))
    assert said in refused.value.message
    assert refused.value.exit_code == 2


def test_options_of_the_originals() -> None:
    """BLIP's and LAVIS's own (models/blip.py, models/blip2_models): whole numbers for numbers, and numpy's, are numbers."""
    check(Decoding(max_length=20, min_length=5, num_beams=3, rule=ORIGINAL_BLIP))
    check(Decoding(max_length=30, min_length=1, num_beams=5, length_penalty=-1, rule=ORIGINAL, top_p=0.9))
    check(Decoding(max_length=30, do_sample=True, top_p=0.9, top_k=50, repetition_penalty=1.1, num_return=4))
    check(Decoding(max_length=np.int64(30), num_beams=5, num_return=5, early_stopping="never", rule=TRANSFORMERS))  # type: ignore[arg-type]


def test_misuse_comes_before_the_model_is_asked() -> None:
    steps = fixed(0.0, 0.0)
    with pytest.raises(Misuse):
        generate(steps, BOS, (), Decoding(max_length=3, min_length=4))
    assert steps.asked == []
