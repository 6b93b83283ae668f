"""What captions of drawn pictures say, attribute by attribute."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from demo.attributes import Told, read, right, score, truth
from demo.captions import captions
from demo.scenes import scenes

SCENES = [scene for scene, _, _ in scenes("test", 60, 3)]


def test_every_form_says_all() -> None:
    rng = np.random.default_rng(0)
    for scene in SCENES:
        for caption in captions(scene, rng):
            assert read(caption.replace(" ,", ",")) == read(caption)
            found = right(read(caption), truth(scene))
            assert found == {"count": 2, "colour": 2, "shape": 2, "side": 2, "background": 1}, caption


def test_captions_of_another_scene_are_wrong_in_something() -> None:
    rng = np.random.default_rng(0)
    for scene, other in itertools.pairwise(SCENES):
        for caption in captions(other, rng):
            assert sum(right(read(caption), truth(scene)).values()) < 9, caption


@pytest.mark.parametrize("caption", ["", "a dog", "two red squares", "two red squares above a cross on a grey background"])
def test_what_is_no_form_says_nothing(caption: str) -> None:
    assert read(caption) == Told()


def test_one_word_costs_one_attribute() -> None:
    said = read("two yellow squares over a purple cross on a pink background")
    for wrong, part in (
        ("three yellow squares over a purple cross on a pink background", "count"),
        ("two yellow squares under a purple cross on a pink background", "side"),
        ("two yellow squares over a purple cross on a grey background", "background"),
    ):
        found = right(read(wrong), said)
        assert found[part] == {"count": 1, "side": 0, "background": 0}[part]


def test_score_is_in_percent() -> None:
    rng = np.random.default_rng(0)
    said = {number: captions(scene, rng)[0] for number, scene in enumerate(SCENES)}
    assert set(score(said, SCENES).values()) == {100.0}
    assert score({0: "nothing", 1: said[1]}, SCENES) == dict.fromkeys(
        ("count", "colour", "shape", "side", "background", "all"), 50.0
    )
