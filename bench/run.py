"""One run of the bench: measure, say, and return what a record keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.captions import choose_captions
from bench.compare import Measured, Setting, compare, load_rival
from bench.graphs import Load, Row, own_forms, time_graphs
from bench.peak import Peak, onnxruntime_peak, torch_peak
from bench.table import compare_lines, graph_lines, library_lines, load_line, peak_lines, quote_line, threads_of
from preprocess.workers import usable_cpus
from runtime.graphs import Graphs

Say = Callable[[str], None]


@dataclass(frozen=True)
class Against:
    """What --compare transformers takes."""

    works: Sequence[str]
    checkpoint: Path
    vit_checkpoint: Path | None
    captions: Path | None  # annotations; None invents lengths
    pairs: int
    itm_batchsize: int
    rounds: int


def bench(graphs: Graphs, names: Sequence[str], load: Load, against: Against | None, say: Say) -> dict[str, Any]:
    """Time the graphs `names`, then, with `against`, our way and transformers' taking turns. Raises UserError."""
    race = _Race(graphs, load, against) if against else None
    before = machine.load_average()
    # The roof before and after: its highest measurement counts, and the machine may have been busy once.
    peak = onnxruntime_peak(load.threads, load.provider)
    rows = time_graphs(graphs, names, load)
    peak = peak.merged(onnxruntime_peak(load.threads, load.provider))
    _say_graphs(graphs, load, rows, peak, say)
    compared = race.run(peak, say) if race else {}
    loads = {"before": before, "after": machine.load_average()}
    say(load_line(loads["before"], loads["after"], load.threads, usable_cpus()))
    return {
        **machine.facts(),
        "load_average": loads,
        "graphs": {key: graphs.content[key] for key in ("config", "target", "opset", "precision", "checkpoint")},
        "graphs_digest": graphs.source.digest,
        "length": load.length,
        "warmup": load.warmup,
        "peak": vars(peak),
        "rows": [row.record(peak.best) for row in rows],
        **compared,
    }


class _Race:
    """The comparison, its inputs read early so that a wrong one is an error before minutes of work."""

    def __init__(self, graphs: Graphs, load: Load, against: Against) -> None:
        self._graphs = graphs
        self._captions = choose_captions(graphs, against.captions, against.pairs, load.length)
        self._rival = load_rival(graphs, against.checkpoint, against.vit_checkpoint, load.threads)
        self._setting = Setting(against.works, load.batchsize, against.itm_batchsize, against.rounds, load.threads)

    def run(self, peak: Peak, say: Say) -> dict[str, Any]:
        """Measure and say; returns the part of the record that belongs to it."""
        threads = self._setting.threads
        their_peak = torch_peak(threads)
        measured = compare(self._graphs, self._rival, self._captions, self._setting)
        their_peak = their_peak.merged(torch_peak(threads))
        self._say(measured, peak, their_peak, say)
        report = self._rival.report
        return {
            "compare": {
                "with": self._rival.describe(),
                "checkpoint": {"file": report.path.name, "sha256": report.sha256, "layout": report.layout},
                "vit_checkpoint": {"file": report.vit[0].name, "sha256": report.vit[1]} if report.vit else None,
                "captions": self._captions.describe(),
                "itm_batchsize": self._setting.itm_batchsize,
                "rounds": self._setting.rounds,
                "peak": vars(their_peak),
                "works": [work.record() for work in measured],
            }
        }

    def _say(self, measured: list[Measured], peak: Peak, their_peak: Peak, say: Say) -> None:
        setting = self._setting
        say("")
        say(f"Taking turns with {self._rival.describe()}, {setting.rounds} rounds, same weights.")
        say(f"Captions: {self._captions.describe()}.")
        say("")
        for line in (*compare_lines(measured), "", quote_line(measured), *library_lines(peak, their_peak)):
            say(line)


def _say_graphs(graphs: Graphs, load: Load, rows: list[Row], peak: Peak, say: Say) -> None:
    content = graphs.content
    form = f"{content['precision']}, opset {content['opset']}, target {content['target']}"
    say(f"Graphs of {content['model']} in {graphs.source.folder}")
    say(f"{form}; provider {load.provider}, {threads_of(load.threads)}, {load.warmup} runs before the timed ones.")
    say("")
    for line in (*graph_lines(rows, peak), "", *peak_lines(peak), *own_forms(rows, load)):
        say(line)
