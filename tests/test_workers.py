"""Work in other processes: in order, bounded, and one sentence when a worker dies."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from models.errors import UserError
from preprocess import workers
from preprocess.workers import in_order


def double(item: int) -> int:
    return 2 * item


def die(item: int) -> int:
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def complain(item: int) -> int:
    raise UserError(f"item {item} is wrong")


@pytest.mark.parametrize("number", [1, 2])
def test_in_order(number: int) -> None:
    assert list(in_order(double, range(100), number)) == [2 * item for item in range(100)]


def test_in_order_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more items are handed out than a few per worker, however slowly the results are taken."""
    submitted = []
    submit = ProcessPoolExecutor.submit

    def counting(self: Any, work: Any, item: int) -> Any:
        submitted.append(item)
        return submit(self, work, item)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", counting)
    results = in_order(double, range(1000), 2)
    assert [next(results) for _ in range(10)] == [2 * item for item in range(10)]
    results.close()
    assert len(submitted) <= 10 + 2 * workers.AHEAD


def test_a_worker_that_dies_is_one_sentence() -> None:
    with pytest.raises(UserError, match="One of the 2 worker processes died, most likely for lack of memory"):
        list(in_order(die, range(100), 2))


def test_an_error_in_a_worker_arrives_as_it_is() -> None:
    with pytest.raises(UserError, match="item 0 is wrong"):
        list(in_order(complain, range(100), 2))
