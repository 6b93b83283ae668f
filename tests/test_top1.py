"""Accuracy of classification: numbers worked out by hand, and a plain recomputation of random ones."""

from __future__ import annotations

import numpy as np
import pytest

from models.errors import UserError
from postprocess import answers as answering
from postprocess import top1
from postprocess.answers import TOP, Answers, answers, card, predictions
from postprocess.top1 import Accuracy
from tests.classify_run import softmax


def judged(probability: np.ndarray, label: list[int], classes: list[str], labels: list[str]) -> Accuracy:
    kinds = np.array(label)
    target = top1.targets(classes, labels)
    assert top1.obstacle(target, kinds, classes, len(labels)) is None
    return top1.assess(answers(probability).label, kinds, target, len(labels))


def brute_force(probability: np.ndarray, label: list[int], classes: list[str], labels: list[str], k: int) -> list[bool]:
    """Whether each picture's label is among its first k, one picture at a time, in words."""
    found = []
    for row, kind in zip(probability.tolist(), label, strict=True):
        ordered = sorted(labels, key=lambda name: (-row[labels.index(name)], labels.index(name)))
        found.append(classes[kind] in ordered[:k])
    return found


# Six labels, five pictures. Ranks of the right label, from 1: cat 1, cat 2, dog 6, dog 1, fox 5.
LABELS = ["cat", "dog", "fox", "cow", "hen", "bee"]
CLASSES = ["cat", "dog", "fox"]
LABEL = [0, 0, 1, 1, 2]
PROBABILITY = np.array(
    [
        [0.50, 0.10, 0.10, 0.10, 0.10, 0.10],
        [0.30, 0.10, 0.50, 0.04, 0.03, 0.03],
        [0.20, 0.05, 0.30, 0.15, 0.15, 0.15],
        [0.10, 0.40, 0.20, 0.10, 0.10, 0.10],
        [0.10, 0.15, 0.07, 0.40, 0.23, 0.05],
    ],
    np.float32,
)


def test_numbers_worked_out_by_hand() -> None:
    found = judged(PROBABILITY, LABEL, CLASSES, LABELS)
    assert found.top1 == 40.0  # pictures 0 and 3 of five
    assert found.top5 == 80.0  # all but picture 2
    assert found.chance == pytest.approx(100 / 6)
    assert [(each.pictures, each.right, each.top1) for each in found.classes] == [(2, 1, 50.0), (2, 1, 50.0), (1, 0, 0.0)]
    assert found.mean_class == pytest.approx(100 / 3)
    assert [(each.wrong, each.wrong_pictures) for each in found.classes] == [(2, 1), (2, 1), (3, 1)]  # fox, fox, cow
    cells = found.confusion
    assert list(zip(cells.true.tolist(), cells.predicted.tolist(), cells.pictures.tolist(), strict=True)) == [
        (0, 0, 1),
        (0, 2, 1),
        (1, 1, 1),
        (1, 2, 1),
        (2, 3, 1),
    ]
    assert top1.confused(found) == [(0, 2, 1), (1, 2, 1), (2, 3, 1)]


