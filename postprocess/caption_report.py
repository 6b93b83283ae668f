"""From captions and what people wrote (caption_source) to report/: report.json for programs, report.html and report.txt for
people. Runs no model.

Where there is nothing to compare with, there are no figures, but the sentence why in their place, and the rest is as always:
the pictures and their captions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from models import manifest
from models.errors import Misuse
from postprocess import caption_metrics, score_chart
from postprocess.caption_metrics import JAVA, NAMES, Judged
from postprocess.caption_source import Captions
from postprocess.constant import PICTURES, TRIED, constant_caption
from postprocess.gallery import HITS, MISSES, spread
from postprocess.page import LISTED, Report, plain, render
from postprocess.score_chart import Spread
from postprocess.scored import Absent, Scored

# What may be asked for, and what it is called in results and in texts.
METRICS = {
    "bleu": ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4"),
    "meteor": ("METEOR",),
    "rouge": ("ROUGE_L",),
    "cider": ("CIDEr",),
    "spice": ("SPICE",),
    "cider-d": ("CIDEr-D",),
}
USUAL = "bleu,rouge,cider"
TITLES = {name: name.replace("Bleu_", "BLEU-").replace("ROUGE_L", "ROUGE-L") for name in NAMES}
HEADLINE = ("CIDEr", "Bleu_4", "ROUGE_L", "METEOR", "SPICE", "Bleu_1", "CIDEr-D")  # of which three head the page
BY = "CIDEr"  # best and worst are by this, whatever was asked for
AGG = "agg_metrics"  # salesforce/LAVIS tasks/captioning.py: CIDEr and Bleu_4 added
EXAMPLES = 5
SHOWN = 8  # references of a caption
LETTERS = 100  # of a caption in the text
WIDTH = 12


@dataclass(frozen=True)
class Judgement:
    """What the metrics say of N captions, and of one caption for all."""

    own: Judged  # with BY
    constant: Judged
    caption: str  # the one
    metrics: dict[str, float]  # those that were asked for and computed, and AGG
    constant_metrics: dict[str, float]
    absent: dict[str, str]  # why others are not there
    spread: Spread  # of BY


@dataclass(frozen=True)
class Card:
    """One caption for the page."""

    number: int
    score: float | None  # by BY
    references: Sequence[str]


def chosen(metrics: str) -> list[str]:
    """The names of "bleu,rouge,...", in the order of NAMES. Raises Misuse for one that is none."""
    asked = [name.strip().lower() for name in metrics.split(",")]
    if unknown := [name for name in asked if name not in METRICS]:
        raise Misuse(f"There is no metric {unknown[0]!r:.60}; --metrics takes some of {','.join(METRICS)}.")
    wanted = {name for group in asked for name in METRICS[group]}
    return [name for name in NAMES if name in wanted]


def write(found: Captions, out: Path, metrics: str = USUAL, only_results: bool = False) -> Report:
    """Make the folder `out`. `only_results` leaves out pictures with references and no caption.

    Raises UserError when captions and references do not belong together, and Misuse when `out` is something else's or a
    metric is unknown; then no report is left, and an older one stays.
    """
    asked = chosen(metrics)
    with manifest.new_folder(out, "report", task="caption") as folder:
        judged = None if found.references is None else judge(found, asked, only_results)
        why = None if judged else "No metrics: there are no captions that people wrote to compare with."
        said = _facts(found, judged, only_results)
        record = {"task": "caption", **_record(judged), "no_metrics": why, **said}
        manifest.write_text(folder / "report.json", json.dumps(record, indent=1) + "\n")
        html = _page(found, judged, why, {**said, "command": manifest.command()})
        manifest.write_text(folder / "report.html", html)
        text = _text(found, judged, why, said["counts"])
        manifest.write_text(folder / "report.txt", text + "\n")
        content = {"task": "caption", "metrics": record["metrics"]}
        manifest.write(folder, "report", content | {part: said[part] for part in ("outputs", "data", "graphs", "files")})
    return Report(out / "report.html", text)


def judge(found: Captions, asked: Sequence[str], only_results: bool) -> Judgement:
    """The metrics `asked` of the captions, and of the same caption for all; of this one not those that start Java."""
    assert found.references is not None
    results = dict(zip(found.ids, found.texts, strict=True))
    own = caption_metrics.judge(found.references, results, only_results, [*asked, BY])
    caption = constant_caption(dict(zip(own.ids, own.references, strict=True)))
    without_java = [name for name in (*asked, BY) if name not in JAVA]
    constant = caption_metrics.judge(found.references, dict.fromkeys(own.ids, caption), only_results, without_java)
    absent = {name: one.reason for name, one in own.metrics.items() if isinstance(one, Absent)}
    for name in JAVA:
        if name not in asked:
            absent[name] = f"it was not asked for. --metrics {USUAL},{name.lower()} does, with Java and pycocoevalcap."
    return Judgement(
        own,
        constant,
        caption,
        _figures(own, asked),
        _figures(constant, asked),
        {name: absent[name] for name in NAMES if name in absent},
        score_chart.by_score(_each(own), _each(constant)),
    )


def _figures(judged: Judged, asked: Sequence[str]) -> dict[str, float]:
    found = {name: figure for name, figure in judged.corpus.items() if name in asked and figure is not None}
    if "CIDEr" in found and "Bleu_4" in found:
        found[AGG] = found["CIDEr"] + found["Bleu_4"]
    return found


def _each(judged: Judged) -> np.ndarray:
    """(N,) by BY."""
    scored = judged.metrics[BY]
    assert isinstance(scored, Scored)
    return scored.each


def _facts(found: Captions, judged: Judgement | None, only_results: bool) -> dict[str, Any]:
    """Everything the report says beside the figures."""
    counts = {
        "pictures": len(found.ids),
        "references": sum(map(len, judged.own.references)) if judged else 0,
        "words": judged.own.words if judged else 0,
        "reference_words": judged.own.reference_words if judged else 0,
        "empty": sum(not text.strip() for text in found.texts),
        "without_caption": len(found.references) - len(judged.own.ids) if judged and found.references else 0,
        "left_out": len(found.facts["left_out"]),
    }
    measured = {
        "words": "Penn Treebank tokens",
        "pictures": "those with a caption" if only_results else "all that have references",
        "same_caption": f"the best of {TRIED} on {PICTURES} pictures, by {BY}",
    }
    return {"counts": counts, "measured": measured if judged else {}, **found.facts}


def _record(judged: Judgement | None) -> dict[str, Any]:
    """The figures, for report.json, by the names of pycocoevalcap."""
    if judged is None:
        return {"metrics": None, "absent": {}, "constant": None, "spread": None}
    return {
        "metrics": judged.metrics,
        "absent": judged.absent,
        "constant": {"caption": judged.caption, "metrics": judged.constant_metrics},
        "spread": {"metric": BY, **dataclasses.asdict(judged.spread)},
    }


def _text(found: Captions, judged: Judgement | None, why: str | None, counts: dict[str, int]) -> str:
    """What is shown on a screen."""
    head = f"{counts['pictures']:,} picture{'s' if counts['pictures'] != 1 else ''}, a caption for each"
    if judged is None:
        lines = [f"{head}.", "", str(why)]
    else:
        lines = [f"{head}, compared with {counts['references']:,} that people wrote.", ""]
        if left := counts["without_caption"]:
            lines[-1:] = [f"{left:,} more pictures have no caption and do not count.", ""]
        lines += [f"  {'':<{WIDTH}}{'Captions':>10}{'Same for all':>16}"]
        for name in NAMES:
            if name in judged.absent:
                lines.append(f"  {TITLES[name]:<{WIDTH}}{'–':>10}  not computed: {plain(judged.absent[name])}")
            elif name in judged.metrics:
                constant = f"{judged.constant_metrics[name]:16.3f}" if name in judged.constant_metrics else f"{'–':>16}"
                lines.append(f"  {TITLES[name]:<{WIDTH}}{judged.metrics[name]:10.3f}{constant}")
        lines += ["", f'The same for all: "{plain(judged.caption, LETTERS)}"']
    lines += ["", "Examples"]
    for number in spread(np.arange(len(found.ids)), EXAMPLES):
        lines.append(f"  {plain(found.names[number], LETTERS)}: {plain(found.texts[number], LETTERS)}")
        if found.references:
            lines.append(f"    people: {plain(found.references[found.ids[number]][0], LETTERS)}")
    if judged:
        lines += ["", f"eval_result: {judged.metrics}"]
    return "\n".join(lines)


def _page(found: Captions, judged: Judgement | None, why: str | None, said: dict[str, Any]) -> str:
    count = len(found.ids)
    scores = None if judged is None else _each(judged.own)  # (N,)

    def cards(numbers: np.ndarray) -> list[Card]:
        return [
            Card(n, None if scores is None else float(scores[n]), () if judged is None else judged.own.references[n])
            for n in numbers.tolist()
        ]

    if scores is None:
        first, last = spread(np.arange(count), MISSES), np.arange(0)
    else:
        order = np.argsort(scores, kind="stable")  # worst first; among equals in the order of the data
        worst = min(MISSES, (count + 1) // 2)
        first, last = order[:worst], order[worst:][::-1][:HITS]
    known = () if judged is None else tuple(name for name in HEADLINE if name in judged.metrics)
    return render(
        "caption_report.html",
        said,
        found=found,
        judged=judged,
        why=why,
        tiles=known[:3],
        titles=TITLES,
        names=[name for name in NAMES if judged and (name in judged.metrics or name in judged.absent)],
        by=BY,
        # Our own SVG, made of numbers alone: the one thing that is not escaped.
        chart=None if judged is None else Markup(score_chart.drawing(judged.spread)),
        middle=None if scores is None else {"mean": float(scores.mean()), "median": float(np.median(scores))},
        first=cards(first),
        last=cards(last),
        picture=found.picture,
        frame=found.picture.frame(),
        listed=LISTED,
        most=SHOWN,
    )
