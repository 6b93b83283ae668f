"""From outputs/ and data/ to report/: report.json for programs, report.html and report.txt for people. Runs no model.

The page stands alone: its pictures are data: URIs, its charts are inline SVG, its fonts the reader's, and it has no script.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from models import manifest
from models.errors import UserError
from postprocess import inputs, recall
from postprocess.charts import MOST, recall_curves
from postprocess.gallery import Pictures, gallery
from postprocess.recall import Assessment, Metrics
from preprocess.dataset import RetrievalData
from runtime.outputs import RetrievalOutputs

SIDES = (("txt", "Picture to caption"), ("img", "Caption to picture"))
METHODS = (("reranked", "Re-ranked"), ("itc", "ITC alone"), ("chance", "Chance"))
LISTED = 50  # left-out samples that the page lists; report.json has them all
LETTERS = 280  # of a caption or a path that the page shows

# What the page's tables take from the manifests, and as what.
PARITY = {"graph": str, "output": str, "cases": str, "max_abs": float, "max_rel": float, "bound": float}
TIMING = {"stage": str, "items": int, "seconds": float, "resumed": int}
LEFT_OUT = {"image": str, "entry": int, "reason": str}

Curves = dict[str, dict[str, list[float]]]  # method -> side -> recall at 1, 2, ...


@dataclass(frozen=True)
class Report:
    """What was written, for the screen."""

    page: Path
    text: str  # what report.txt holds too


def write(outputs: Path, data: Path | None, out: Path, keys: str = "blip", verify: bool = False) -> Report:
    """Make the folder `out` of the outputs/ folder and its data/ folder (None: where the outputs say it is).

    `keys` ("blip" or "ascend") names the metrics in report.json. Raises UserError when a folder is damaged or does not
    belong to the other, and Misuse when `out` is something else's; then no report is left.
    """
    run, source = inputs.read(outputs, data, verify)
    with manifest.new_folder(out, "report") as folder:
        found = recall.assess(run, source.image_of_text)
        metrics = {"reranked": recall.metrics(found.reranked), "itc": recall.metrics(found.itc), "chance": found.chance}
        facts = _facts(run, source)
        curves = _curves(found, facts["counts"]["k_test"])
        named = {method: recall.rename(values, keys) for method, values in metrics.items()}
        record = {"task": "retrieval", "keys": keys, "metrics": named, "curves": curves, **facts}
        manifest.write_text(folder / "report.json", json.dumps(record, indent=1) + "\n")
        page = _page(run, source, found, metrics, curves, {**facts, "command": manifest.command()})
        manifest.write_text(folder / "report.html", page)
        text = _text(facts["counts"], metrics, keys)
        manifest.write_text(folder / "report.txt", text + "\n")
        content = {"task": "retrieval", "metrics": metrics, **{part: facts[part] for part in ("outputs", "data", "graphs")}}
        manifest.write(folder, "report", content)
    return Report(out / "report.html", text)


def table(metrics: dict[str, Metrics]) -> str:
    """Recall of every method in aligned text, percent."""
    lines = [" " * 20 + "".join(f"{head:>9}" for head in ("R@1", "R@5", "R@10", "mean"))]
    for side, title in SIDES:
        lines.append(title)
        for method, name in METHODS:
            lines.append(f"  {name:<18}" + "".join(f"{value:9.2f}" for value in _row(metrics[method], side)))
    return "\n".join(lines)


def _text(counts: dict[str, int], metrics: dict[str, Metrics], keys: str) -> str:
    """What is shown on a screen."""
    size = f"{counts['pictures']:,} pictures, {counts['captions']:,} captions, {counts['pairs']:,} pairs re-ranked"
    head = f"{size} (k_test {counts['k_test']}). Recall in percent:"
    return f"{head}\n\n{table(metrics)}\n\neval_result: {recall.rename(metrics['reranked'], keys)}"


def _row(values: Metrics, side: str) -> list[float]:
    return [values[f"{side}_{part}"] for part in (*(f"r{k}" for k in recall.CUTS), "r_mean")]


def _facts(run: RetrievalOutputs, data: RetrievalData) -> dict[str, Any]:
    """Everything the report says beside the numbers. Raises UserError when a manifest lacks a part of it."""
    try:
        graphs, backend = run.run["graphs"], run.run["backend"]
        protocol = {**data.protocol, "k_test": int(run.run["k_test"])}
        everything = max(len(data.images), len(data.captions))  # a k_test beyond it changes nothing
        identity = ("digest", "folder", "model", "config", "opset", "target", "precision", "used")
        checkpoint = {part: str(graphs["checkpoint"][part]) for part in ("file", "sha256")}
        return {
            "counts": {
                "pictures": len(data.images),
                "captions": len(data.captions),
                "pairs": len(run.pair_image),
                "k_test": protocol["k_test"],
                "without_captions": len(data.images) - len(np.unique(data.image_of_text)),
                "left_out": len(data.broken),
            },
            "protocol": protocol,
            "deviations": _deviations(graphs["config"]["protocol"], protocol, everything),
            "parity": _rows(graphs["parity"], PARITY),
            "timings": _rows(run.run["timings"], TIMING),
            "backend": dict(backend),
            "graphs": {part: graphs[part] for part in identity} | {"checkpoint": checkpoint},
            "data": _origin(data.source),
            "outputs": _origin(run.source),
            "left_out": _rows(data.broken, LEFT_OUT),
            "versions": manifest.versions(),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{run.source.folder / manifest.NAME} or {data.source.folder / manifest.NAME} lacks or garbles {error}. "
            f"Run {manifest.MADE_WITH['data']} and {manifest.MADE_WITH['outputs']} again."
        ) from error


def _rows(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, type]) -> list[dict[str, Any]]:
    return [{name: kind(row[name]) for name, kind in columns.items()} for row in rows]


def _origin(source: manifest.Manifest) -> dict[str, Any]:
    """Which folder it was, what made it, and of which annotations when it says so."""
    notes = []
    if annotations := source.content.get("annotations"):
        notes.append(f"annotations {annotations['file']} {annotations['sha256']}")
    made_by = {part: source.made_by[part] for part in ("command", "python")} | {"versions": dict(source.made_by["versions"])}
    return {"digest": source.digest, "folder": str(source.folder), "made_by": made_by, "notes": notes}


def _deviations(published: Mapping[str, Any], used: Mapping[str, Any], everything: int) -> list[dict[str, Any]]:
    """Where the data or the run departs from the protocol that belongs to the model: other settings, other numbers."""

    def plain(name: str, value: Any) -> Any:  # as JSON has it; of k_test what has an effect
        return min(value, everything) if name == "k_test" else list(value) if isinstance(value, tuple) else value

    return [
        {"name": name, "model": value, "used": used[name]}
        for name, value in published.items()
        if plain(name, value) != plain(name, used[name])
    ]


def _curves(found: Assessment, k_test: int) -> Curves:
    """Recall at 1 .. 50 or as far as there is something to find; re-ranking says nothing beyond k_test."""
    curves: Curves = {"reranked": {}, "itc": {}}
    for side, items in (("txt", len(found.itc.img)), ("img", len(found.itc.txt))):
        most = min(MOST, items)
        curves["reranked"][side] = recall.curve(getattr(found.reranked, side), min(most, k_test))
        curves["itc"][side] = recall.curve(getattr(found.itc, side), most)
    return curves


def _page(
    run: RetrievalOutputs,
    data: RetrievalData,
    found: Assessment,
    metrics: dict[str, Metrics],
    curves: Curves,
    facts: dict[str, Any],
) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        clip=_clip, commas="{:,}".format, percent="{:.2f}".format, figure=_figure, words=_words, label=_label
    )
    own: list[list[int]] = [[] for _ in data.images]
    for caption, picture in enumerate(data.image_of_text.tolist()):
        own[picture].append(caption)
    picture = Pictures(data)
    return environment.get_template("report.html").render(
        title=Path(str(facts["graphs"]["model"])).stem,  # a preset, or the file that --config named
        facts=facts,
        metrics=metrics,
        rows={side: [(method, name, _row(metrics[method], side)) for method, name in METHODS] for side, _ in SIDES},
        sides=SIDES,
        # Our own SVG, made of numbers alone: the one thing that is not escaped.
        charts={side: Markup(recall_curves(curves["reranked"][side], curves["itc"][side])) for side, _ in SIDES},
        galleries={
            "txt": gallery(found.pairs_i2t, found.reranked.txt, found.itc.txt),
            "img": gallery(found.pairs_t2i, found.reranked.img, found.itc.img),
        },
        captions=data.captions,
        own=own,
        image_of_text=data.image_of_text.tolist(),
        picture=picture,
        frame=picture.frame(),
        listed=LISTED,
    )


def _clip(text: object, letters: int = LETTERS) -> str:
    """Printable and bounded: half a surrogate pair becomes "?", a long text ends in an ellipsis."""
    plain = str(text).encode("utf-8", "replace").decode("utf-8").strip()
    return plain if len(plain) <= letters else plain[: letters - 1].rstrip() + "…"


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
