"""blip-post --vqa: the accuracy, of a run and of any file of results; the page; and what it says when nobody answered."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from models import manifest
from postprocess import score_chart
from postprocess.__main__ import main
from postprocess.constant import constant_answer
from postprocess.references import Asked
from tests import chain
from tests.test_postprocess import refused
from tests.test_report import HOSTILE, Page, refuse_foreign
from tests.text_graphs import call_run, stand_in, vqa_data, write_graphs
from tests.written_run import ANSWERS, QUESTIONS, WrittenRun, make_vqa_run, named_pictures

FILES_LEFT = ["manifest.json", "report.html", "report.json", "report.txt"]
# VQAEval's own figures of the three questions.
TYPES = {"number": 100.0, "yes/no": 0.0, "other": 60.0}
METRICS = {
    "overall": 53.33,
    "perAnswerType": TYPES,
    "perQuestionType": {"how many": 100.0, "is it": 0.0, "what color": 60.0},
    "agg_metrics": 53.33,
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without --out writes to the folder it is in, which must not be the checkout."""
    monkeypatch.chdir(tmp_path)


def post(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["--vqa", *map(str, arguments)])


def report_of(run: WrittenRun, *options: object) -> tuple[Page, dict[str, Any]]:
    out = run.outputs.parent / "report"
    result = post("--outputs", run.outputs, "--out", out, *options)
    assert result.exit_code == 0, result.output
    return Page(out / "report.html"), record(out)


def record(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "report.json").read_text("utf-8"))
    return values


def write_json(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values), "utf-8")
    return path


def results_file(path: Path, answers: dict[Any, str]) -> Path:
    return write_json(path, [{"question_id": each, "answer": text} for each, text in answers.items()])


