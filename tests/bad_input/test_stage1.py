"""blip-train probe: what has no losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests import chain
from tests.bad_input.damage import changed, cut, given, together, weights
from tests.bad_input.table import Case, Spoil, Work, options, refused

TRAIN, PROBE = "train stage1", "train probe"
STAGE1 = given("--checkpoint", "stage1.pth")


def _misuse(name: str, step: str, said: tuple[str, ...], *values: object) -> Case:
    return Case(name, step, said, options(*values), 2)


def _annotate(image: str, caption: object) -> Spoil:
    return lambda work: work.annotate({"image": image, "caption": caption})


def _whole(**tensors: Tensor) -> Spoil:
    return weights("whole.pth", lambda held: held.update(tensors))


def _lost(part: str) -> Spoil:
    return weights("whole.pth", lambda held: [held.pop(name) for name in list(held) if name.startswith(part)])


PROBED = [
    Case("no picture", PROBE, ("nowhere.png does not exist",), options("--image", "nowhere.png", "--text", "word1")),
    Case("truncated picture", PROBE, ("0.png", "truncated"), changed("images/0.png", cut)),
    Case("text for a picture", PROBE, ("vocab.txt is not a picture",), given("--image", "model/vocab.txt", "--text", "word1")),
    Case("no checkpoint", PROBE, ("There is no checkpoint nowhere.pth",), options("--checkpoint", "nowhere.pth")),
    Case("no image encoder", PROBE, ("stage1.pth holds no image encoder", "Add --vit-checkpoint"), STAGE1),
    Case("another image encoder", PROBE, ("clip.pth: vision.kind",), together(STAGE1, given("--vit-checkpoint", "clip.pth"))),
    Case("two image encoders", PROBE, ("already holds an image encoder",), given("--vit-checkpoint", "eva.pth"), 2),
    Case("no language head", PROBE, ("Qformer.cls.predictions.bias is missing",), _lost("Qformer.cls")),
    Case("no temperature", PROBE, ("it has no temp",), _lost("temp")),
    Case("temperature 0", PROBE, ("the temperature, is 0", "above 0"), _whole(temp=torch.tensor(0.0))),
    Case("temperature NaN", PROBE, ("NaN or infinity in temp",), _whole(temp=torch.tensor(math.nan))),
    Case("other sizes", PROBE, ("qformer.queries",), lambda work: work.edit("model/config.json", _seven)),
    _misuse("a text too many", PROBE, ("1 pictures and 2 texts",), "--text", "word3"),
    _misuse("a picture too many", PROBE, ("2 pictures and 1 texts",), "--image", "nowhere.png"),
    _misuse("a text without words", PROBE, ("has no words",), "--image", "x", "--text", " .!"),
    _misuse("seed of 70 bits", PROBE, ("--seed", "not in the range"), "--seed", 2**70),
    _misuse("an option of training", PROBE, ("--steps",), "--steps", 1),
]


def _seven(sizes: dict[str, dict[str, object]]) -> None:
    sizes["qformer"]["queries"] = 7


@pytest.mark.parametrize("case", PROBED, ids=str)
def test_probe(case: Case, work2: Work) -> None:
    refused(case, work2)


def test_what_is_all_right(work2: Work) -> None:
    assert "overall" in chain.done(work2.call(PROBE))
