"""training/schedule.py: the learning rates that the reference systems trained with, to the digit."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

import pytest

from training.schedule import SCHEDULES, WITH_DECAY, WITHOUT_START, WITHOUT_WARMUP, Kind, Length, Schedule, learning_rate

# Computed with the original classes of LAVIS and PaddleMIX, and with mindformers' formula.
LAVIS = Schedule("lavis", lr=1e-5, min_lr=0.0, warmup_lr=1e-8, warmup_steps=1000)  # caption fine-tuning, 5 epochs
LAVIS_TABLE = {
    (0, 0): "1.000000e-08",
    (0, 500): "5.005000e-06",
    (0, 1000): "1.000000e-05",
    (0, 3000): "1.000000e-05",
    **{(1, step): "9.045085e-06" for step in (0, 1, 3999)},
    **{(2, step): "6.545085e-06" for step in (0, 1, 3999)},
    **{(3, step): "3.454915e-06" for step in (0, 1, 3999)},
    **{(4, step): "9.549150e-07" for step in (0, 1, 3999)},
}
PADDLE = Schedule("paddle", lr=1e-4, min_lr=1e-5, warmup_lr=1e-6, warmup_steps=2000)
PADDLE_TABLE = {  # of 20,000 steps
    0: "1.000000e-06",
    1: "1.049500e-06",
    1000: "5.050000e-05",
    1999: "9.995050e-05",
    2000: "9.779754e-05",
    10_000: "5.500000e-05",
    19_999: "1.000000e-05",
}
MINDFORMERS = Schedule("mindformers", lr=1e-4, min_lr=1e-5, warmup_lr=1e-6, warmup_steps=5000)
MINDFORMERS_TABLE = {  # of 50,000 steps
    0: "1.000000e-06",
    1: "1.020000e-06",
    2500: "5.100000e-05",
    4999: "1.009800e-04",
    5000: "1.000000e-04",
    27_500: "5.500000e-05",
    49_999: "1.000000e-05",
}
BLIP = Schedule("blip", lr=1e-5)
PRETRAIN = Schedule("blip-step", lr=3e-4, min_lr=1e-6, warmup_lr=1e-6, warmup_steps=3000, decay_rate=0.9)


def one_of(kind: Kind, **values: float) -> Schedule:
    """A schedule of this kind with what it needs."""
    usual = {
        "min_lr": 1e-5,
        "warmup_lr": 0.0 if kind in WITHOUT_START else 1e-6,
        "warmup_steps": 0 if kind in WITHOUT_WARMUP else 10,
        "decay_rate": 0.9 if kind in WITH_DECAY else None,
    }
    return Schedule(kind, lr=1e-4, **{**usual, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(("place", "expected"), LAVIS_TABLE.items())
def test_lavis(place: tuple[int, int], expected: str) -> None:
    assert f"{learning_rate(LAVIS, Length(4000, 20_000), *place):.6e}" == expected


@pytest.mark.parametrize("per_epoch", [2000, 5000, 20_000])
@pytest.mark.parametrize(("done", "expected"), PADDLE_TABLE.items())
def test_paddle_counts_steps_not_epochs(done: int, expected: str, per_epoch: int) -> None:
    assert f"{learning_rate(PADDLE, Length(per_epoch, 20_000), *divmod(done, per_epoch)):.6e}" == expected


@pytest.mark.parametrize("per_epoch", [5000, 50_000])
@pytest.mark.parametrize(("done", "expected"), MINDFORMERS_TABLE.items())
def test_mindformers_counts_steps_not_epochs(done: int, expected: str, per_epoch: int) -> None:
    assert f"{learning_rate(MINDFORMERS, Length(per_epoch, 50_000), *divmod(done, per_epoch)):.6e}" == expected


def test_the_conventions_differ() -> None:
    """One schedule under another's name misses the tables: the tables can tell them apart."""
    length = Length(2000, 20_000)
    for kind, off in (("lavis", 19_999), ("mindformers", 1), ("cosine", 0)):
        other = dataclasses.replace(PADDLE, kind=kind)
        assert f"{learning_rate(other, length, *divmod(off, 2000)):.6e}" != PADDLE_TABLE[off]


