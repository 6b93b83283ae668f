"""The confusion picture: how often the pictures of each class got each answer, as SVG that takes its colours from the page.

R classes that have pictures. What was answered beyond them stands in one column more, if there is any.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from postprocess.charts import STYLE, TEXT, inline
from postprocess.page import clip
from postprocess.top1 import Confusion

MOST = 100  # classes that a picture is drawn of
NAMED = 30  # classes whose names stand beside it; of more, their numbers
COUNTED = 12  # classes whose cells hold the number of pictures
STEP = 10  # between numbers of classes
LETTERS = 20  # of a name
SHADES = 20  # of a colour
STRONG = 0.75  # of a colour, from where light letters stand on it
OTHERS = "other labels"
WIDTH, LARGEST_CELL, GAP, FONT = 460.0, 80.0, 8.0, 9.0  # points; 72 to the inch
EDGE = FONT / 2  # half a number stands out there
INSET, APART = 0.06, 0.25  # between cells, and before the column of other labels, in cells
# As in charts.PAGE: matplotlib's colours that stand for the page's.
PAGE = {
    "#050505": "var(--hit)",
    "#060606": "var(--miss)",
    "#070707": "var(--soft)",
    "#080808": "var(--panel)",
    "#090909": "var(--ink)",
}
RIGHT, WRONG, EMPTY, LIGHT, DARK = PAGE


def matrix(confusion: Confusion, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the R classes with pictures, and how many pictures of each got each of them as the answer, (R, R); or
    (R, R + 1), if there were other answers. `target` (C,) names the classes by their labels."""
    asked = np.unique(confusion.true)  # (R,)
    by_label = np.argsort(target[asked])  # (R,)
    place = np.searchsorted(target[asked], confusion.predicted, sorter=by_label).clip(max=len(asked) - 1)  # (K,)
    column = by_label[place]
    column[target[asked][column] != confusion.predicted] = len(asked)
    counts = np.zeros((len(asked), len(asked) + 1), np.int64)
    np.add.at(counts, (np.searchsorted(asked, confusion.true), column), confusion.pictures)
    return asked, counts if counts[:, -1].any() else counts[:, :-1]


def drawing(counts: np.ndarray, asked: np.ndarray, classes: Sequence[str]) -> str:
    """SVG of the `matrix` of the classes `asked` (R,): rows are classes, columns answers. The stronger the colour, the larger
    the share of the class; opacity is its square root, so that a few confusions among many pictures are seen."""
    rows, columns = counts.shape
    places, texts = _marks(asked, classes)  # on both sides of the matrix
    margin = GAP + FONT * max(map(_width, [*texts, OTHERS] if columns > rows else texts))
    across = np.arange(columns) + APART * (np.arange(columns) == rows)  # where the columns begin, in cells
    cell = min((WIDTH - margin - EDGE) / (across[-1] + 1), LARGEST_CELL)
    height = EDGE + cell * rows + margin
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        axes = figure.add_axes((margin / WIDTH, margin / height, cell * (across[-1] + 1) / WIDTH, cell * rows / height))
        axes.set_xlim(0, across[-1] + 1)
        axes.set_ylim(rows, 0)
        axes.set_axis_off()
        axes.add_patch(Rectangle((0, 0), rows, rows, facecolor=EMPTY))
        if columns > rows:
            axes.add_patch(Rectangle((across[-1], 0), 1, rows, facecolor=EMPTY))
        side = 1 - INSET if rows <= NAMED else 1.0
        row, column = np.nonzero(counts)
        share = counts[row, column] / counts.sum(1)[row]
        shade = np.ceil(np.sqrt(share) * SHADES).astype(np.int64)
        for colour, group in ((RIGHT, row == column), (WRONG, row != column)):
            for level in np.unique(shade[group]):
                chosen = group & (shade == level)
                axes.add_patch(_squares(across[column[chosen]], row[chosen], side, colour, level / SHADES))
        if rows <= COUNTED:
            for y, x, strong in zip(row, column, shade > STRONG * SHADES, strict=True):
                _write(axes, across[x] + 0.5, y + 0.5, str(counts[y, x]), LIGHT if strong else DARK, ha="center")
        for number, place in enumerate(places):
            _write(axes, -GAP / 2 / cell, place + 0.5, f"@{number}@", TEXT, ha="right")
            _write(axes, place + 0.5, rows + GAP / 2 / cell, f"@{number}@", TEXT, ha="right", rotation=90)
        if columns > rows:
            _write(axes, across[-1] + 0.5, rows + GAP / 2 / cell, OTHERS, TEXT, ha="right", rotation=90)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = inline(file.getvalue())
    for colour, variable in PAGE.items():
        svg = svg.replace(colour, variable)
    # Names come last and escaped: matplotlib would read mathematics into them, and knows no font for many of them.
    return re.sub("@([0-9]+)@", lambda mark: str(escape(texts[int(mark[1])])), svg)


def _marks(asked: np.ndarray, classes: Sequence[str]) -> tuple[list[int], list[str]]:
    """Which rows are marked beside the matrix, and with what: names, or numbers from 1 as in the table of the classes."""
    if len(asked) <= NAMED:
        return list(range(len(asked))), [clip(classes[number], LETTERS) for number in asked]
    places = [0, *range(STEP - 1, len(asked), STEP)]
    return places, [str(asked[place] + 1) for place in places]


def _width(text: str) -> float:
    """Of a text in most fonts, in heights of its letters."""
    return sum(1.0 if unicodedata.east_asian_width(letter) in "WF" else 0.55 for letter in text)


def _squares(x: np.ndarray, y: np.ndarray, side: float, colour: str, opacity: float) -> PathPatch:
    """One patch of squares in the cells whose corners are x and y (K,)."""
    corners = np.array([(0, 0), (side, 0), (side, side), (0, side), (0, 0)]) + (1 - side) / 2
    vertices = np.stack([x, y], 1)[:, None] + corners  # (K, 5, 2)
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(x)
    path = Path(vertices.reshape(-1, 2), codes)
    return PathPatch(path, facecolor=colour, alpha=opacity, linewidth=0, clip_on=False)


def _write(axes: Axes, x: float, y: float, text: str, colour: str, **place: Any) -> None:
    axes.text(x, y, text, color=colour, va="center", rotation_mode="anchor", fontsize=FONT, clip_on=False, **place)
