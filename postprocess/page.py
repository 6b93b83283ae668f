"""The pages of the reports, made of the templates beside this file. A page stands alone: its pictures are data: URIs, its
charts are inline SVG, its fonts the reader's, and it has no script.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

LISTED = 50  # left-out samples that a page lists; report.json has them all
LETTERS = 280  # of a caption or a path that a page shows


@dataclass(frozen=True)
class Report:
    """What was written, for the screen."""

    page: Path
    text: str  # what report.txt holds too


def render(template: str, facts: dict[str, Any], **values: Any) -> str:
    """The text of the page. Whatever `values` holds is escaped, but for markupsafe.Markup."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        clip=clip, commas="{:,}".format, percent="{:.2f}".format, figure=_figure, words=_words, label=_label
    )
    # A preset, the file that --config named, or that of the results.
    title = Path(str(facts["graphs"]["model"] if facts["graphs"] else facts["files"][0]["file"])).stem
    return environment.get_template(template).render(title=title, facts=facts, **values)


def clip(text: object, letters: int = LETTERS) -> str:
    """Printable and bounded: half a surrogate pair becomes "?", a long text ends in an ellipsis."""
    plain = str(text).encode("utf-8", "replace").decode("utf-8").strip()
    return plain if len(plain) <= letters else plain[: letters - 1].rstrip() + "…"


def plain(text: object, letters: int = LETTERS) -> str:
    """For a terminal, which would obey control characters."""
    return clip("".join(letter if letter.isprintable() else "?" for letter in str(text)), letters)


def _label(name: str) -> str:
    """A setting's name in words; k_test is known by its own."""
    return name if name == "k_test" else name.replace("_", " ")


def _figure(value: object) -> str:
    """A small number as 1.2e-06, a plain one as it is."""
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def _words(value: object) -> str:
    """A setting as a person writes it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(_words(part) for part in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(part)}" for name, part in value.items())
    if value is None:
        return "default"
    return f"{value:g}" if isinstance(value, float) else str(value)
