"""How the scores of captions or answers are spread, as SVG that stands inside the page and takes its colours from it."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from postprocess.charts import GRID, RERANKED, STYLE, inline

BARS = 30  # at most
STEPS = (0.05, 0.1, 0.2, 0.25, 0.5, 1.0)  # widths of a bar
# As in charts.PAGE: matplotlib's colour that stands for the page's.
CONSTANT, PAGE = "#0a0a0a", "var(--chance)"


@dataclass(frozen=True)
class Spread:
    """How many scores lie between each two edges; the last edge is among the last ones."""

    edges: list[float]  # B + 1
    own: list[int]  # B
    constant: list[int]  # B, of the same text for everything


def by_score(own: np.ndarray, constant: np.ndarray) -> Spread:
    """Of scores from 0, (N,) each."""
    top = max(float(own.max()), float(constant.max()), 1.0)
    step = next((step for step in STEPS if top / step <= BARS), math.ceil(top / BARS))
    return _spread(own, constant, step * np.arange(math.ceil(top / step) + 1))


def by_percent(own: np.ndarray, constant: np.ndarray) -> Spread:
    """Of scores from 0 to 100, (N,) each, a bar for every ten: of ten people there are no others."""
    return _spread(own, constant, np.arange(-5.0, 106.0, 10.0))


def drawing(spread: Spread) -> str:
    """SVG: the scores as bars, those of the constant text as a line."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "scores"}):
        figure = Figure(figsize=(5.2, 3.1))
        axes = figure.add_axes((0.1, 0.08, 0.88, 0.89))
        axes.stairs(spread.own, spread.edges, fill=True, color=RERANKED, zorder=3)
        axes.stairs(spread.constant, spread.edges, color=CONSTANT, linewidth=1.8, zorder=4)
        axes.set_xlim(spread.edges[0], spread.edges[-1])
        axes.set_ylim(0, max(1, *spread.own, *spread.constant) * 1.04)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0, pad=5)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return inline(file.getvalue()).replace(CONSTANT, PAGE)


def _spread(own: np.ndarray, constant: np.ndarray, edges: np.ndarray) -> Spread:
    counts = (np.histogram(scores, edges)[0].tolist() for scores in (own, constant))
    return Spread([round(float(edge), 6) for edge in edges], *counts)
