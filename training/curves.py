"""The picture of a training: losses, learning rate and metrics over its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Line = tuple[list[int], list[float]]  # steps, values
ITC = "itc_"  # leads the name of a figure by the embeddings alone: dashed, in the colour of the re-ranked one
STEP = FuncFormatter(lambda value, _: f"{value:,.0f}")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw what the rows of a log say, as PNG. Nothing is drawn, and false returned, when they say nothing."""
    losses, metrics = _lines(rows, "losses"), _lines(rows, "metrics")
    rates = [row for row in rows if "lr" in row]
    if not losses and not metrics:
        return False
    panels: list[tuple[str, dict[str, Line]]] = [("loss", losses)] if losses else []
    if rates:
        panels.append(("learning rate", {"": ([row["step"] for row in rates], [row["lr"] for row in rates])}))
    # Metrics of other sizes (percent, CIDEr in hundreds) have their own panels: one would flatten the other.
    for low, high in ((-math.inf, 2.0), (2.0, math.inf)):
        some = {name: line for name, line in metrics.items() if low < max(map(abs, line[1])) <= high}
        if some:
            panels.append(("metric", some))
    figure = Figure(figsize=(8, 1 + 2.6 * len(panels)), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True):
        colours = list(dict.fromkeys(name.removeprefix(ITC) for name in lines))
        for name, (steps, values) in lines.items():
            how = {"color": f"C{colours.index(name.removeprefix(ITC))}", "linestyle": "--" if name.startswith(ITC) else "-"}
            how |= {"marker": "x" if name.startswith(ITC) else "o"} if len(steps) < 30 else {}
            axes.plot(steps, values, label=name, linewidth=1.6, markersize=3.5, **how)
        axes.set_ylabel(title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if not any(lines):
            axes.yaxis.set_major_formatter("{x:.3g}")
        else:
            axes.legend(frameon=False, ncols=2 if len(lines) > 6 else 1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.align_ylabels()
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(STEP)
    beside = path.with_name(f".{path.name}.part")
    figure.savefig(beside, format="png", dpi=120)
    beside.replace(path)
    return True


def _lines(rows: Sequence[dict[str, Any]], kind: str) -> dict[str, Line]:
    """The numbers of one kind, by name."""
    found: dict[str, Line] = {}
    for row in rows:
        for name, value in row.get(kind, {}).items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    return found