@pytest.fixture
def official(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Results, annotations and questions in the forms of VQA v2."""
    annotations = [
        {**each, "question_id": n, "image_id": 40 + n, "answers": [{"answer": text, "answer_id": 1} for text in each["answers"]]}
        for n, each in enumerate(QUESTIONS)
    ]
    asked = [{"question_id": n, "image_id": 40 + n, "question": each.pop("question")} for n, each in enumerate(annotations)]
    return (
        results_file(tmp_path / "results.json", dict(enumerate(ANSWERS))),
        write_json(tmp_path / "annotations.json", {"annotations": annotations}),
        write_json(tmp_path / "questions.json", {"questions": asked}),
    )


def test_golden_figures_of_a_file(official: tuple[Path, Path, Path], tmp_path: Path) -> None:
    results, annotations, questions = official
    out = tmp_path / "report"
    result = post(results, "--references", annotations, "--questions", questions, "--out", out)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "3 questions, an answer to each, compared with 30 that people gave. Accuracy in percent:"
    assert lines[2:7] == [
        "Overall Accuracy is: 53.33",
        "Per Answer Type Accuracy is the following:",
        "number : 100.00",
        "yes/no : 0.00",
        "other : 60.00",
    ]
    assert 'The most frequent answer, "yes", to every question: 33.33' in lines
    assert "  What color is it? light blue" in lines
    assert "    people: blue (6), light blue (2), grey (2)" in lines
    (line,) = [line for line in lines if line.startswith("eval_result: ")]
    assert ast.literal_eval(line.removeprefix("eval_result: ")) == {"agg_metrics": 53.33, **TYPES}
    assert sorted(path.name for path in out.iterdir()) == FILES_LEFT
    assert record(out)["metrics"] == METRICS
    assert [file["what"] for file in record(out)["files"]] == ["Results", "References", "Questions"]
    assert manifest.read(out, "report", verify=True).content["metrics"] == METRICS
    page = Page(out / "report.html")
    refuse_foreign(page)
    assert not page.of("img")
    assert "How many birds?" in page.text
    assert (out / "report.txt").read_text("utf-8").splitlines() == lines[:-1]
    without = post(results, "--references", annotations, "--out", out)
    assert "  question 1 no" in without.stdout.splitlines()
    assert record(out)["metrics"] == METRICS


def test_a_run_has_the_figures_of_its_result_file(official: tuple[Path, Path, Path], tmp_path: Path) -> None:
    run = make_vqa_run(tmp_path / "run")
    page, written = report_of(run)
    refuse_foreign(page)
    assert written["metrics"] == METRICS
    assert written["constant"]["answer"] == "yes"
    assert written["data"]["digest"] == manifest.read(run.data, "data").digest
    assert written["deviations"] == []
    assert sum(written["spread"]["own"]) == 3
    for text in ("a picture of", "1.5e-06", "blip-vqa-demo", "is it a dog", "set/041.jpg"):
        assert text in page.text
    results, annotations, _ = official
    renamed = [{**each, "question_id": 100 + each["question_id"]} for each in json.loads(annotations.read_text())["annotations"]]
    other = write_json(tmp_path / "renamed.json", {"annotations": renamed})
    assert report_of(run, "--references", other)[1]["metrics"] == METRICS
    assert post(run.outputs / "answers.json", "--references", other, "--out", tmp_path / "file").exit_code == 0
    assert record(tmp_path / "file")["metrics"] == METRICS
    refused(post("--outputs", run.outputs, "--references", annotations), 1, "3 of 3 results are of questions")
    refused(post(results, "--references", other), 1, "are of questions that the references do not have")


def test_what_blip_run_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that were chosen from a list, and answers about a picture that the command line names."""
    stand_in(monkeypatch)
    graphs = write_graphs(tmp_path, "vqa")
    data = vqa_data(tmp_path, graphs, "--answer-list", tmp_path / "answers.json", pictures=2, questions=3)
    run = WrittenRun(data, tmp_path / "outputs")
    chain.done(call_run("vqa", graphs, run.outputs, "--data", data, "--k-test", 4))
    _, written = report_of(run)
    assert (written["options"]["inference"], written["options"]["answers"], written["options"]["k_test"]) == ("rank", 12, 4)
    assert [one["name"] for one in written["deviations"]] == ["k_test"]
    people = [{"question_id": 100 + n, "answers": ["a dog", "cat"]} for n in range(3)]
    other = write_json(tmp_path / "people.json", people)
    assert 0 <= report_of(run, "--references", other)[1]["metrics"]["overall"] <= 100
    named = WrittenRun(data, tmp_path / "named/outputs")
    asked = ("--images", "images/1.png", "--questions", "is it a dog?", "--num-beams", 1, "--max-length", 4)
    chain.done(call_run("vqa", graphs, named.outputs, *asked))
    page, _ = report_of(named)
    assert [a["alt"] for a in page.of("img")] == ["images/1.png"]
    assert "is it a dog" in page.text


def test_cards_are_right_partly_right_and_wrong(tmp_path: Path) -> None:
    page, written = report_of(make_vqa_run(tmp_path))
    assert [a["class"] for a in page.of("article")] == ["card pair miss", "card pair part", "card pair hit"]
    assert re.findall(r'class="verdict">(\d+) %<', page.source) == ["0", "60", "100"]
    assert len(page.of("img")) == 3
    assert re.findall(r'<li class="same"><span class="text" dir="auto">([^<]*)', page.source) == ["light blue", "2"]  # "Two."
    assert re.findall(r'<p class="big">([\d.]+)<', page.source) == ["53.3", "100.0", "33.3"]
    table = page.source[page.source.index('<section id="accuracy">') : page.source.index('<section id="answers">')]
    numbers = re.findall(r'<td class="number">([\d.]+)</td>', table)
    assert numbers == ["1", "100.00", "0.00", "1", "0.00", "100.00", "1", "60.00", "0.00"] * 2
    assert written["counts"] == {"questions": 3, "people": 30, "empty": 0, "without_answer": 0, "left_out": 0}


def test_the_other_form_of_the_rule(tmp_path: Path) -> None:
    """Where people agree it cleans nothing: "Yes." is not their "yes"."""
    run = make_vqa_run(tmp_path, ["2", "Yes.", "blue"])
    assert report_of(run)[1]["metrics"]["perAnswerType"]["yes/no"] == 100
    page, written = report_of(run, "--vqa-rule", "agreement")
    assert written["metrics"]["perAnswerType"]["yes/no"] == 0
    assert written["measured"]["rule"] == "agreement"
    assert "agreement" in page.text


def test_ranked_answers_say_how_many_there_were(tmp_path: Path) -> None:
    options = {
        "as": "blip",
        "prompt": "{}",
        "inference": "rank",
        "k_test": 3,
        "num_return": 1,
        "answers": ["yes", "no", "2", "two"],
    }
    page, written = report_of(make_vqa_run(tmp_path, outputs={"options": options}))
    assert (written["options"]["answers"], written["options"]["k_test"]) == (4, 3)
    assert [one["name"] for one in written["deviations"]] == ["k_test"]
    assert "k_test 3" in page.text


def test_nobody_was_asked(tmp_path: Path) -> None:
    bare = [{**each, "answers": []} for each in QUESTIONS]
    run = make_vqa_run(tmp_path, questions=bare)
    page, written = report_of(run)
    refuse_foreign(page)
    assert (written["metrics"], written["spread"]) == (None, None)
    assert "No accuracy: there are no answers of people to compare with." in page.text
    assert [a["class"] for a in page.of("article")] == ["card pair "] * 3
    assert "Overall" not in (tmp_path / "report/report.txt").read_text("utf-8")
    some = make_vqa_run(tmp_path / "some", questions=[*QUESTIONS[:2], bare[2]])
    refused(post("--outputs", some.outputs, "--out", tmp_path / "none"), 1, "Nobody answered the question 102")
    assert not (tmp_path / "none").exists()


def test_questions_that_the_command_line_asked(tmp_path: Path) -> None:
    """Of each picture one; what the model read is all that is known of them."""
    run = make_vqa_run(tmp_path, outputs={"data": named_pictures(tmp_path, 3)})
    page, written = report_of(run)
    refuse_foreign(page)
    assert (written["data"], written["metrics"]) == (None, None)
    assert [a["alt"] for a in page.of("img")] == [f"named/{n}.png" for n in range(3)]
    assert "how many birds" in page.text
    refused(post("--outputs", run.outputs, "--data", run.data), 2, "named on the command line")


def test_a_part_of_the_questions(official: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, annotations, _ = official
    some = results_file(tmp_path / "some.json", {"2": ANSWERS[2], 0: ""})
    refused(post(some, "--references", annotations), 1, "1 of 3 questions have no result: 1")
    result = post(some, "--references", annotations, "--subset", "--out", tmp_path / "report")
    assert "1 more questions have no answer and do not count." in result.stdout
    assert record(tmp_path / "report")["metrics"]["perAnswerType"] == {"other": 60.0, "number": 0.0}
    page = Page(tmp_path / "report/report.html")
    assert "1 question without an answer" in page.text
    assert "1 answer is empty" in page.text


def test_pictures_of_a_folder(official: tuple[Path, Path, Path], tmp_path: Path) -> None:
    results, annotations, _ = official
    named_pictures(tmp_path, 2)
    folder = tmp_path / "named"
    (folder / "0.png").rename(folder / "COCO_val2014_000000000041.png")
    assert post(results, "--references", annotations, "--images", folder, "--out", tmp_path / "report").exit_code == 0
    page = Page(tmp_path / "report/report.html")
    refuse_foreign(page)
    assert [a["alt"] for a in page.of("img")] == ["COCO_val2014_000000000041.png"]


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    safe = [text.encode("utf-8", "replace").decode("utf-8") for text in HOSTILE]
    nasty = [*safe, "\x1b[31m\x07red", "@0@"]
    questions = [
        {"question": text, "answers": nasty, "answer_type": text[:200], "question_type": text[:200]} for text in nasty[::-1]
    ]
    page, _ = report_of(make_vqa_run(tmp_path, nasty, questions))
    refuse_foreign(page)
    for text in ("<script>alert(1)</script>", "@0@"):
        assert text in page.text
    assert len(page.source) < 1_000_000
    text = (tmp_path / "report/report.txt").read_text("utf-8")
    assert all(letter.isprintable() or letter == "\n" for letter in "".join(text.split("eval_result: ")[:1]))


def test_writes_the_same_report_again(tmp_path: Path) -> None:
    run = make_vqa_run(tmp_path)
    report_of(run)
    first = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    report_of(run)
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == first


def test_questions_without_types(tmp_path: Path) -> None:
    plain = [{**each, "answer_type": None, "question_type": None} for each in QUESTIONS]
    page, written = report_of(make_vqa_run(tmp_path, questions=plain))
    assert written["metrics"] == {"overall": 53.33, "perAnswerType": {}, "perQuestionType": {}, "agg_metrics": 53.33}
    assert "Type of" not in page.text
    assert "Per Answer Type" not in (tmp_path / "report/report.txt").read_text("utf-8")


def test_the_most_frequent_answer() -> None:
    assert constant_answer([Asked(("a", "b", "b")), Asked(("c", "c")), Asked(("a", "a"))]) == "a"
    assert constant_answer([Asked(("c", "c")), Asked(("a", "a"))]) == "c"  # the first of two


def test_each_score_has_its_bar() -> None:
    scores = np.array([0, 30, 60, 90, 100, 33.3, 66.7])
    assert score_chart.by_percent(scores, scores).own == [1, 0, 0, 2, 0, 0, 1, 1, 0, 1, 1]


@pytest.mark.real_data
def test_real_questions_and_pictures(tmp_path: Path) -> None:
    """Eight questions of VQA v2: what people answered most often is worth nearly all, their most frequent answer little."""
    folder = Path(os.environ["BLIP_REAL_DATA"]) / "coco108"
    annotated = json.loads((folder / "vqav2.json").read_text("utf-8"))
    results = results_file(tmp_path / "r.json", {each["question_id"]: each["multiple_choice_answer"] for each in annotated})
    asked = ("--references", folder / "vqav2.json", "--images", folder / "images", "--out", tmp_path / "report")
    assert post(results, *asked).exit_code == 0
    written = record(tmp_path / "report")
    assert written["metrics"]["overall"] == pytest.approx(95, abs=5.01)
    assert written["constant"]["metrics"]["overall"] < 30
    assert len(Page(tmp_path / "report/report.html").of("img")) == 8
