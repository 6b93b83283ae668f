"""Files compiled for an NPU, each timed by itself in the runtime's own session: full batches, texts of full length.

Two times of every run: that of the NPU alone, which ais_bench takes around its execution and which leaves out the copies to it
and from it; and end to end, from arrays here to arrays here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.graphs import full_inputs
from bench.measure import Timing, time_loops
from models import manifest
from models.errors import Misuse, UserError
from models.om import entries
from models.spec import BATCH, LENGTH
from runtime.graphs import Graphs, all_sizes
from runtime.session import open_session

LOOPS = 100  # as in the Ascend recipe


@dataclass(frozen=True)
class OmRow:
    """One graph at one batch, measured."""

    graph: str
    batch: int  # of each NPU
    length: int | None  # None for a graph without text
    file: str
    npu_ms: Mapping[int, tuple[float, ...]]  # by NPU, each of its runs, in order
    whole: Timing  # end to end: a run on every NPU at the same time

    @property
    def npu_samples_per_s(self) -> float:
        """Of all NPUs together, were nothing copied: the sum of what ais_bench calls the throughput of each."""
        return sum(throughput(self.batch, times) for times in self.npu_ms.values())

    @property
    def samples_per_s(self) -> float:
        """Of all NPUs together, end to end, over all timed loops."""
        return self.batch * len(self.npu_ms) / self.whole.mean

    @property
    def whole_ms(self) -> tuple[float, ...]:
        return tuple(1e3 * seconds for seconds in self.whole.seconds)

    def record(self) -> dict[str, Any]:
        """As a record keeps it."""
        return {
            "graph": self.graph,
            "batch": self.batch,
            "length": self.length,
            "file": self.file,
            "loops": len(self.whole.seconds),
            "npu": [
                {"device": device, "ms": _rounded(spread(times)), "samples_per_s": round(throughput(self.batch, times), 3)}
                for device, times in self.npu_ms.items()
            ],
            "npu_samples_per_s": round(self.npu_samples_per_s, 3),
            "end_to_end_ms": _rounded(spread(self.whole_ms)),
            "end_to_end_samples_per_s": round(self.samples_per_s, 3),
            "npu_ms": {str(device): [round(ms, 4) for ms in times] for device, times in self.npu_ms.items()},
            "seconds": [round(seconds, 6) for seconds in self.whole.seconds],
        }


def throughput(batch: int, npu_ms: Sequence[float]) -> float:
    """Samples per second by ais_bench's formula, 1000 * batch / mean NPU time. Of a decoder a sample is a prompt."""
    return 1000 * batch / float(np.mean(npu_ms))


def spread(times: Sequence[float]) -> dict[str, float]:
    """What ais_bench says of times, under its names."""
    found = {"min": np.min(times), "max": np.max(times), "mean": np.mean(times), "median": np.median(times)}
    return {name: float(value) for name, value in (found | {"percentile(99%)": np.percentile(times, 99)}).items()}


def batches_of(graphs: Graphs, names: Sequence[str], asked: Sequence[int] | None) -> dict[str, list[int]]:
    """Of each of the graphs `names` the batches to time: those asked for that it was compiled for; None asks for all.

    Raises Misuse for a batch that none of them was compiled for.
    """
    there: dict[str, list[int]] = {name: [] for name in names}
    for entry in entries(graphs.content, graphs.source.folder / manifest.NAME):
        if entry.graph in there and entry.batch not in there[entry.graph]:
            there[entry.graph].append(entry.batch)
    every = sorted({batch for batches in there.values() for batch in batches})
    if missing := [batch for batch in asked or () if batch not in every]:
        raise Misuse(
            f"{graphs.source.folder} has no .om for batches of {missing[0]}; --batchsize can be {', '.join(map(str, every))}. "
            "blip-atc --batchsize compiles others."
        )
    return {name: [batch for batch in batches if asked is None or batch in asked] for name, batches in there.items()}


def time_oms(graphs: Graphs, batches: Mapping[str, Sequence[int]], loops: int, warmup: int) -> list[OmRow]:
    """Every graph at each of its `batches`, with a progress bar. Raises UserError when one cannot be run."""
    rows: list[OmRow] = []
    bar = tqdm([(name, batch) for name in batches for batch in batches[name]], "files", unit=" files", disable=None, leave=False)
    for name, batch in bar:
        bar.set_postfix_str(f"{name}, batch {batch}")
        rows.append(time_om(graphs.at(batch), name, loops, warmup))
    return rows


def time_om(graphs: Graphs, name: str, loops: int, warmup: int) -> OmRow:
    """The file chosen of one graph, with a full batch for each NPU."""
    entry, sizes, devices = graphs.oms[name], all_sizes(graphs, name), graphs.devices
    session = open_session(graphs, name)
    feeds = full_inputs(graphs, name, {**sizes, BATCH: sizes.get(BATCH, 1) * len(devices)})
    whole = time_loops(partial(session.run, **feeds), loops, warmup)
    return OmRow(name, entry.batch, sizes.get(LENGTH), entry.file, _by_device(session.npu_ms(), devices, loops), whole)


def _by_device(times: Sequence[float], devices: Sequence[int], loops: int) -> dict[int, tuple[float, ...]]:
    """The timed runs of each NPU: the last ones of all that ais_bench counted."""
    each = len(times) // len(devices)
    if each < loops:
        raise UserError(f"ais_bench counted {each} runs on an NPU, at least {loops} were made. Its times cannot be told apart.")
    return {device: tuple(times[(n + 1) * each - loops : (n + 1) * each]) for n, device in enumerate(devices)}


def _rounded(found: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in found.items()}
