"""The order of samples: from the seed and the epoch alone, the same for any number of processes, resumed exactly."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest

from models.errors import Misuse
from training.order import CAPTION, ORDER, PICTURE, Order, Position, randomness
from training.sources import Part

ROOT = Path(__file__).parent.parent
TWO = (Part("a", 10), Part("b", 7))


def taken(order: Order, count: int, start: Position = Position(), rank: int = 0, ranks: int = 1) -> list[list[int]]:  # noqa: B008
    return [draws.tolist() for _, draws in islice(order.batches(start, rank, ranks), count)]


def test_an_epoch_has_each_sample_once_in_another_order() -> None:
    order = Order(TWO, 1, seed=5)
    first, second = order.draws(0), order.draws(1)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(17))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.arange(17))
    assert not np.array_equal(first, Order(TWO, 1, seed=6).draws(0))
    np.testing.assert_array_equal(first, order.draws(0))


GOLDEN = [8, 11, 6, 3, 10, 5, 7, 1, 4, 9, 2, 0]


def test_the_order_of_a_seed_does_not_change() -> None:
    """A training that stopped goes on with the order that it had."""
    assert Order((Part("a", 12),), 4, seed=42).draws(3).tolist() == GOLDEN


def test_the_last_samples_are_left_out() -> None:
    order = Order(TWO, 5, seed=1)
    assert order.batches_per_epoch == 3
    assert [len(batch) for batch in taken(order, 6)] == [5] * 6
    assert list(chain(*taken(order, 3))) == order.draws(0)[:15].tolist()
    assert list(chain(*taken(order, 6)[3:])) == order.draws(1)[:15].tolist()


@pytest.mark.parametrize("ranks", [2, 3, 6])
@pytest.mark.parametrize("together", [1, 2])
def test_processes_share_the_batch_of_one(ranks: int, together: int) -> None:
    order = Order(TWO, 6, seed=9, together=together)
    alone = taken(order, 7)
    shared = [taken(order, 7, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert [list(chain(*parts)) for parts in zip(*shared, strict=True)] == alone
    assert all(len(part) == 6 // ranks for parts in shared for part in parts)


@pytest.mark.parametrize("stop", range(9))
def test_what_is_left_after_a_stop_is_what_would_have_come(stop: int) -> None:
    order = Order((Part("a", 10, 1.5), Part("b", 7)), 6, seed=2)
    whole = list(islice(order.batches(), 12))
    position = order.after(whole[stop][0])
    rest = list(islice(order.batches(position), 11 - stop))
    assert [where for where, _ in rest] == [where for where, _ in whole[stop + 1 :]]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(rest, whole[stop + 1 :], strict=True))


def test_positions() -> None:
    order = Order(TWO, 5, seed=1)  # three batches
    assert order.after(Position(0, 1)) == Position(0, 2)
    assert order.after(Position(0, 2)) == Position(1, 0)
    assert next(order.batches(Position(0, 7)))[0] == Position(2, 1)  # as many batches as a shorter epoch would have had


def test_weights_say_how_often_a_sample_comes() -> None:
    order = Order((Part("a", 8, 2.25), Part("b", 100, 0.5), Part("c", 5)), 1, seed=4)
    assert order.length == 8 * 2 + 2 + 50 + 5 == len(order.draws(0))
    halves = []
    for epoch in range(40):
        draws = order.draws(epoch)
        assert len(set(draws.tolist())) == len(draws)  # a second time is another draw
        counts = Counter((draws % order.count).tolist())
        assert {counts[n] for n in range(8)} == {2, 3}
        assert sum(counts[n] for n in range(8)) == 18
        assert {counts[n] for n in range(8, 108)} == {0, 1}
        assert sum(counts[n] for n in range(8, 108)) == 50
        assert all(counts[n] == 1 for n in range(108, 113))
        halves.append({n for n in range(8, 108) if counts[n]})
    seen = Counter(n for half in halves for n in half)
    assert len(seen) == 100
    assert min(seen.values()) >= 8
    assert max(seen.values()) <= 32


def test_neighbours_stay_together() -> None:
    order = Order((Part("a", 11), Part("b", 9, 2.0)), 6, seed=3, together=3)
    rows = [(0, 1, 2), (3, 4, 5), (6, 7, 8), *[(n, n + 1, n + 2) for n in (11, 14, 17)] * 2]  # 9 and 10 make no row
    draws = order.draws(0) % order.count
    assert sorted(map(tuple, draws.reshape(-1, 3).tolist())) == sorted(rows)
    for batch in taken(order, 4):
        assert len(batch) == 6
        assert all(batch[n + 1] == batch[n] + 1 for n in (0, 1, 3, 4))


def test_random_numbers_of_two_uses_differ() -> None:
    keys = [(ORDER, 1, 0, 0), (CAPTION, 1, 0, 0), (PICTURE, 1, 0, 0), (PICTURE, 0, 1, 0), (PICTURE, 1, 1, 0), (PICTURE, 1, 0, 1)]
    assert len({randomness(*key).integers(1 << 62) for key in keys}) == len(keys)
    assert randomness(*keys[0]).integers(1 << 62) == randomness(*keys[0]).integers(1 << 62)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batchsize": 0}, "batchsize is 0 and together is 1; expected whole numbers from 1"),
        ({"batchsize": 18}, "batchsize is 18 over all processes, but an epoch has only 17 samples to choose from"),
        ({"batchsize": 16, "together": 4}, "but an epoch has only 12 samples in whole rows of 4 to choose from"),
        ({"batchsize": 10, "together": 4}, "batchsize is 10, no multiple of together, 4. Choose 8."),
        ({"seed": -1}, "seed is -1; expected a whole number from 0"),
    ],
)
def test_wrong_settings_are_one_sentence(change: dict[str, int], sentence: str) -> None:
    with pytest.raises(Misuse, match=sentence):
        Order(TWO, **{"batchsize": 5, "seed": 1, **change})  # type: ignore[arg-type]


def test_wrong_processes_are_one_sentence() -> None:
    order = Order(TWO, 6, seed=1)
    with pytest.raises(Misuse, match="There is no process 2 among 2; they count from 0"):
        next(order.batches(rank=2, ranks=2))
    with pytest.raises(Misuse, match="batchsize is 6 over all processes, no multiple of the 4 that there are"):
        next(order.batches(ranks=4))


@pytest.mark.parametrize("module", ["sources", "transforms", "order", "loader", "shards"])
def test_the_data_of_training_need_no_torch(module: str) -> None:
    """The processes that decode start faster without, and stay smaller."""
    code = f"import sys; sys.modules['torch'] = None; sys.modules['webdataset'] = None; import training.{module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
