"""Cutting work into batches, and reading the next one while the session runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Value = TypeVar("Value")


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover `start` to `stop`."""
    for at in range(start, stop, size):
        yield slice(at, min(at + size, stop))


def by_length(lengths: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Indices of texts of like length, at most `size` together: little of a batch is padding.

    Masked positions add nothing to a score, so a text gives the same numbers in a short batch as in a long one.
    """
    order = np.argsort(lengths, kind="stable")
    for part in slices(0, len(order), size):
        yield order[part]


def trimmed(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The columns of `ids` and `mask` (B, L) up to the longest text of the batch."""
    longest = max(int(mask.sum(axis=1).max()), 1)
    return np.ascontiguousarray(ids[:, :longest]), np.ascontiguousarray(mask[:, :longest])


def prefetched(items: Iterable[Item], read: Callable[[Item], Value], ahead: int = 2) -> Iterator[tuple[Item, Value]]:
    """Yield `(item, read(item))` in order; `read` runs up to `ahead` items early in a thread of its own.

    An exception in `read`, or in `items`, is raised here, at its item. Closing the generator stops the thread.
    """
    ready: queue.Queue[tuple[Item, Value] | BaseException | None] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def put(entry: tuple[Item, Value] | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                if stopped.is_set():
                    return
                put((item, read(item)))
        except BaseException as error:  # handed over, whatever it is
            put(error)
        else:
            put(None)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (entry := ready.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry
    finally:
        stopped.set()
        thread.join()
