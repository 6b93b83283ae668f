"""From the outputs/ and data/ of zero-shot classification to report/: report.json and predictions.json for programs,
report.html and report.txt for people, and the predictions once more as mindformers writes them. Runs no model.

When a class that has pictures is not among the labels, these could never be right: then there is no accuracy, but the
sentence why (top1.obstacle) in its place, and the rest is as always: the pictures, their labels, the predictions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from models import manifest
from models.errors import UserError
from postprocess import confusion, facts, top1
from postprocess.answers import TOP, Answers, Card, answers, card, predictions
from postprocess.gallery import HITS, MISSES, Pictures, spread
from postprocess.made_from import open_data
from postprocess.page import LISTED, Report, plain, render
from postprocess.top1 import Accuracy
from preprocess.dataset import ClassifyData
from preprocess.dataset import read_classify as read_data
from runtime.outputs import ClassifyOutputs
from runtime.outputs import read_classify as read_outputs

RESULT = "zero_shot_image_classification_result.txt"  # mindformers r1.0 trainer/base_trainer.py: {task}_result.txt
# What decides the scores beside labels and data: by the manifest's name, and by the report's, as retrieval has it.
ASKED = {
    "templates": "templates",
    "query": "query",
    "temperature": "temperature",
    "temperature_from": "temperature_from",
}
CONFUSED = 12  # confused classes that the page lists
NAMES = 1000  # classes, or labels, that the page lists; report.json has them all
LETTERS = 28  # of a name in the text


def write(outputs: Path, data: Path | None, out: Path, verify: bool = False) -> Report:
    """Make the folder `out` of the outputs/ folder and its data/ folder (None: where the outputs say it is).

    Raises UserError when a folder is damaged or does not belong to the other, or when a probability is
    none; Misuse when `out` is something else's. Then no report is left, and an older one stays.
    """
    run, source = _read(outputs, data, verify)
    with manifest.new_folder(out, "report", task="classify") as folder:
        found, label = answers(run.probability), np.asarray(source.label)
        target = top1.targets(source.classes, run.labels)
        why = top1.obstacle(target, label, source.classes, len(run.labels))
        accuracy = None if why else top1.assess(found.label, label, target, len(run.labels))
        said = _facts(run, source)
        record = {"task": "classify", **_record(accuracy, run.labels, source.classes), "no_accuracy": why, **said}
        manifest.write_text(folder / "report.json", json.dumps(record, indent=1) + "\n")
        listed = predictions(found, run.labels)
        manifest.write_text(folder / "predictions.json", json.dumps(listed) + "\n")
        manifest.write_text(folder / RESULT, str(listed))
        html = _page(run, source, found, accuracy, why, {**said, "command": manifest.command()})
        manifest.write_text(folder / "report.html", html)
        text = _text(accuracy, why, said["counts"], run.labels, source.classes)
        manifest.write_text(folder / "report.txt", text + "\n")
        content = {"task": "classify", "metrics": record["metrics"]}
        manifest.write(folder, "report", content | {part: said[part] for part in ("outputs", "data", "graphs")})
    return Report(out / "report.html", text)


def _read(outputs: Path, data: Path | None, verify: bool) -> tuple[ClassifyOutputs, ClassifyData]:
    """Both folders, of the same pictures. Raises UserError for whatever would end in an index error or a wrong number."""
    run = read_outputs(outputs, verify)
    source = open_data(run.source, data, lambda folder: read_data(folder, verify))
    pictures, again = len(source.images), f"Run {manifest.MADE_WITH['outputs']} classify again."
    if not pictures or not run.labels:
        raise UserError(f"{pictures} pictures and {len(run.labels)} labels: accuracy needs one of each. {again}")
    if len(run.probability) != pictures:
        raise UserError(f"{outputs} has probabilities of {len(run.probability)} pictures, its data has {pictures}. {again}")
    if len({name.strip() for name in run.labels}) < len(run.labels):
        raise UserError(f"{outputs}: a label is there twice, so a class cannot be known by it. {again}")
    return run, source


def _facts(run: ClassifyOutputs, data: ClassifyData) -> dict[str, Any]:
    """Everything the report says beside the numbers. Raises UserError when a manifest lacks a part of it."""
    with facts.complete(run.source, data.source):
        classes = {name.strip() for name in data.classes}
        counts = {
            "pictures": len(data.images),
            "classes": len(data.classes),
            "labels": len(run.labels),
            "distractors": sum(name.strip() not in classes for name in run.labels),
            "without_pictures": len(data.classes) - len(np.unique(data.label[:])),
            "left_out": len(data.broken),
        }
        protocol = {**{name: run.run[part] for part, name in ASKED.items()}, **data.protocol}
        protocol["templates"] = list(map(str, protocol["templates"]))
        shared = facts.shared(run.source, data.source, protocol, data.broken, 0)
        shared["protocol"].pop("k_test", None)  # nothing is re-ranked
        return {"counts": counts, "labels": run.labels, **shared}


def _record(accuracy: Accuracy | None, labels: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    """The numbers, for report.json; percent. Without accuracy nothing is known."""
    if accuracy is None:
        return {"metrics": None, "classes": [], "confusion": []}
    cells = accuracy.confusion
    return {
        "metrics": {name: getattr(accuracy, name) for name in ("top1", "top5", "mean_class", "chance")},
        "classes": [
            {
                "class": name,
                "pictures": each.pictures,
                "right": each.right,
                "top1": each.top1,
                "most_frequent_wrong": None if each.wrong is None else labels[each.wrong],
                "most_frequent_wrong_pictures": each.wrong_pictures,
            }
            for name, each in zip(classes, accuracy.classes, strict=True)
        ],
        "confusion": [
            {"class": classes[true], "predicted": labels[predicted], "pictures": int(pictures)}
            for true, predicted, pictures in zip(cells.true, cells.predicted, cells.pictures, strict=True)
        ],
    }


def _text(
    accuracy: Accuracy | None, why: str | None, counts: dict[str, int], labels: Sequence[str], classes: Sequence[str]
) -> str:
    """What is shown on a screen."""
    head = f"{counts['pictures']:,} pictures of {counts['classes']:,} classes, {counts['labels']:,} labels"
    if accuracy is None:
        return f"{head}.\n\n{why} The answers are in predictions.json."
    lines = [f"{head}. Accuracy in percent:", ""]
    for name, value in (
        ("Top-1", accuracy.top1),
        (f"Top-{TOP}", accuracy.top5),
        ("Mean of the classes", accuracy.mean_class),
        ("Chance", accuracy.chance),
    ):
        lines.append(
            f"  {name:<{LETTERS}}" + (f"{value:9.2f}" if value is not None else f"{'–':>9}  (of {len(labels)} labels it is 100)")
        )
    lines += ["", f"{'Class':<{LETTERS + 2}}{'Top-1':>9}{'Pictures':>10}  Most frequent wrong answer"]
    for name, each in zip(classes, accuracy.classes, strict=True):
        rate = "–" if each.top1 is None else f"{each.top1:.2f}"
        wrong = "–" if each.wrong is None else f"{plain(labels[each.wrong], LETTERS)} ({each.wrong_pictures:,})"
        lines.append(f"  {plain(name, LETTERS):<{LETTERS}}{rate:>9}{each.pictures:>10,}  {wrong}")
    # As mindformers logs it (r1.0 trainer/base_trainer.py, evaluate_process): not in percent.
    share = sum(each.right for each in accuracy.classes) / counts["pictures"]
    return "\n".join([*lines, "", f"Top1 Accuracy = { {'Top1 Accuracy': share} }"])


def _page(
    run: ClassifyOutputs, data: ClassifyData, found: Answers, accuracy: Accuracy | None, why: str | None, said: dict[str, Any]
) -> str:
    label, picture = np.asarray(data.label), Pictures(data)
    target = None if accuracy is None else accuracy.target[label]  # (N,)
    hit = np.zeros(len(label), bool) if target is None else found.label[:, 0] == target  # (N,)

    def cards(pictures: np.ndarray, count: int) -> list[Card]:
        shown = spread(pictures, count).tolist()
        return [card(found, n, run.probability, None if target is None else int(target[n])) for n in shown]

    return render(
        "classify.html",
        said,
        accuracy=accuracy,
        why=why,
        drawing=None if accuracy is None else _drawing(accuracy, data.classes),
        confused=[] if accuracy is None else top1.confused(accuracy)[:CONFUSED],
        classes=data.classes,
        label=label.tolist(),
        misses=cards(np.flatnonzero(~hit), MISSES),
        hits=cards(np.flatnonzero(hit), HITS),
        all_hits=int(hit.sum()),
        picture=picture,
        frame=picture.frame(),
        top=TOP,
        listed=LISTED,
        names=NAMES,
    )


def _drawing(accuracy: Accuracy, classes: Sequence[str]) -> Markup | None:
    """The confusion picture; None of too many classes."""
    asked, counts = confusion.matrix(accuracy.confusion, accuracy.target)
    if len(asked) > confusion.MOST:
        return None
    return Markup(confusion.drawing(counts, asked, classes))  # our own SVG, its names escaped
