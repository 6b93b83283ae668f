"""From answers and what people answered (vqa_source) to report/: report.json for programs, report.html and report.txt for
people. Runs no model.

Where nobody answered, there is no accuracy, but the sentence why in its place, and the rest is as always: the pictures, the
questions and the answers.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from models import manifest
from postprocess import score_chart, vqa_accuracy
from postprocess.constant import constant_answer
from postprocess.gallery import HITS, MISSES, spread
from postprocess.page import LISTED, Report, plain, render
from postprocess.score_chart import Spread
from postprocess.vqa_accuracy import VqaAccuracy, clean
from postprocess.vqa_source import Answers

EXAMPLES = 5
SHOWN = 10  # answers of people to a question
LETTERS = 100  # of a question in the text
AGG = "agg_metrics"  # salesforce/LAVIS tasks/vqa.py: the overall accuracy
TYPES = {"per_answer_type": "answer_type", "per_question_type": "question_type"}


@dataclass(frozen=True)
class Judgement:
    """How right Q answers are, and one answer to everything."""

    own: VqaAccuracy
    constant: VqaAccuracy
    answer: str  # the one
    rule: str
    spread: Spread

    @property
    def metrics(self) -> dict[str, Any]:
        """By the names of the original (vqaEval.py) and of LAVIS."""
        return _named(self.own) | {AGG: self.own.overall}


@dataclass(frozen=True)
class Card:
    """One answer for the page."""

    number: int
    score: float | None
    people: list[tuple[str, int]]  # answers, and how many gave each; the most frequent first
    same: frozenset[str]  # the answer, as it is and cleaned


def write(found: Answers, out: Path, rule: str = "lavis", only_results: bool = False) -> Report:
    """Make the folder `out`. `rule` is one of vqa_accuracy.RULES; `only_results` leaves out questions without an answer.

    Raises UserError when answers and questions do not belong together, Misuse when `out` is something else's; then no report
    is left, and an older one stays.
    """
    with manifest.new_folder(out, "report", task="vqa") as folder:
        judged = None if found.asked is None else judge(found, rule, only_results)
        why = None if judged else "No accuracy: there are no answers of people to compare with."
        said = _facts(found, judged, only_results)
        record = {"task": "vqa", **_record(judged), "no_metrics": why, **said}
        manifest.write_text(folder / "report.json", json.dumps(record, indent=1) + "\n")
        html = _page(found, judged, why, {**said, "command": manifest.command()})
        manifest.write_text(folder / "report.html", html)
        text = _text(found, judged, why, said["counts"])
        manifest.write_text(folder / "report.txt", text + "\n")
        content = {"task": "vqa", "metrics": record["metrics"]}
        manifest.write(folder, "report", content | {part: said[part] for part in ("outputs", "data", "graphs", "files")})
    return Report(out / "report.html", text)


def judge(found: Answers, rule: str, only_results: bool) -> Judgement:
    """The accuracy of the answers, and of the most frequent one to every question."""
    assert found.asked is not None
    own = vqa_accuracy.judge(found.asked, dict(zip(found.ids, found.texts, strict=True)), rule, only_results)
    answer = constant_answer(own.asked)
    constant = vqa_accuracy.judge(found.asked, dict.fromkeys(own.ids, answer), rule, only_results)
    return Judgement(own, constant, answer, rule, score_chart.by_percent(own.each, constant.each))


def _named(accuracy: VqaAccuracy) -> dict[str, Any]:
    return {
        "overall": accuracy.overall,
        "perAnswerType": accuracy.per_answer_type,
        "perQuestionType": accuracy.per_question_type,
    }


def _facts(found: Answers, judged: Judgement | None, only_results: bool) -> dict[str, Any]:
    """Everything the report says beside the figures."""
    counts = {
        "questions": len(found.ids),
        "people": sum(len(own.answers) for own in judged.own.asked) if judged else 0,
        "empty": sum(not text.strip() for text in found.texts),
        "without_answer": len(found.asked) - len(judged.own.ids) if judged and found.asked else 0,
        "left_out": len(found.facts["left_out"]),
    }
    measured = {
        "rule": judged.rule if judged else "",
        "questions": "those with an answer" if only_results else "all that people answered",
    }
    return {"counts": counts, "measured": measured if judged else {}, **found.facts}


def _record(judged: Judgement | None) -> dict[str, Any]:
    """The figures, for report.json; percent."""
    if judged is None:
        return {"metrics": None, "constant": None, "spread": None}
    return {
        "metrics": judged.metrics,
        "constant": {"answer": judged.answer, "metrics": _named(judged.constant)},
        "spread": dataclasses.asdict(judged.spread),
    }


def _text(found: Answers, judged: Judgement | None, why: str | None, counts: dict[str, int]) -> str:
    """What is shown on a screen; the accuracy as LAVIS's task prints it."""
    head = f"{counts['questions']:,} question{'s' if counts['questions'] != 1 else ''}, an answer to each"
    if judged is None:
        lines = [f"{head}.", "", str(why)]
    else:
        lines = [f"{head}, compared with {counts['people']:,} that people gave. Accuracy in percent:", ""]
        if left := counts["without_answer"]:
            lines[-1:] = [f"{left:,} more questions have no answer and do not count.", ""]
        own, constant = judged.own, judged.constant
        lines += [f"Overall Accuracy is: {own.overall:.2f}"]
        if own.per_answer_type:
            lines += ["Per Answer Type Accuracy is the following:"]
            lines += [f"{plain(kind, LETTERS)} : {value:.2f}" for kind, value in own.per_answer_type.items()]
        lines += ["", f'The most frequent answer, "{plain(judged.answer, LETTERS)}", to every question: {constant.overall:.2f}']
    lines += ["", "Examples"]
    for number in spread(np.arange(len(found.ids)), EXAMPLES):
        lines.append(f"  {plain(found.questions[number], LETTERS)} {plain(found.texts[number], LETTERS)}")
        if judged:
            people = ", ".join(f"{plain(answer, 30)} ({count})" for answer, count in _people(judged, number)[:3])
            lines.append(f"    people: {people}")
    if judged:
        lines += ["", f"eval_result: { {AGG: judged.own.overall, **judged.own.per_answer_type} }"]
    return "\n".join(lines)


