"""What was measured of files compiled for an NPU, as lines for the screen: as ais_bench prints them, and as one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.om import OmRow, spread, throughput

ABREAST = 5  # graphs, in 120 columns


def ais_bench_lines(row: OmRow) -> list[str]:
    """The lines that `python -m ais_bench` prints of a file, of each NPU; and end to end, which it does not measure."""
    lines = [f"{row.file}, batch {row.batch}"]
    for device, times in row.npu_ms.items():
        mean = spread(times)["mean"]
        lines += [
            *([f"NPU {device}"] if len(row.npu_ms) > 1 else []),
            f"[INFO] NPU_compute_time (ms): {_said(times)}",
            f"[INFO] throughput 1000*batchsize.mean({row.batch})/NPU_compute_time.mean({mean}): {throughput(row.batch, times)}",
        ]
    return [*lines, f"end to end (ms): {_said(row.whole_ms, '.3f')}; {row.samples_per_s:.2f} samples/s", ""]


def om_table(rows: Sequence[OmRow]) -> list[str]:
    """A line per batch, of every graph the samples per second by NPU time and, beside it, end to end."""
    names, batches = list(dict.fromkeys(row.graph for row in rows)), sorted({row.batch for row in rows})
    found = {(row.graph, row.batch): row for row in rows}
    lines = ["Samples per second by NPU time, and end to end:"]
    for first in range(0, len(names), ABREAST):
        abreast = names[first : first + ABREAST]
        lines += ["", "batch" + "".join(f"  {name:>21}" for name in abreast)]
        lines.append(" " * 5 + f"  {'NPU':>10} {'end to end':>10}" * len(abreast))
        lines += [f"{batch:>5}" + "".join(_cell(found.get((name, batch))) for name in abreast) for batch in batches]
    return lines


def left_out(graphs: Mapping[str, Sequence[int]]) -> list[str]:
    """What to say of graphs that were compiled for none of the batches asked for: a line, or none."""
    names = [name for name, batches in graphs.items() if not batches]
    return [f"Not compiled for any of these batches, and not timed: {', '.join(names)}."] if names else []


def _cell(row: OmRow | None) -> str:
    return f"  {'-':>10} {'-':>10}" if row is None else f"  {row.npu_samples_per_s:>10.2f} {row.samples_per_s:>10.2f}"


def _said(times: Sequence[float], form: str = "") -> str:
    return ", ".join(f"{name} = {value:{form}}" for name, value in spread(times).items())
