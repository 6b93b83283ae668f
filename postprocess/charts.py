"""Recall@k curves as SVG that stands inside the page and takes its colours from it (light or dark)."""

from __future__ import annotations

import io
import re

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

MOST = 50  # curves go to recall at this
# matplotlib wants colours, the page has variables: each of these stands for one and is replaced in the SVG.
PAGE = {"#010101": "var(--muted)", "#020202": "var(--line)", "#030303": "var(--reranked)", "#040404": "var(--itc)"}
TEXT, GRID, RERANKED, ITC = PAGE
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "recall",  # same numbers, same file
    "font.size": 9,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": GRID,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}


def recall_curves(reranked: list[float], itc: list[float]) -> str:
    """SVG of recall in percent at k = 1, 2, ...; the lists may differ in length (k_test ends the first)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.1))
        axes = figure.add_axes((0.085, 0.135, 0.895, 0.835))
        longest = max(len(reranked), len(itc))
        for values, colour, width, order in ((itc, ITC, 1.8, 3), (reranked, RERANKED, 2.4, 4)):
            k = range(1, len(values) + 1)
            axes.plot(k, values, color=colour, linewidth=width, zorder=order, solid_capstyle="round", clip_on=False)
            marked = [at for at in (1, 5, 10) if at <= len(values)]
            axes.plot(marked, [values[at - 1] for at in marked], "o", color=colour, markersize=5, zorder=order, clip_on=False)
        lowest = min(reranked + itc)
        bottom = max(0.0, 10 * (lowest // 10) - 5)
        axes.set_ylim(bottom, 100 + (100 - bottom) * 0.03)
        axes.set_xscale("log")
        axes.set_xlim(0.93, max(longest, 2) * 1.07)
        ticks = [k for k in (1, 2, 3, 5, 10, 20, 30, 50) if k <= longest]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([str(k) for k in ticks])
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0, pad=5)
        axes.set_xlabel("k")
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return inline(file.getvalue())


def inline(svg: str) -> str:
    """The bare <svg> element: no prologue, no size of its own, no names that two charts would share, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for size in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    for colour, variable in PAGE.items():
        svg = svg.replace(colour, variable)
    return svg
