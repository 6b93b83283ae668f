"""Accuracy of zero-shot classification, from the best labels of every picture.

N pictures, C classes of the data, L labels that the pictures were compared with. A label that is no class of the data is a
distractor: it can only be wrong. A label names a class when their texts are the same, but for the blanks around them. When
pictures have a class that no label names, they could never be right: then there is no accuracy, but a sentence that says so.
Equal probabilities: see postprocess.answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from postprocess.answers import TOP

SHOWN = 5  # classes that the reason for no accuracy names


@dataclass(frozen=True)
class Confusion:
    """How often each class got each label, right or wrong: the cells that are not empty, by class and then by label."""

    true: np.ndarray  # (K,) int64: number of the class
    predicted: np.ndarray  # (K,) int64: number of the label
    pictures: np.ndarray  # (K,) int64, at least 1


@dataclass(frozen=True)
class ClassResult:
    """How well the pictures of one class were found."""

    pictures: int
    right: int
    wrong: int | None  # number of the most frequent wrong label, the lowest of equals; None when there was none
    wrong_pictures: int

    @property
    def top1(self) -> float | None:
        """Percent; None for a class without pictures."""
        return 100.0 * self.right / self.pictures if self.pictures else None


@dataclass(frozen=True)
class Accuracy:
    """In percent, over all pictures but for `mean_class`."""

    top1: float
    top5: float | None  # None when there are no more than TOP labels: it would be 100
    mean_class: float  # of the classes' top-1, those without pictures left out
    chance: float  # top-1 of a random order
    classes: list[ClassResult]  # C
    target: np.ndarray  # (C,) int64: the label that names each class, -1 for none
    confusion: Confusion


def targets(classes: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """(C,) int64: which of the `labels` names each class, -1 for none."""
    numbers = {name.strip(): number for number, name in enumerate(labels)}
    return np.array([numbers.get(name.strip(), -1) for name in classes], np.int64)  # (C,)


def obstacle(target: np.ndarray, label: np.ndarray, classes: Sequence[str], labels: int) -> str | None:
    """Why there is no accuracy for pictures of the classes `label` (N,): the sentence counts the classes that `target` (C,)
    finds no label for, and names the first. None when every picture's class has its label."""
    asked = np.unique(label)
    missing = asked[target[asked] < 0]
    if not len(missing):
        return None
    names = ", ".join(ascii(classes[number][:60]) for number in missing[:SHOWN])
    more = f" and {len(missing) - SHOWN:,} more" if len(missing) > SHOWN else ""
    are = "is" if len(missing) == 1 else "are"
    return (
        f"No accuracy: {len(missing):,} of the {len(asked):,} classes that the pictures have {are} not among the {labels:,} "
        f"labels of the run: {names}{more}."
    )


def assess(top: np.ndarray, label: np.ndarray, target: np.ndarray, labels: int) -> Accuracy:
    """Accuracy of the labels `top` (N, 1 .. TOP) for pictures of the classes `label` (N,), N at least 1. `target` (C,) names
    the classes by their labels, `labels` says how many of these there are."""
    right = top == target[label, None]  # (N, 1 .. TOP)
    confusion = _confusion(label, top[:, 0], labels)
    classes = _classes(confusion, target)
    return Accuracy(
        top1=100.0 * np.count_nonzero(right[:, 0]) / len(top),
        top5=100.0 * np.count_nonzero(right.any(1)) / len(top) if labels > TOP else None,
        mean_class=float(np.mean([each.top1 for each in classes if each.top1 is not None])),
        chance=100.0 / labels,
        classes=classes,
        target=target,
        confusion=confusion,
    )


def confused(accuracy: Accuracy) -> list[tuple[int, int, int]]:
    """Class, wrong label, pictures: the most frequent first, among equals in the order of classes and labels."""
    cells = accuracy.confusion
    wrong = np.flatnonzero(cells.predicted != accuracy.target[cells.true])
    order = wrong[np.argsort(-cells.pictures[wrong], kind="stable")]
    return list(zip(cells.true[order].tolist(), cells.predicted[order].tolist(), cells.pictures[order].tolist(), strict=True))


def _confusion(label: np.ndarray, predicted: np.ndarray, labels: int) -> Confusion:
    cells, pictures = np.unique(label * labels + predicted, return_counts=True)
    return Confusion(cells // labels, cells % labels, pictures)


def _classes(confusion: Confusion, target: np.ndarray) -> list[ClassResult]:
    starts = np.searchsorted(confusion.true, np.arange(len(target) + 1))  # (C + 1,): the cells of each class
    results = []
    for number, answer in enumerate(target):
        cells = slice(starts[number], starts[number + 1])
        predicted, pictures = confusion.predicted[cells], confusion.pictures[cells]
        wrong = np.where(predicted == answer, 0, pictures)
        most = int(wrong.argmax()) if wrong.any() else None
        results.append(
            ClassResult(
                pictures=int(pictures.sum()),
                right=int(pictures.sum() - wrong.sum()),
                wrong=None if most is None else int(predicted[most]),
                wrong_pictures=0 if most is None else int(wrong[most]),
            )
        )
    return results
