"""Batches cover the work exactly, texts of like length go together, and reading ahead keeps order, errors and threads tidy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from runtime.batches import by_length, prefetched, slices, trimmed


@pytest.mark.parametrize(
    ("start", "stop", "size", "wanted"),
    [
        (0, 7, 3, [(0, 3), (3, 6), (6, 7)]),
        (4, 10, 3, [(4, 7), (7, 10)]),
        (0, 2, 5, [(0, 2)]),
        (3, 3, 2, []),
    ],
)
def test_slices(start: int, stop: int, size: int, wanted: list[tuple[int, int]]) -> None:
    assert [(part.start, part.stop) for part in slices(start, stop, size)] == wanted


def test_by_length_takes_each_text_once_and_short_ones_first() -> None:
    lengths = np.array([9, 3, 9, 2, 5, 3, 8])
    batches = list(by_length(lengths, 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert sorted(np.concatenate(batches).tolist()) == list(range(7))
    assert [lengths[batch].tolist() for batch in batches] == [[2, 3, 3], [5, 8, 9], [9]]
    assert batches[0].tolist() == [3, 1, 5]  # equals keep their order, so that every run makes the same batches


def test_by_length_of_nothing() -> None:
    assert list(by_length(np.array([], np.int64), 4)) == []


def test_trimmed_to_the_longest() -> None:
    mask = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    ids = np.arange(10).reshape(2, 5)
    short_ids, short_mask = trimmed(ids, mask)
    np.testing.assert_array_equal(short_ids, ids[:, :3])
    np.testing.assert_array_equal(short_mask, mask[:, :3])
    assert short_ids.flags.c_contiguous


def test_trimmed_keeps_one_column_of_empty_texts() -> None:
    ids, mask = trimmed(np.zeros((2, 4), np.int64), np.zeros((2, 4), np.int64))
    assert ids.shape == mask.shape == (2, 1)


def prefetch_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def consume(pairs: Iterator[tuple[int, object]], seen: list[int]) -> None:
    for item, _ in pairs:
        seen.append(item)


def test_prefetched_keeps_the_order() -> None:
    def read(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    assert list(prefetched(range(20), read)) == [(n, n * n) for n in range(20)]
    assert prefetch_threads() == 0


def test_prefetched_reads_ahead_but_not_far() -> None:
    read: list[int] = []
    for item, _ in prefetched(range(30), read.append, ahead=2):
        time.sleep(0.005)
        # Two wait in the queue, and one more is in the hand of the thread.
        assert len(read) <= item + 1 + 3
    assert read == list(range(30))


def test_prefetched_raises_at_the_item_that_failed() -> None:
    def read(item: int) -> int:
        if item == 3:
            raise OSError("no disk")
        return item

    seen: list[int] = []
    with pytest.raises(OSError, match="no disk"):
        consume(prefetched(range(9), read), seen)
    assert seen == [0, 1, 2]
    assert prefetch_threads() == 0


def test_prefetched_raises_what_the_items_raise() -> None:
    """An error in making the items must not leave the consumer waiting."""

    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no more items")

    seen: list[int] = []
    with pytest.raises(ValueError, match="no more items"):
        consume(prefetched(items(), str), seen)
    assert seen == [1]


@pytest.mark.parametrize("taken", [1, 4])
def test_closing_early_stops_the_thread(taken: int) -> None:
    read: list[int] = []
    pairs = prefetched(range(10**6), read.append)
    for _ in range(taken):
        next(pairs)
    pairs.close()  # type: ignore[attr-defined]
    assert prefetch_threads() == 0
    assert len(read) <= taken + 4


def test_an_error_in_the_consumer_stops_the_thread() -> None:
    with pytest.raises(KeyboardInterrupt):
        _interrupted()
    assert prefetch_threads() == 0


def _interrupted() -> None:
    for item, _ in prefetched(range(10**6), str):
        if item == 2:
            raise KeyboardInterrupt