def _people(judged: Judgement | None, number: int) -> list[tuple[str, int]]:
    return Counter(judged.own.asked[number].answers).most_common() if judged else []


def _page(found: Answers, judged: Judgement | None, why: str | None, said: dict[str, Any]) -> str:
    count = len(found.ids)
    scores = np.zeros(count) if judged is None else judged.own.each  # (Q,)
    groups = (  # kind, title, which, how many are shown
        [("", "Answers", np.arange(count), MISSES)]
        if judged is None
        else [
            ("miss", "Wrong", np.flatnonzero(scores == 0), MISSES),
            ("part", "Partly right", np.flatnonzero((scores > 0) & (scores < 100)), HITS),
            ("hit", "Right", np.flatnonzero(scores == 100), HITS),
        ]
    )

    def card(number: int) -> Card:
        answer = found.texts[number]
        score = None if judged is None else float(scores[number])
        return Card(number, score, _people(judged, number), frozenset([answer, clean(answer)]))

    galleries = [
        (kind, title, len(which), [card(number) for number in spread(which, most).tolist()])
        for kind, title, which, most in groups
    ]
    return render(
        "vqa_report.html",
        said,
        found=found,
        judged=judged,
        why=why,
        tables=[] if judged is None else [_table(judged, part, kind) for part, kind in TYPES.items()],
        # Our own SVG, made of numbers alone: the one thing that is not escaped.
        chart=None if judged is None else Markup(score_chart.drawing(judged.spread)),
        galleries=galleries,
        picture=found.picture,
        frame=found.picture.frame(),
        listed=LISTED,
        most=SHOWN,
    )


def _table(judged: Judgement, part: str, kind: str) -> list[tuple[str, int, float, float]]:
    """Of each type of answer or question: how many questions, the accuracy, and that of the one answer."""
    questions = Counter(getattr(own, kind) for own in judged.own.asked)
    constant = getattr(judged.constant, part)
    return [(name, questions[name], value, constant[name]) for name, value in getattr(judged.own, part).items()]
