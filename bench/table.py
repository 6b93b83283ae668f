"""What was measured, as lines for the screen: at most 120 columns."""

from __future__ import annotations

from collections.abc import Sequence

from bench.bandwidth import Bandwidth
from bench.compare import Measured
from bench.generation import Generation
from bench.graphs import Row
from bench.peak import Peak

BUSY = 1.0  # load average before the bench begins


def graph_lines(rows: Sequence[Row], peak: Peak) -> list[str]:
    """A line per graph. GF/s and the share of the peak are of the median loop, samples/s of all of them."""
    lines = [
        f"{'graph':<20} {'batch':>5} {'length':>6} {'loops':>5} {'mean ms':>10} {'median ms':>10} {'p99 ms':>10} "
        f"{'samples/s':>10} {'GFLOP':>10} {'GF/s':>8} {'of peak':>8}"
    ]
    for row in rows:
        timing, flops = row.timing, sum(row.flops.values())
        lines.append(
            f"{row.name:<20} {row.batch:>5} {row.length or '-':>6} {len(timing.seconds):>5} {1e3 * timing.mean:>10.2f} "
            f"{1e3 * timing.median:>10.2f} {1e3 * timing.p99:>10.2f} {row.samples_per_s:>10.2f} {flops / 1e9:>10.3f} "
            f"{row.gflops:>8.1f} {row.gflops / peak.best:>8.1%}"
        )
    return lines


def peak_lines(peak: Peak) -> list[str]:
    """The roof that the shares are of, and the product that reached it."""
    return [
        f"Peak: {peak.engine} multiplies float32 matrices at {peak.best:.1f} GF/s here ({peak.best_product}).",
        f"      Measured, rows x inner x columns: {', '.join(f'{p} {gflops:.1f}' for p, gflops in peak.gflops.items())}.",
    ]


def generation_lines(rows: Sequence[Generation], bandwidth: Bandwidth) -> list[str]:
    """A line per way to write. After the first word; a token is one word of one text, however many beams look for it."""
    lines = [
        f"{'beams':>5} {'past':<5} {'batch':>5} {'prompt':>6} {'new':>4} {'loops':>5} {'first ms':>9} {'ms/token':>9} "
        f"{'tokens/s':>9} {'MB/token':>9} {'GB/s':>7} {'of read':>7}"
    ]
    for row in rows:
        lines.append(
            f"{row.beams:>5} {'kept' if row.use_past else 'none':<5} {row.batch:>5} {row.prompt:>6} {row.new:>4} "
            f"{len(row.rest.seconds):>5} {1e3 * row.first.median:>9.2f} {row.token_ms:>9.2f} {row.tokens_per_s:>9.2f} "
            f"{row.token_bytes / 1e6:>9.2f} {row.gb_per_s:>7.2f} {row.gb_per_s / bandwidth.best:>7.1%}"
        )
    return lines


def bandwidth_lines(bandwidth: Bandwidth) -> list[str]:
    """What the shares of reading are of, and the way that reached it."""
    measured = ", ".join(f"{way} {gb_per_s:.1f}" for way, gb_per_s in bandwidth.gb_per_s.items())
    return [
        f"Read: this machine reads float32 at {bandwidth.best:.1f} GB/s ({bandwidth.best_way}).",
        f"      Measured, sums of {bandwidth.bytes / 1e9:.2f} GB: {measured}.",
    ]


def compare_lines(measured: Sequence[Measured]) -> list[str]:
    """A line per way. "ours is" says how many times faster the first way of the work is, with the range of the rounds."""
    works, ways = max(len(work.work) for work in measured), max(len(way) for work in measured for way in work.timings)
    lines = [f"{'work':<{works}} {'way':<{ways}} {'items':>5} {'median s':>8} {'per s':>8}  {'ours is':<22} {'differs':>7}"]
    for work in measured:
        for way, timing in work.timings.items():
            head, against = (work.work, "") if way == work.ours else ("", _against(work, way))
            line = f"{head:<{works}} {way:<{ways}} {work.items[way]:>5} {timing.median:>8.3f} {work.rate(way):>8.2f}  {against}"
            lines.append(line.rstrip())
    return lines


def quote_line(measured: Sequence[Measured]) -> str:
    """The ratios to transformers, which is the last way of each work, in one sentence."""
    said = [f"{work.work} {work.ratio(list(work.timings)[-1]):.2f}" for work in measured]
    return f"Times the speed of transformers: {', '.join(said)}."


def library_lines(ours: Peak, theirs: Peak) -> list[str]:
    """Which part of a ratio is not our doing, but the matrix library of the other engine on this processor."""
    ratio = ours.best / theirs.best
    return [
        f"Of these ratios a factor of {ratio:.2f} is the matrix library alone: {theirs.engine} multiplies float32 matrices",
        f"at {theirs.best:.1f} GF/s here ({theirs.best_product}), {ours.engine} at {ours.best:.1f} ({ours.best_product}).",
    ]


def load_line(before: float, after: float, threads: int, processors: int) -> str:
    """Whether the machine was quiet. The load after counts this bench too."""
    said = f"Load average {before:.2f} before, {after:.2f} after; {threads_of(threads)} on {processors} processors."
    return said if before < BUSY else f"{said} Others were running: measure again before quoting this."


def threads_of(count: int) -> str:
    """In words."""
    return "one thread" if count == 1 else f"{count} threads"


def _against(work: Measured, way: str) -> str:
    low, high = work.ratios(way)
    ratio = f"{work.ratio(way):.2f}x ({low:.2f} to {high:.2f})"
    return f"{ratio:<22} {work.differences[way]:>7.0e}"