def test_blip_is_one_value_per_epoch() -> None:
    length = Length(100, 600)
    found = [learning_rate(BLIP, length, epoch, step) for epoch in range(6) for step in (0, 99)]
    expected = [1e-5 * 0.5 * (1 + math.cos(math.pi * epoch / 6)) for epoch in range(6) for _ in range(2)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[0] == 1e-5  # no warm-up


def test_blip_pretraining() -> None:
    length = Length(5000, 20 * 5000)
    assert learning_rate(PRETRAIN, length, 0, 0) == 1e-6
    assert learning_rate(PRETRAIN, length, 0, 1500) == pytest.approx((1e-6 + 3e-4) / 2, rel=1e-12)
    assert learning_rate(PRETRAIN, length, 0, 3000) == learning_rate(PRETRAIN, length, 0, 4999) == 3e-4
    assert learning_rate(PRETRAIN, length, 1, 0) == pytest.approx(2.7e-4, rel=1e-12)
    assert learning_rate(PRETRAIN, length, 19, 4999) == pytest.approx(3e-4 * 0.9**19, rel=1e-12)
    assert learning_rate(PRETRAIN, length, 60, 0) == 1e-6  # the floor: 3e-4 * 0.9**60 is below it
    assert learning_rate(dataclasses.replace(PRETRAIN, kind="lavis-step"), length, 7, 3) == pytest.approx(
        3e-4 * 0.9**7, rel=1e-12
    )


@pytest.mark.parametrize(("steps", "warmup"), [(9000, 200), (50, 0), (1, 200)])
@pytest.mark.parametrize("per_epoch", [750, 7])
def test_the_demo_s(steps: int, warmup: int, per_epoch: int) -> None:
    """A straight warm-up times a cosine from 1 to 0.02, over all steps."""
    schedule = Schedule("cosine", lr=1e-3, min_lr=2e-5, warmup_steps=warmup)
    for done in {0, 1, steps // 3, steps - 1}:
        cosine = 0.5 * (1 + math.cos(math.pi * done / steps))
        expected = 1e-3 * min(1.0, (done + 1) / max(warmup, 1)) * (0.02 + 0.98 * cosine)
        assert learning_rate(schedule, Length(per_epoch, steps), *divmod(done, per_epoch)) == pytest.approx(expected, rel=1e-15)


def test_every_kind_has_its_function() -> None:
    assert get_args(Kind) == tuple(SCHEDULES)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_no_warmup_begins_at_the_top(kind: Kind) -> None:
    schedule = one_of(kind, warmup_steps=0)
    assert learning_rate(schedule, Length(10, 100), 0, 0) == 1e-4


@pytest.mark.parametrize("kind", SCHEDULES)
def test_one_epoch_and_one_step(kind: Kind) -> None:
    for length in (Length(20, 20), Length(1, 1)):
        for step in range(length.steps):
            assert 0 <= learning_rate(one_of(kind), length, 0, step) <= 1.01e-4


@pytest.mark.parametrize("kind", SCHEDULES)
def test_last_step_is_the_lowest_after_the_warmup(kind: Kind) -> None:
    length = Length(20, 200)
    rates = [learning_rate(one_of(kind), length, *divmod(done, 20)) for done in range(200)]
    assert min(rates[10:]) == rates[-1] >= 1e-5
    assert rates[10:] == sorted(rates[10:], reverse=True)
    if kind in ("mindformers", "paddle", "cosine"):  # one value per step
        assert rates[-1] < 1.02e-5
        assert len(set(rates[10:])) == 190
    else:  # one per epoch
        assert len(set(rates[20:])) == 9


@pytest.mark.parametrize("kind", ["lavis", "lavis-step", "blip-step", "cosine", "paddle", "mindformers"])
def test_warmup_joins_what_follows(kind: Kind) -> None:
    """Without a step, except where the originals have one: mindformers ends above lr, PaddleMIX begins below."""
    schedule, length = one_of(kind, warmup_steps=1000), Length(10_000, 100_000)
    before, after = (learning_rate(schedule, length, 0, step) for step in (999, 1000))
    jump = (after - before) / 1e-4
    if kind == "mindformers":
        assert jump == pytest.approx(-0.009, abs=1e-9)
    elif kind == "paddle":
        assert -0.001 < jump < 0.001  # 1 % of the way: the cosine has hardly begun
        assert learning_rate(schedule, Length(10_000, 10_000), 0, 1000) < 0.98e-4
    else:
        assert abs(jump) < 0.0011


def test_a_warmup_longer_than_an_epoch() -> None:
    """LAVIS and BLIP leave it with epoch 0; the others go on."""
    length = Length(100, 1000)
    assert learning_rate(one_of("lavis", warmup_steps=500), length, 1, 0) > 0.9e-4
    assert learning_rate(one_of("paddle", warmup_steps=500), length, 1, 0) < 0.3e-4


def test_epochs_that_are_begun_count() -> None:
    assert Length(100, 600).epochs == 6
    assert Length(100, 601).epochs == 7
    assert Length(100, 1).epochs == 1
