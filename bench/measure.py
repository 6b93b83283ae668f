"""Timing what can be called: warm-up, loops, percentiles, and several callables taking turns in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Work = Callable[[], object]
Tick = Callable[[], object]

# Between two callables that take turns: the threads of an engine spin for some milliseconds after their last work
# and would take the processor from the other engine.
REST_SECONDS = 0.05
LOOPS = range(5, 201)  # when the number of loops is left to the time they take
ENOUGH_SECONDS = 10.0


@dataclass(frozen=True)
class Timing:
    """The seconds of every timed call, in order."""

    seconds: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.seconds))

    @property
    def median(self) -> float:
        return self.percentile(50)

    @property
    def p99(self) -> float:
        """With fewer than 100 calls this lies between the two slowest."""
        return self.percentile(99)

    def percentile(self, percent: float) -> float:
        """Linear between the two nearest calls, numpy's default."""
        return float(np.percentile(self.seconds, percent))


def time_loops(work: Work, loops: int | None, warmup: int) -> Timing:
    """Call `work` `warmup` times untimed, then `loops` times timed; None goes on until 10 s were timed, 5 to 200 times."""
    for _ in range(warmup):
        work()
    seconds: list[float] = []
    while not _enough(seconds, loops):
        seconds.append(_seconds(work))
    return Timing(tuple(seconds))


def _enough(seconds: list[float], loops: int | None) -> bool:
    if loops is not None:
        return len(seconds) >= loops
    return len(seconds) >= LOOPS[-1] or (len(seconds) >= LOOPS[0] and sum(seconds) >= ENOUGH_SECONDS)


def interleave(works: dict[str, Work], rounds: int, warmup: int, tick: Tick | None = None) -> dict[str, Timing]:
    """Time each of `works` once per round, after `warmup` untimed rounds, so that what disturbs the machine disturbs all.

    Each round begins with another one: none always runs on what the same neighbour left behind. `tick` is called after each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(REST_SECONDS)
            took = _seconds(works[name])
            if number >= 0:
                seconds[name].append(took)
            if tick:
                tick()
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


def _seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