@pytest.mark.parametrize("seed", range(12))
def test_agrees_with_a_plain_recomputation(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes in another order than the labels, distractors, empty classes, in half of the runs many equal probabilities;
    blocks of a few pictures."""
    monkeypatch.setattr(answering, "BLOCK_CELLS", 100)
    random = np.random.default_rng(seed)
    classes = [f"class {n}" for n in range(random.integers(1, 9))]
    labels = [*classes, *(f"other {n}" for n in range(random.integers(0, 9)))]
    random.shuffle(labels)
    label = random.integers(0, len(classes), 1 + random.integers(0, 80)).tolist()
    logits = random.normal(size=(len(label), len(labels)))
    probability = softmax(logits.round() if seed % 2 else logits)
    found = judged(probability, label, classes, labels)
    first, five = (brute_force(probability, label, classes, labels, k) for k in (1, 5))
    assert found.top1 == pytest.approx(100 * sum(first) / len(first), abs=1e-12)
    assert found.top5 == (pytest.approx(100 * sum(five) / len(five), abs=1e-12) if len(labels) > 5 else None)
    rates = []
    for kind, name in enumerate(classes):
        own = [n for n, other in enumerate(label) if other == kind]
        answered = [labels[int(np.argmax(probability[n]))] for n in own]
        wrong = [answer for answer in answered if answer != name]
        most = max(set(wrong), key=lambda answer: (wrong.count(answer), -labels.index(answer))) if wrong else None
        result = found.classes[kind]
        assert (result.pictures, result.right) == (len(own), answered.count(name))
        assert (None if result.wrong is None else labels[result.wrong]) == most
        assert result.wrong_pictures == wrong.count(most)
        if own:
            rates.append(answered.count(name) / len(own))
    assert found.mean_class == pytest.approx(100 * np.mean(rates))
    assert found.confusion.pictures.sum() == len(label)
    assert (found.confusion.pictures > 0).all()


def test_the_recomputation_can_disagree() -> None:
    """One picture's two best labels changed places: the figures above would show it."""
    swapped = PROBABILITY.copy()
    swapped[0, [0, 1]] = swapped[0, [1, 0]]
    assert judged(swapped, LABEL, CLASSES, LABELS).top1 == 20.0
    assert sum(brute_force(swapped, LABEL, CLASSES, LABELS, 1)) == 1
    assert sum(brute_force(PROBABILITY, LABEL, CLASSES, LABELS, 1)) == 2


def test_of_equal_labels_the_first_one_counts() -> None:
    even = np.full((4, 8), 1 / 8, np.float32)
    assert answers(even).label.tolist() == [[0, 1, 2, 3, 4]] * 4
    names = [f"n{i}" for i in range(8)]
    found = judged(even, [0, 4, 5, 7], names, names)
    assert (found.top1, found.top5) == (25.0, 50.0)


def test_five_labels_have_no_top5() -> None:
    even = np.full((1, TOP), 1 / TOP, np.float32)
    names = [f"n{i}" for i in range(TOP)]
    assert judged(even, [0], names, names).top5 is None
    even = np.full((1, TOP + 1), 1 / (TOP + 1), np.float32)
    assert judged(even, [TOP], [*names, "last"], [*names, "last"]).top5 == 0.0


def test_classes_and_labels_are_matched_by_their_names() -> None:
    assert np.array_equal(top1.targets(["cat", " dog "], ["dog", "tree", "cat"]), [2, 0])
    assert np.array_equal(top1.targets(["cat", "dog"], ["tree", "Cat"]), [-1, -1])


def why_none(classes: list[str], labels: list[str], label: list[int]) -> str | None:
    return top1.obstacle(top1.targets(classes, labels), np.array(label), classes, len(labels))


def test_classes_without_a_label_are_counted_and_named() -> None:
    start = "No accuracy: "
    assert why_none(["cat", "dog", "cow"], ["dog", "cat"], [0, 1, 1]) is None  # no picture of a cow
    said = "1 of the 1 classes that the pictures have is not among the 1 labels of the run: 'cat'."
    assert why_none(["cat", "cow"], ["cow"], [0, 0]) == start + said
    said = "2 of the 3 classes that the pictures have are not among the 1 labels of the run: 'a', 'c'."
    assert why_none(["a", "b", "c"], ["b"], [2, 1, 0]) == start + said
    many = why_none([f"class {n}" for n in range(9)], ["class 0"], list(range(9)))
    assert many is not None
    assert many.endswith(": 'class 1', 'class 2', 'class 3', 'class 4', 'class 5' and 3 more.")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.nan, "1 of 30 values of probability, pictures 0 to 4, are not numbers from 0 to 1"),
        (np.inf, "1 of 30"),
        (-0.1, "1 of 30"),
        (1.5, "1 of 30"),
        (0.06, "The probabilities of picture 2 add up to 1.01, expected 1"),
    ],
)
def test_what_is_no_probability_is_refused(value: float, says: str) -> None:
    spoilt = PROBABILITY.copy()
    spoilt[2, 1] = value
    with pytest.raises(UserError, match=says):
        answers(spoilt)


def test_a_wide_softmax_is_not_refused() -> None:
    """float32 over ImageNet-21k's labels: sums are off by 3.4e-7 at most, measured over 4,000 pictures."""
    wide = softmax(np.random.default_rng(0).normal(size=(20, 21_843)) * 4)
    assert np.abs(wide.sum(1, dtype=np.float64) - 1).max() < 1e-6 < answering.SUM_OFF
    assert answers(wide).label.shape == (20, TOP)


def test_predictions_are_the_same_floats_in_few_digits() -> None:
    score = np.array([[0.99999976, 1.315181e-06, 7.0368844e-07]], np.float32)  # an example of mindformers' documentation
    found = predictions(Answers(np.array([[2, 0, 1]]), score), ["tree", "dog", "sunflower"])
    assert str(found[0][:2]) == "[{'score': 0.99999976, 'label': 'sunflower'}, {'score': 1.315181e-06, 'label': 'tree'}]"
    random = softmax(np.random.default_rng(1).normal(size=(50, 9)) * 6)
    again = [[one["score"] for one in row] for row in predictions(answers(random), [str(n) for n in range(9)])]
    assert np.array_equal(np.array(again).astype(np.float32), answers(random).score)
    assert all(row == sorted(row, reverse=True) for row in again)


def test_a_card_says_where_the_right_label_came() -> None:
    found = answers(PROBABILITY)
    late = card(found, 2, PROBABILITY, 1)
    assert [(one.label, one.rank, one.right) for one in late.top] == [(n, k, False) for k, n in enumerate((2, 0, 3, 4, 5), 1)]
    assert late.late is not None
    assert (late.rank, late.late.label, late.late.rank, late.late.right) == (6, 1, 6, True)
    assert late.late.score == pytest.approx(0.05)
    second = card(found, 1, PROBABILITY, 0)
    assert (second.rank, second.late, [one.right for one in second.top]) == (2, None, [False, True, False, False, False])
    unknown = card(found, 0, PROBABILITY, None)
    assert (unknown.rank, unknown.late, unknown.top[0].right) == (None, None, None)
