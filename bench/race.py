"""A comparison of models for retrieval, its inputs read early so that a wrong one is an error before minutes of work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bench.captions import choose_captions
from bench.compare import Measured, Setting, compare, load_rival
from bench.forms import Load
from bench.peak import Peak, torch_peak
from bench.table import compare_lines, library_lines, quote_line
from runtime.graphs import Graphs

if TYPE_CHECKING:
    from models.checkpoint import LoadReport

Say = Callable[[str], None]


@dataclass(frozen=True)
class Against:
    """What --compare transformers takes."""

    works: Sequence[str]
    checkpoint: Path
    vit_checkpoint: Path | None
    llm_checkpoint: Path | None
    rounds: int
    captions: Path | None = None  # annotations; None invents lengths
    pairs: int = 1
    itm_batchsize: int = 1


class Race(Protocol):
    """A comparison that can begin."""

    def run(self, peak: Peak, say: Say) -> dict[str, Any]:
        """Measure and say; returns the part of the record that belongs to it. `peak`: of the graphs' engine."""


class RetrievalRace:
    """Pictures, captions and pairs."""

    def __init__(self, graphs: Graphs, load: Load, against: Against) -> None:
        self._graphs = graphs
        self._captions = choose_captions(graphs, against.captions, against.pairs, load.length)
        self._rival = load_rival(graphs, against.checkpoint, against.vit_checkpoint, load.threads)
        self._setting = Setting(against.works, load.batchsize, against.itm_batchsize, against.rounds, load.threads)

    def run(self, peak: Peak, say: Say) -> dict[str, Any]:
        threads = self._setting.threads
        their_peak = torch_peak(threads)
        measured = compare(self._graphs, self._rival, self._captions, self._setting)
        their_peak = their_peak.merged(torch_peak(threads))
        self._say(measured, peak, their_peak, say)
        return {
            "compare": {
                "with": self._rival.describe(),
                **weights_of(self._rival.report),
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


def weights_of(report: LoadReport) -> dict[str, Any]:
    """The files that both sides have their weights from, as a record keeps them."""
    parts = {"vit_checkpoint": report.vit, "llm_checkpoint": report.llm}
    return {
        "checkpoint": {"file": report.path.name, "sha256": report.sha256, "layout": report.layout},
        **{part: {"file": found[0].name, "sha256": found[1]} if found else None for part, found in parts.items()},
    }
