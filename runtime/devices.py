"""One graph on several NPUs: the rows of a batch are dealt out, run at the same time, and put together again in order.

Each NPU has a process of its own, as in ais_bench's own runs on several: aclruntime keeps Python's lock while an NPU works, so
that threads would take turns.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import UserError
from models.om import OmEntry
from models.spec import BATCH, GraphSpec
from runtime.om_session import OmBackend

_workers: dict[int, Worker] = {}  # by NPU
_numbers = count()  # of graphs that were opened
_lock = threading.RLock()  # one question at a time


def open_om(folder: Path, entry: OmEntry, symbolic: GraphSpec, devices: Sequence[int]) -> OmBackend | Devices:
    """A file of an om/ folder on each of `devices`. Raises UserError, see OmBackend."""
    if len(devices) == 1:
        return OmBackend(folder / entry.file, entry.spec, devices[0], entry.dynamic)
    return Devices(folder, entry, symbolic, devices)


class Devices:
    """A `runtime.session.Backend` over several NPUs, for as many rows as some or all of them take."""

    def __init__(self, folder: Path, entry: OmEntry, symbolic: GraphSpec, devices: Sequence[int]) -> None:
        # Rows that an NPU takes of inputs that have the batch for their first axis; what has another goes to all.
        self._rows = {
            ours.name: int(theirs.shape[0])
            for ours, theirs in zip(symbolic.inputs, entry.spec.inputs, strict=True)
            if BATCH in str(ours.shape[0])
        }
        with _asking():
            self._workers = [_worker(device) for device in devices]
            self._number = next(_numbers)
            for worker in self._workers:
                worker.send("open", self._number, folder / entry.file, entry.spec, entry.dynamic)
            self.notes: list[str] = _answers(self._workers)[0]
        self._released = weakref.finalize(self, _forget, self._workers, self._number)

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """As OmBackend.run, of a whole number of batches, one for each NPU at most."""
        name, rows = next(iter(self._rows.items()))
        used = self._workers[: len(feeds[name]) // rows]
        with _asking():
            for n, worker in enumerate(used):
                parts = {k: v[n * self._rows[k] : (n + 1) * self._rows[k]] if k in self._rows else v for k, v in feeds.items()}
                worker.send("run", self._number, parts)
            found = _answers(used)
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def npu_ms(self) -> list[float]:
        """How long each run took on its NPU, in ms, one NPU after the other."""
        with _asking():
            for worker in self._workers:
                worker.send("npu_ms", self._number)
            return [time for times in _answers(self._workers) for time in times]

    def close(self) -> None:
        """Give the NPUs' memory back, before they do anything else."""
        self._released()


class Worker:
    """The process that has one NPU."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.closed: list[int] = []  # graphs that nobody holds any more
        self._pipe, theirs = Pipe()
        # No fork, which CANN does not survive, and not multiprocessing's spawn, which would run the user's script again.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "runtime.device_process", str(theirs.fileno()), str(device)],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def send(self, what: str, number: int, *more: Any) -> None:
        try:
            while self.closed:
                self._pipe.send(("close", self.closed.pop()))
            self._pipe.send((what, number, *more))
        except OSError:
            pass  # receive() says so

    def receive(self) -> tuple[bool, Any]:
        """Whether it went well, and the answer, or what is to be said."""
        try:
            answer: tuple[bool, Any] = self._pipe.recv()
        except (EOFError, OSError):
            _workers.pop(self.device, None)
            code = self._process.wait()
            return (
                False,
                f"The process that runs NPU {self.device} has ended with exit status {code}. Run the same command again.",
            )
        return answer

    def stop(self) -> None:
        """The process ends when nobody speaks to it any more."""
        self._pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def _asking() -> Iterator[None]:
    """One question at a time. When it is broken off, by Ctrl-C for one, the processes end: their answers would be taken for
    those to the next one."""
    with _lock:
        try:
            yield
        except UserError:
            raise
        except BaseException:
            stop_all()
            raise


def stop_all() -> None:
    """End the processes, with all that they hold on the NPUs."""
    with _lock:
        while _workers:
            _workers.popitem()[1].stop()


atexit.register(stop_all)


def _worker(device: int) -> Worker:
    if device not in _workers:
        _workers[device] = Worker(device)
    return _workers[device]


def _answers(workers: Sequence[Worker]) -> list[Any]:
    """The answer of each. Raises UserError when one failed, once all have answered: none is to be taken for the next one's."""
    found = [worker.receive() for worker in workers]
    for well, answer in found:
        if not well:
            raise UserError(answer)
    return [answer for _, answer in found]


def _forget(workers: Sequence[Worker], number: int) -> None:
    """Told before the next question: this is called whenever Python finds that a graph is held by nobody, maybe in the middle
    of one."""
    for worker in workers:
        worker.closed.append(number)
