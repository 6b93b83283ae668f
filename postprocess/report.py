"""From the outputs/ and data/ of retrieval to report/: report.json for programs, report.html and report.txt for people.
Runs no model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from models import manifest
from postprocess import facts, inputs, recall
from postprocess.charts import MOST, recall_curves
from postprocess.gallery import Pictures, gallery
from postprocess.inputs import AisBench
from postprocess.page import LISTED, Report, render
from postprocess.recall import Assessment, Metrics
from preprocess.dataset import RetrievalData
from runtime.outputs import RetrievalOutputs

SIDES = (("txt", "Picture to caption"), ("img", "Caption to picture"))
METHODS = (("reranked", "Re-ranked"), ("itc", "ITC alone"), ("chance", "Chance"))

Curves = dict[str, dict[str, list[float]]]  # method -> side -> recall at 1, 2, ...


def write(outputs: Path | AisBench, data: Path | None, out: Path, keys: str = "blip", verify: bool = False) -> Report:
    """Make the folder `out` of the outputs/ folder and its data/ folder (None: where the outputs say it is). Where nothing was
    re-ranked it says so, and has ITC alone.

    `keys` ("blip" or "ascend") names the metrics in report.json. Raises UserError when a folder is damaged or does not
    belong to the other, and Misuse when `out` is something else's; then no report is left.
    """
    run, source = inputs.read(outputs, data, verify)
    with manifest.new_folder(out, "report", task="retrieval") as folder:
        found = recall.assess(run, source.image_of_text)
        metrics = {"reranked": recall.metrics(found.reranked), "itc": recall.metrics(found.itc), "chance": found.chance}
        said = _facts(run, source)
        if not said["reranked"]:
            del metrics["reranked"]
        curves = _curves(found, said["counts"]["k_test"] if said["reranked"] else 0)
        named = {method: recall.rename(values, keys) for method, values in metrics.items()}
        record = {"task": "retrieval", "keys": keys, "metrics": named, "curves": curves, **said}
        manifest.write_text(folder / "report.json", json.dumps(record, indent=1) + "\n")
        html = _page(run, source, found, metrics, curves, {**said, "command": manifest.command()})
        manifest.write_text(folder / "report.html", html)
        text = _text(said["counts"], metrics, keys)
        manifest.write_text(folder / "report.txt", text + "\n")
        content = {"task": "retrieval", "metrics": metrics, **{part: said[part] for part in ("outputs", "data", "graphs")}}
        manifest.write(folder, "report", content)
    return Report(out / "report.html", text)


def table(metrics: dict[str, Metrics]) -> str:
    """Recall of every method in aligned text, percent."""
    lines = [" " * 20 + "".join(f"{head:>9}" for head in ("R@1", "R@5", "R@10", "mean"))]
    for side, title in SIDES:
        lines.append(title)
        for method, name in methods(metrics):
            lines.append(f"  {name:<18}" + "".join(f"{value:9.2f}" for value in _row(metrics[method], side)))
    return "\n".join(lines)


def methods(metrics: dict[str, Metrics]) -> list[tuple[str, str]]:
    """Those of METHODS that there are, with their names."""
    return [(method, name) for method, name in METHODS if method in metrics]


def _text(counts: dict[str, int], metrics: dict[str, Metrics], keys: str) -> str:
    """What is shown on a screen."""
    size = f"{counts['pictures']:,} pictures, {counts['captions']:,} captions"
    how = f"{counts['pairs']:,} pairs re-ranked (k_test {counts['k_test']})" if "reranked" in metrics else "nothing re-ranked"
    best = metrics.get("reranked", metrics["itc"])
    return f"{size}, {how}. Recall in percent:\n\n{table(metrics)}\n\neval_result: {recall.rename(best, keys)}"


def _row(values: Metrics, side: str) -> list[float]:
    return [values[f"{side}_{part}"] for part in (*(f"r{k}" for k in recall.CUTS), "r_mean")]


def _facts(run: RetrievalOutputs, data: RetrievalData) -> dict[str, Any]:
    """Everything the report says beside the numbers. Raises UserError when a manifest lacks a part of it."""
    with facts.complete(run.source, data.source):
        protocol = {**data.protocol, "k_test": int(run.run["k_test"])}
        reranked = bool(run.run.get("reranked", True))
        counts = {
            "pictures": len(data.images),
            "captions": len(data.captions),
            "pairs": len(run.pair_image) if reranked else 0,
            "k_test": protocol["k_test"],
            "without_captions": len(data.images) - len(np.unique(data.image_of_text)),
            "left_out": len(data.broken),
        }
        everything = max(len(data.images), len(data.captions))
        return {
            "counts": counts,
            "reranked": reranked,
            **facts.shared(run.source, data.source, protocol, data.broken, everything),
        }


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
    said: dict[str, Any],
) -> str:
    own: list[list[int]] = [[] for _ in data.images]
    for caption, picture in enumerate(data.image_of_text.tolist()):
        own[picture].append(caption)
    picture = Pictures(data)
    return render(
        "report.html",
        said,
        metrics=metrics,
        rows={side: [(method, name, _row(metrics[method], side)) for method, name in methods(metrics)] for side, _ in SIDES},
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
