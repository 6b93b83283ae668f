"""The same work on many items in other processes: results in order, a bounded number of them at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from models.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
FEW = 32  # items; starting processes takes longer than so many pictures
AHEAD = 4  # items in flight per worker
STOPS = {signal.SIGINT, signal.SIGTERM}
MOST = 16  # workers, when no number of them is asked for


def in_order(work: Callable[[T], R], items: Sequence[T], workers: int) -> Generator[R, None, None]:
    """Yield work(item) for every item, in order. `work` must be a function that can be pickled, of a module and not of a script.

    Few items, or one worker, stay in this process. Close the iterator (`contextlib.closing`) so that an error of the
    consumer stops the workers at once. Raises UserError when a worker dies.
    """
    if workers <= 1 or len(items) < FEW:
        yield from map(work, items)
        return
    # spawn: a forked child would inherit locks that other threads (tokenizers, BLAS) may hold.
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[R]] = deque()
    with ProcessPoolExecutor(workers, context, _apart) as pool:
        try:
            for item in items:
                waiting.append(_submit(pool, work, item))
                if len(waiting) >= AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"One of the {workers} worker processes died, most likely for lack of memory. Run again with fewer --workers."
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def usable_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0))


def workers_of(asked: int | None) -> int:
    """As many processes as are asked for; without a number one per CPU, at most MOST."""
    return min(usable_cpus(), MOST) if asked is None else asked


def _submit(pool: ProcessPoolExecutor, work: Callable[[T], R], item: T) -> Future[R]:
    """submit() may start a process. It inherits the mask, so Ctrl-C and SIGTERM reach the parent alone, and the parent heeds
    them, in the way that it has said, only when the start is complete: half a start leaves a child that complains. (Of a signal
    that this thread masks, another thread may tell it.)"""
    if threading.current_thread() is not threading.main_thread():
        with _without_main():
            return pool.submit(work, item)
    pressed: list[int] = []
    handlers = {stop: signal.signal(stop, lambda number, frame: pressed.append(number)) for stop in STOPS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        with _without_main():
            future = pool.submit(work, item)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for stop, handler in handlers.items():
            signal.signal(stop, handler or signal.SIG_DFL)
    for number in pressed:
        signal.raise_signal(number)
    return future


@contextmanager
def _without_main() -> Iterator[None]:
    """A process that is started within does not run the caller's script once more, as spawn would have it: what works there is
    imported by its own name, and a script needs no `if __name__ == "__main__"`."""
    main = sys.modules["__main__"].__dict__
    hidden: dict[str, Any] = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(hidden)


def _apart() -> None:
    """In a worker: what asks the parent's whole group of processes to stop, as torchrun does, asks the parent alone, who may
    still need what is being made. But end when the parent was killed and can tell nobody."""
    os.setpgid(0, 0)
    asked = signal.sigtimedwait({signal.SIGTERM}, 0)  # while it was masked
    if asked and asked.si_pid == os.getppid():
        os._exit(1)  # with which the pool ends its other processes when one has died
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
