"""One run of the bench: measure, say, and return what a record keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import machine
from bench.bandwidth import Bandwidth, read_bandwidth
from bench.forms import Load, Writing
from bench.generation import Generation, time_generation
from bench.graphs import Row, own_forms, time_graphs
from bench.peak import Peak, onnxruntime_peak
from bench.race import Against, Race, RetrievalRace, Say
from bench.table import bandwidth_lines, generation_lines, graph_lines, load_line, peak_lines, threads_of
from bench.words_race import WordsRace
from preprocess.workers import usable_cpus
from runtime.graphs import Graphs, fixed_sizes


def bench(
    graphs: Graphs, names: Sequence[str], load: Load, writing: Writing | None, against: Against | None, say: Say
) -> dict[str, Any]:
    """Time the graphs `names`; with `writing`, whole texts; then, with `against`, our way and transformers' taking turns.
    Raises UserError."""
    race = _race(graphs, load, writing, against) if against else None
    before = machine.load_average()
    # The roof before and after: its highest measurement counts, and the machine may have been busy once.
    peak = onnxruntime_peak(load.threads, load.provider)
    rows = time_graphs(graphs, names, load, writing)
    peak = peak.merged(onnxruntime_peak(load.threads, load.provider))
    _say_graphs(graphs, load, rows, peak, say)
    written = _texts(graphs, load, writing, say) if writing else {}
    compared = race.run(peak, say) if race else {}
    loads = {"before": before, "after": machine.load_average()}
    say(load_line(loads["before"], loads["after"], load.threads, usable_cpus()))
    return {
        "batchsize": load.batchsize,
        "threads": load.threads,
        "provider": load.provider,
        **machine.facts(),
        "load_average": loads,
        "graphs": {key: graphs.content[key] for key in ("config", "target", "opset", "precision", "checkpoint")},
        "graphs_digest": graphs.source.digest,
        "length": load.length,
        "warmup": load.warmup,
        "peak": vars(peak),
        "rows": [row.record(peak.best) for row in rows],
        **written,
        **compared,
    }


def _race(graphs: Graphs, load: Load, writing: Writing | None, against: Against) -> Race:
    return WordsRace(graphs, load, writing, against) if writing else RetrievalRace(graphs, load, against)


def _texts(graphs: Graphs, load: Load, writing: Writing, say: Say) -> dict[str, Any]:
    """Measure whole texts and say; returns the part of the record that belongs to them."""
    bandwidth = read_bandwidth(load.threads, load.provider)
    texts = time_generation(graphs, load, writing)
    bandwidth = bandwidth.merged(read_bandwidth(load.threads, load.provider))
    _say_texts(texts, bandwidth, say)
    return {"bandwidth": vars(bandwidth), "generation": [text.record(bandwidth.best) for text in texts]}


def _say_texts(texts: Sequence[Generation], bandwidth: Bandwidth, say: Say) -> None:
    say("")
    for line in (*generation_lines(texts, bandwidth), "", *bandwidth_lines(bandwidth)):
        say(line)


def _say_graphs(graphs: Graphs, load: Load, rows: Sequence[Row], peak: Peak, say: Say) -> None:
    content = graphs.content
    form = f"{content['precision']}, opset {content['opset']}, target {content['target']}"
    say(f"Graphs of {content['model']} in {graphs.source.folder}")
    say(f"{form}; provider {load.provider}, {threads_of(load.threads)}, {load.warmup} runs before the timed ones.")
    say("")
    fixed = [row for row in rows if any(fixed_sizes(graphs, row.graph))]
    for line in (*graph_lines(rows, peak), "", *peak_lines(peak), *own_forms(fixed, load)):
        say(line)
