"""One run of the bench over an om/ folder: measure, say, and return what a record keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench import machine
from bench.om import time_oms
from bench.om_table import ais_bench_lines, left_out, om_table
from bench.race import Say
from bench.table import load_line
from preprocess.workers import usable_cpus
from runtime.graphs import Graphs
from runtime.place import engine_of, place_of

KEPT = ("config", "target", "opset", "precision", "checkpoint", "cann", "graphs_digest")


def bench_om(graphs: Graphs, batches: Mapping[str, Sequence[int]], loops: int, warmup: int, say: Say) -> dict[str, Any]:
    """Time each graph at its `batches` on graphs.devices. Raises UserError."""
    before = machine.load_average()
    rows = time_oms(graphs, batches, loops, warmup)
    after = machine.load_average()
    content, devices = graphs.content, graphs.devices
    say(f"Files of {content['model']} in {graphs.source.folder}")
    together = ", a batch on each at the same time" if len(devices) > 1 else ""
    say(
        f"{content['soc']}, CANN {content['cann']}, precision {content['precision']}; NPU {_listed(devices)}{together}; "
        f"{loops} runs, {warmup} before them."
    )
    say("")
    for line in (*(line for row in rows for line in ais_bench_lines(row)), *om_table(rows), *left_out(batches), ""):
        say(line)
    # Of the end-to-end times: one thread here for each NPU copies and checks.
    say(load_line(before, after, len(devices), usable_cpus()))
    return {
        "batchsize": sorted({row.batch for row in rows}),
        **engine_of(graphs, "om"),
        **place_of(graphs),
        **machine.facts(),
        "load_average": {"before": before, "after": after},
        "graphs": {key: content.get(key) for key in KEPT},
        "graphs_digest": graphs.source.digest,
        "warmup": warmup,
        "rows": [row.record() for row in rows],
    }


def om_conditions(graphs: Graphs, batches: Mapping[str, Sequence[int]]) -> str:
    """What a record's name says of them: bs1-4-16-Ascend310P3-npu0."""
    every = sorted({batch for each in batches.values() for batch in each})
    return f"bs{'-'.join(map(str, every))}-{graphs.content['soc']}-npu{'-'.join(map(str, graphs.devices))}"


def _listed(devices: Sequence[int]) -> str:
    return ", ".join(map(str, devices))
