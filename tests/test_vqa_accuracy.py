"""The official accuracy of answers: figures that VQAEval gave, its cleaning case by case, and a plain recomputation."""

from __future__ import annotations

import json
import os
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from models.errors import Misuse, UserError
from postprocess.references import Asked, Id, read_answers
from postprocess.vqa_accuracy import CONTRACTIONS, RULES, accuracy, clean, judge, without_punctuation

ASKED: dict[Id, Asked] = {
    1: Asked(("2",) * 7 + ("two",) * 2 + ("3",), "number", "how many"),
    2: Asked(("yes",) * 10, "yes/no", "is the"),
    3: Asked(("light blue",) * 2 + ("blue",) * 6 + ("grey",) * 2, "other", "what color"),
}
ANSWERS: dict[Id, str] = {1: "Two.", 2: "no", 3: "light blue"}


@pytest.mark.parametrize("rule", RULES)
def test_figures_of_vqa_eval(rule: str) -> None:
    found = judge(ASKED, ANSWERS, rule)
    np.testing.assert_allclose(found.each, [100, 0, 60])
    assert found.overall == 53.33
    assert found.per_answer_type == {"number": 100, "yes/no": 0, "other": 60}
    assert found.per_question_type == {"how many": 100, "is the": 0, "what color": 60}
    assert (found.ids, found.answers, found.asked) == ([1, 2, 3], ["Two.", "no", "light blue"], list(ASKED.values()))


def test_the_order_is_that_of_the_results() -> None:
    found = judge(ASKED, {3: "light blue", 1: "Two.", 2: "yes"})
    np.testing.assert_allclose(found.each, [60, 100, 100])
    assert found.ids == [3, 1, 2]
    assert found.overall == 86.67


@pytest.mark.parametrize(
    ("answer", "cleaned"),
    [
        ("Two.", "2"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("The cat", "cat"),
        ("an apple and a pear", "apple and pear"),
        ("dont", "don't"),
        ("it's", "it's"),
        ("somebody'd", "somebodyd"),
        ("oclock", "o'clock"),
        ("U.S.", "us"),
        ("3.5", "3.5"),
        ("Mr. 5.", "mr 5"),
        ("black-and-white", "black and white"),
        ("black -and-white", "black andwhite"),  # a sign beside a blank is taken out wherever it stands
        ("yes/no", "yes no"),
        ("yes / no", "yes no"),
        ("1,000", "1000"),
        ("1,000 a/b-c", "1000 abc"),  # a comma between digits: every sign is taken out
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("what?!", "what"),
        ("11:30", "11:30"),
        ("$5", "$5"),
        ("{x} [y] (z)", "x y z"),
        ("the", ""),
        ("", ""),
    ],
)
def test_cleaning(answer: str, cleaned: str) -> None:
    assert clean(answer) == cleaned


def test_at_most_32_periods_are_taken_out() -> None:
    assert without_punctuation("a." * 33) == "a" * 33 + "."


def test_the_contractions() -> None:
    assert len(CONTRACTIONS) == 114
    assert all(clean(word) == whole for word, whole in CONTRACTIONS.items())


def test_where_the_two_rules_differ() -> None:
    people = ["cat"] * 10
    assert accuracy("a cat", people, "lavis") == 1
    assert accuracy("a cat", people, "agreement") == 0
    mixed = ["the cat"] * 9 + ["dog"]
    assert accuracy("the cat", mixed, "lavis") == 0  # what people said keeps its articles
    assert accuracy("the cat", mixed, "agreement") == 1


def plain_accuracy(mine: str, theirs: list[str]) -> float:
    """The rule over all sets of nine of ten people, of answers that need no cleaning."""
    values = [min(1, sum(answer == mine for answer in nine) / 3) for nine in combinations(theirs, len(theirs) - 1)]
    return sum(values) / len(values)


@pytest.mark.parametrize("people", [4, 5, 9, 10, 11, 20])
def test_a_plain_recomputation(people: int) -> None:
    random = np.random.default_rng(people)
    for _ in range(50):
        theirs = [str(answer) for answer in random.choice(["cat", "dog", "hen", "cow"], people)]
        assert accuracy("cat", theirs) == pytest.approx(plain_accuracy("cat", theirs))
        assert accuracy("cat", theirs, "agreement") == pytest.approx(plain_accuracy("cat", theirs))


@pytest.mark.parametrize(
    ("people", "wanted"),
    [
        (["cat"], 1),
        (["dog"], 0),
        (["cat", "cat"], 1),
        (["cat", "dog"], 0.5),
        (["cat"] * 3, 1),
        (["cat", "cat", "dog"], (0.5 + 0.5 + 1) / 3),
    ],
)
def test_fewer_people_than_the_rule_was_made_for(people: list[str], wanted: float) -> None:
    assert accuracy("cat", people) == pytest.approx(wanted)


def test_questions_without_types() -> None:
    found = judge({1: Asked(("cat",) * 10, "other"), 2: Asked(("dog",) * 10)}, {1: "cat", 2: "cat"})
    assert (found.overall, found.per_answer_type, found.per_question_type) == (50, {"other": 100}, {})


def test_nobody_answered() -> None:
    with pytest.raises(UserError, match="Nobody answered the question 7: its annotation has no answers"):
        judge({7: Asked(())}, {7: "cat"})


def test_an_unknown_rule() -> None:
    with pytest.raises(Misuse, match="no rule 'strict' of VQA accuracy; choose lavis or agreement"):
        judge(ASKED, ANSWERS, "strict")


def test_results_and_references_apart() -> None:
    with pytest.raises(UserError, match="2 of 3 questions have no result: 1, 3"):
        judge(ASKED, {2: "yes"})
    assert judge(ASKED, {2: "yes"}, only_results=True).overall == 100
    with pytest.raises(UserError, match="1 of 4 results are of questions that the references do not have: 9"):
        judge(ASKED, {**ANSWERS, 9: "yes"})


@pytest.mark.real_data
def test_questions_of_vqa_v2() -> None:
    """What most people said scores 100, and what nobody said 0."""
    path = Path(os.environ["BLIP_REAL_DATA"]) / "coco108/vqav2.json"
    asked = read_answers(path)
    assert len(asked) == 8
    most: dict[Id, str] = {each["question_id"]: each["multiple_choice_answer"] for each in json.loads(path.read_text("utf-8"))}
    found = judge(asked, most)
    assert set(found.per_answer_type) == {"yes/no", "number", "other"}
    for own, value in zip(found.asked, found.each, strict=True):
        assert value == 100 or len(set(own.answers)) > 3
    assert judge(asked, dict.fromkeys(asked, "a zeppelin")).overall == 0
