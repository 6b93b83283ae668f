"""Each graph of a graphs/ folder, timed by itself in the runtime's own session: full batches, captions of full length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.flops import count_flops
from bench.forms import Form, Load, Writing, bind, forms
from bench.measure import Timing, time_loops
from models.errors import Misuse
from models.spec import LENGTH, GraphSpec
from runtime.graphs import Graphs
from runtime.session import open_session


@dataclass(frozen=True)
class Row:
    """One graph, measured."""

    graph: str
    batch: int
    length: int | None  # None for a graph without text
    timing: Timing
    flops: dict[str, int]  # of one run, by operator
    form: Form = field(default_factory=lambda: Form({}))

    @property
    def name(self) -> str:
        """The graph, and the part of its work that was timed."""
        return f"{self.graph} {self.form.part}".rstrip()

    @property
    def samples_per_s(self) -> float:
        """Over all timed loops: pictures or captions per second."""
        return self.batch / self.timing.mean

    @property
    def gflops(self) -> float:
        """1e9 operations per second, in the median loop."""
        return sum(self.flops.values()) / self.timing.median / 1e9

    def record(self, peak: float) -> dict[str, Any]:
        """As a record keeps it. `peak`: of the machine, in 1e9 operations per second."""
        return {
            "graph": self.graph,
            **({"part": self.form.part, "sizes": self.form.sizes} if self.form.part else {}),
            "batch": self.batch,
            "length": self.length,
            "loops": len(self.timing.seconds),
            "mean_ms": round(1e3 * self.timing.mean, 4),
            "median_ms": round(1e3 * self.timing.median, 4),
            "p99_ms": round(1e3 * self.timing.p99, 4),
            "samples_per_s": round(self.samples_per_s, 3),
            "flops": sum(self.flops.values()),
            "flops_by_operator": self.flops,
            "gflops_per_s": round(self.gflops, 2),
            "of_peak": round(self.gflops / peak, 4),
            "seconds": [round(s, 6) for s in self.timing.seconds],
        }


def chosen_names(graphs: Graphs, only: str | None) -> list[str]:
    """The graphs that --only lists, with commas between; all of the folder without it. Raises Misuse for another name."""
    if only is None:
        return list(graphs.content["graphs"])  # written has the files of an om/ folder by batch
    names = list(dict.fromkeys(only.split(",")))
    if unknown := [name for name in names if name not in graphs.written]:
        raise Misuse(f"{graphs.source.folder} has no graph {unknown[0]!r}; it has {', '.join(graphs.written)}.")
    return names


def time_graphs(graphs: Graphs, names: Sequence[str], load: Load, writing: Writing | None = None) -> list[Row]:
    """Each graph on full batches of random pictures and of texts of full length, with a progress bar."""
    rows: list[Row] = []
    bar = tqdm(names, "graphs", unit=" graphs", disable=None, leave=False)
    for name in bar:
        bar.set_postfix_str(name)
        rows += time_graph(graphs, name, load, writing)
    return rows


def time_graph(graphs: Graphs, name: str, load: Load, writing: Writing | None = None) -> list[Row]:
    """One graph in each of its forms. A graph with fixed axes is timed at its own batch and length, not at those of `load`."""
    symbolic, rows = graphs.symbolic[name], []
    takes_text = any(LENGTH in t.shape for t in symbolic.inputs)
    wanted = forms(graphs, name, load, writing)
    counted = [count_flops(graphs.path(name), bind(symbolic, form.sizes)) for form in wanted]
    session = open_session(graphs, name, load.provider, load.threads)
    for form, flops in zip(wanted, counted, strict=True):
        feeds = full_inputs(graphs, name, form.sizes)
        timing = time_loops(partial(session.run, **feeds), load.loops, load.warmup)
        rows.append(Row(name, form.rows, form.sizes.get(LENGTH) if takes_text else None, timing, flops, form))
    return rows


def full_inputs(graphs: Graphs, name: str, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Inputs of graph `name` in these sizes of its axes."""
    symbolic = graphs.symbolic[name]
    return random_inputs(bind(symbolic, sizes), _vocab(graphs, symbolic))


def random_inputs(bound: GraphSpec, vocab: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of a graph whose axes are all numbers: no padding, so that every position counted in the operations is used."""
    draw = np.random.default_rng(seed)
    shapes = {tensor.name: tuple(int(d) for d in tensor.shape) for tensor in bound.inputs}
    before = sum(
        shapes[name][axis] for name, axis in (("past_mask", -1), ("prompt_mask", -1), ("llm_prompt", -2)) if name in shapes
    )
    kept = next((shape[0] for name, shape in shapes.items() if name.startswith("past.")), 1)  # rows
    feeds: dict[str, np.ndarray] = {}
    for tensor in bound.inputs:
        shape = shapes[tensor.name]
        if tensor.name == "text_ids":
            feeds[tensor.name] = draw.integers(0, vocab, shape, dtype=np.int64)
        elif tensor.name.endswith("mask"):
            feeds[tensor.name] = np.ones(shape, np.int64)
        elif tensor.name == "positions":
            feeds[tensor.name] = np.ascontiguousarray(np.broadcast_to(before + np.arange(shape[-1]), shape))
        elif tensor.name == "beam_index":
            feeds[tensor.name] = np.arange(np.prod(shape), dtype=np.int64).reshape(shape) % kept
        else:
            feeds[tensor.name] = draw.standard_normal(shape, np.float32).astype(tensor.dtype)
    return feeds


def _vocab(graphs: Graphs, spec: GraphSpec) -> int:
    """How many words the ids of a graph can be: of the decoder, or of what reads the text."""
    logits = [t for t in spec.outputs if t.name == "logits"]
    return int(logits[0].shape[-1]) if logits else graphs.config.text.vocab


def own_forms(rows: Sequence[Row], load: Load) -> list[str]:
    """What to say about graphs that were exported for another batch or length than was asked for: a line, or none."""
    fixed = [row for row in rows if not row.form.part]  # a part is timed in the form that was asked for
    other = [row for row in fixed if row.batch != load.batchsize or row.length not in (None, load.length)]
    said = [f"{row.graph} (batch {row.batch}{f', length {row.length}' if row.length else ''})" for row in other]
    return [f"Timed in the one form that they were exported in: {', '.join(said)}."] if said else []
