"""blip-post of captions and of answers: result files and references of any kind, and runs that are damaged or another's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from models import manifest
from tests import chain
from tests.bad_input import table
from tests.bad_input.damage import changed, edited, flipped, given, gone, holding, signed
from tests.bad_input.table import Case, Spoil, Work, options, refused
from tests.written_run import ANSWERS, CAPTIONS, PEOPLE, QUESTIONS, make_caption_run, make_vqa_run, named_pictures

CAPTION, CAPTION_FILE, VQA, VQA_FILE = "post captions", "post caption file", "post vqa", "post answer file"
BARE_CAPTIONS, BARE_ANSWERS = "post bare captions", "post bare answers"
OLDER = {CAPTION: "caption report", CAPTION_FILE: "caption report", VQA: "vqa report", VQA_FILE: "vqa report"}


class Scores(Work):
    """Runs, result files and references of captions and of answers."""

    def usual(self, step: str) -> list[object]:
        asked: dict[str, tuple[object, ...]] = {
            CAPTION: ("--captions", "--outputs", self["captions/outputs"]),
            CAPTION_FILE: ("--captions", self["results.json"], "--references", self["people.json"]),
            BARE_CAPTIONS: ("--captions", self["results.json"]),
            BARE_ANSWERS: ("--vqa", self["answers.json"]),
            VQA: ("--vqa", "--outputs", self["vqa/outputs"]),
            VQA_FILE: ("--vqa", self["answers.json"], "--references", self["annotations.json"]),
        }
        return [*asked[step], "--out", self.out]


@pytest.fixture(scope="module")
def good_scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    root = tmp_path_factory.mktemp("scores")
    work = Scores(root)
    make_caption_run(root / "captions")
    make_vqa_run(root / "vqa")
    named_pictures(root, 2)
    write(work["results.json"], [{"image_id": n, "caption": text} for n, text in enumerate(CAPTIONS)])
    write(work["answers.json"], [{"question_id": n, "answer": text} for n, text in enumerate(ANSWERS)])
    texts = [{"image_id": n, "caption": text} for n, own in enumerate(PEOPLE) for text in own]
    write(work["people.json"], {"images": [{"id": n} for n in range(len(PEOPLE))], "annotations": texts})
    write(work["annotations.json"], {"annotations": [{**each, "question_id": n} for n, each in enumerate(QUESTIONS)]})
    write(work["questions.json"], {"questions": [{"question_id": n, "question": "?"} for n in range(3)]})
    entries = [{"filename": f"{n}.jpg", "split": "val", "sentences": [{"raw": "a cat"}]} for n in range(4)]
    write(work["karpathy.json"], {"images": entries})
    chain.done(work.call(CAPTION, "--out", work["caption report"]))
    chain.done(work.call(VQA, "--out", work["vqa report"]))
    return root


@pytest.fixture
def scores(good_scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scores]:
    """A copy to spoil; the runs' data/ folders are where the originals are, and are named with --data to be spoilt."""
    for step, report in OLDER.items():
        monkeypatch.setitem(table.OLDER, step, report)
    root = tmp_path / "work"
    shutil.copytree(good_scores, root)
    yield Scores(root)
    shutil.rmtree(root)


def write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values), "utf-8")


def entry(file: str, number: int, **parts: Any) -> Spoil:
    """Parts of one result are others; what is None is gone."""

    def spoil(work: Work) -> None:
        def change(values: list[dict[str, Any]]) -> None:
            values[number] = {key: value for key, value in (values[number] | parts).items() if value is not None}

        work.edit(file, change)

    return spoil


def values_of(file: str, change: Callable[[Any], object], *added: object) -> Spoil:
    def spoil(work: Work) -> tuple[object, ...]:
        work.edit(file, change)
        return added

    return spoil


def texts_of(run: str, file: str, change: Callable[[Any], object]) -> Spoil:
    """A file of the outputs says something else, and the manifest agrees."""

    def spoil(work: Work) -> None:
        work.edit(f"{run}/outputs/{file}", change)
        work.resign(f"{run}/outputs")

    return spoil


def data_of(run: str, change: Callable[[Any], object]) -> Spoil:
    """Data that are damaged, and outputs that say they were made of just these."""

    def spoil(work: Work) -> tuple[object, ...]:
        signed(f"{run}/data", change)(work)
        digest = manifest.read(work[f"{run}/data"], "data").digest
        signed(f"{run}/outputs", lambda m: m["data"].update(digest=digest))(work)
        return "--data", work[f"{run}/data"]

    return spoil


def lost_references(content: Any) -> None:
    content["references"][2] = []


RESULTS, PEOPLES, ANSWERED, ANNOTATED = "results.json", "people.json", "answers.json", "annotations.json"
CAPTION_FILES = [
    Case("no results", CAPTION_FILE, ("no file", "a JSON list of results"), gone(RESULTS)),
    Case("results no JSON", CAPTION_FILE, ("is not JSON",), holding(RESULTS, "[{]")),
    Case("results empty", CAPTION_FILE, ("is empty",), holding(RESULTS, "")),
    Case("results an object", CAPTION_FILE, ("expected a list of results",), holding(RESULTS, '{"results": []}')),
    Case("not one result", CAPTION_FILE, ("an empty list",), holding(RESULTS, "[]")),
    Case("a result a number", CAPTION_FILE, ("entry 0 is", "'image_id'"), holding(RESULTS, "[7]")),
    Case("a result without an id", CAPTION_FILE, ("entry 1 has no 'image_id'",), entry(RESULTS, 1, image_id=None)),
    Case("an id below 0", CAPTION_FILE, ("entry 1", "-1"), entry(RESULTS, 1, image_id=-1)),
    Case("an id that is true", CAPTION_FILE, ("entry 1", "true"), entry(RESULTS, 1, image_id=True)),
    Case("an id of half a picture", CAPTION_FILE, ("entry 1", "1.5"), entry(RESULTS, 1, image_id=1.5)),
    Case("a result without a caption", CAPTION_FILE, ("entry 2 has no 'caption'",), entry(RESULTS, 2, caption=None)),
    Case("a caption that is a number", CAPTION_FILE, ("entry 2", "caption", "a number"), entry(RESULTS, 2, caption=7)),
    Case("several captions", CAPTION_FILE, ("entry 2", "caption", "a list"), entry(RESULTS, 2, caption=["a", "b"])),
    Case("half a character", CAPTION_FILE, ("entry 2", "surrogate"), entry(RESULTS, 2, caption="a \ud83d")),
    Case("a picture twice", CAPTION_FILE, ("entry 3", "0", "a second time"), entry(RESULTS, 3, image_id="000000")),
    Case("an unknown picture", CAPTION_FILE, ("1 of 4", "references do not have: 99"), entry(RESULTS, 3, image_id=99)),
    Case("a picture left out", CAPTION_FILE, ("1 of 4 pictures have no result: 3",), values_of(RESULTS, lambda v: v.pop())),
    Case(
        "answers for captions", CAPTION_FILE, ("no 'image_id'; it has 'question_id'",), holding(RESULTS, '[{"question_id": 1}]')
    ),
    Case("no references named", BARE_CAPTIONS, ("people wrote", "--references"), code=2),
    Case("no file of references", CAPTION_FILE, ("no file", "people wrote"), gone(PEOPLES)),
    Case("references no JSON", CAPTION_FILE, ("is not JSON",), changed(PEOPLES, lambda data: data[:-9])),
    Case(
        "a picture nobody described",
        CAPTION_FILE,
        ("1 of 5", "no caption: 4"),
        values_of(PEOPLES, lambda v: v["images"].append({"id": 4})),
    ),
    Case(
        "a caption of no picture",
        CAPTION_FILE,
        ("annotation 0", "none of the 4"),
        values_of(PEOPLES, lambda v: v["annotations"][0].update(image_id=9)),
    ),
    Case(
        "a blank reference",
        CAPTION_FILE,
        ("annotation 0", "caption"),
        values_of(PEOPLES, lambda v: v["annotations"][0].update(caption=" ")),
    ),
    Case(
        "references that are answers",
        CAPTION_FILE,
        ("answers to questions, not captions",),
        lambda w: ("--references", w[ANNOTATED]),
        2,
    ),
    Case(
        "a split that is not there",
        CAPTION_FILE,
        ("no picture in the split 'test'", "--split"),
        given("--references", "karpathy.json"),
    ),
    Case("results and a run", CAPTION_FILE, ("file of results", "--outputs"), given("--outputs", "captions/outputs"), 2),
    Case("results and data", CAPTION_FILE, ("file of results", "--data"), given("--data", "captions/data"), 2),
    Case("hashes of results", CAPTION_FILE, ("file of results", "--verify"), options("--verify"), 2),
    Case("a folder of results", CAPTION_FILE, ("is a folder", "--outputs"), given("--captions", "captions"), 2),
    Case("no folder of pictures", CAPTION_FILE, ("no folder nowhere", "--images"), options("--images", "nowhere")),
    Case("none of the pictures", CAPTION_FILE, ("none of the 4 pictures",), lambda w: _renamed(w)),
    Case(
        "a broken picture", CAPTION_FILE, ("0.png",), lambda w: (w["named/0.png"].write_bytes(b"no"), "--images", w["named"])[1:]
    ),
    Case("an unknown metric", CAPTION_FILE, ("no metric 'cidre'", "cider-d"), options("--metrics", "bleu,cidre"), 2),
    Case("no metric", CAPTION_FILE, ("no metric ''",), options("--metrics", ""), 2),
    Case("questions of captions", CAPTION_FILE, ("--questions belongs to --vqa",), given("--questions", "questions.json"), 2),
    Case("a rule for captions", CAPTION_FILE, ("--vqa-rule belongs to --vqa",), options("--vqa-rule", "lavis"), 2),
    Case("keys of another report", CAPTION_FILE, ("--keys belongs to --recall",), options("--keys", "blip"), 2),
    Case("two reports", CAPTION_FILE, ("--captions and --vqa",), given("--vqa", ANSWERED), 2),
    Case("recall of a result file", CAPTION_FILE, ("--recall and --captions",), options("--recall"), 2),
    Case("--out the results", CAPTION_FILE, ("is a file",), given("--out", RESULTS), 2),
]


def _renamed(work: Work) -> tuple[object, ...]:
    for number in range(2):
        (work["named"] / f"{number}.png").rename(work["named"] / f"7{number}.png")
    return "--images", work["named"]


CAPTION_RUNS = [
    Case("captions of answers", CAPTION, ("task 'vqa'", "blip-post --vqa"), given("--outputs", "vqa/outputs")),
    Case("captions of data", CAPTION, ("is a 'data' folder",), given("--outputs", "captions/data")),
    Case("no outputs", CAPTION, ("no folder nowhere", "blip-run"), options("--outputs", "nowhere")),
    Case("data of answers", CAPTION, ("'vqa', expected 'caption'",), given("--data", "vqa/data")),
    Case(
        "data of another run",
        CAPTION,
        ("made from another data folder",),
        lambda w: (signed("captions/data", lambda m: m["broken"].append({}))(w), "--data", w["captions/data"])[1:],
    ),
    Case("pictures for a run", CAPTION, ("--images shows pictures",), given("--images", "named"), 2),
    Case("a split of nothing", CAPTION, ("--split belongs to --references",), options("--split", "val"), 2),
    Case("references of others", CAPTION, ("4 of 4 results", "references do not have: 40"), given("--references", PEOPLES)),
    Case("no captions", CAPTION, ("captions.json is missing",), gone("captions/outputs/captions.json")),
    Case(
        "captions cut",
        CAPTION,
        ("captions.json has", "manifest says"),
        changed("captions/outputs/captions.json", lambda b: b[:-9]),
    ),
    Case("one bit of them", CAPTION, ("captions.json", "sha256"), changed("captions/outputs/captions.json", flipped, "--verify")),
    Case(
        "captions of another run",
        CAPTION,
        ("not the results of one run",),
        texts_of("captions", "captions.json", lambda v: v[0].update(caption="?")),
    ),
    Case(
        "captions of other pictures",
        CAPTION,
        ("4 results, which are not of the 4 pictures",),
        texts_of("captions", "captions.json", lambda v: v[0].update(image_id=7)),
    ),
    Case(
        "scores NaN",
        CAPTION,
        ("contradicts itself",),
        texts_of("captions", "generated.json", lambda v: v[0].update(scores=[float("nan")])),
    ),
    Case("options lost", CAPTION, ("garbles 'options'",), signed("captions/outputs", lambda m: m.pop("options"))),
    Case("options a number", CAPTION, ("garbles", "not iterable"), signed("captions/outputs", lambda m: m.update(options=7))),
    Case("origin lost", CAPTION, ("does not say which data",), signed("captions/outputs", lambda m: m.pop("data"))),
    Case(
        "named pictures without hashes",
        CAPTION,
        ("garbles 'sha256'", "Run blip-run caption again"),
        signed("captions/outputs", lambda m: m["data"].update(images=[{"image": "a.jpg", "image_id": 1}])),
    ),
    Case("a manifest of rubbish", CAPTION, ("is damaged",), edited("captions/outputs", lambda m: m.update(files=7))),
    Case("a picture nobody described here", CAPTION, ("set/042.jpg has no captions",), data_of("captions", lost_references)),
    Case("references in a text", CAPTION, ("lacks or garbles",), data_of("captions", lambda m: m.update(references=[7] * 4))),
    Case("pictures without a width", CAPTION, ("lacks 'width'",), data_of("captions", lambda m: m["images"][0].pop("width"))),
    Case("protocol lost", CAPTION, ("lacks", "mean"), data_of("captions", lambda m: m.update(protocol={}))),
]
ANSWER_FILES = [
    Case("no references of answers named", BARE_ANSWERS, ("people answered", "--references"), code=2),
    Case("no answers named", VQA_FILE, ("no file",), gone(ANSWERED)),
    Case("an answer without a question", VQA_FILE, ("entry 0 has no 'question_id'",), entry(ANSWERED, 0, question_id=None)),
    Case("an answer that is none", VQA_FILE, ("entry 0", "answer", "a number"), entry(ANSWERED, 0, answer=2)),
    Case("a question twice", VQA_FILE, ("entry 1", "a second time"), entry(ANSWERED, 1, question_id="0")),
    Case("an unknown question", VQA_FILE, ("1 of 3", "do not have: 9"), entry(ANSWERED, 1, question_id=9)),
    Case("a question left out", VQA_FILE, ("1 of 3 questions have no result: 2",), values_of(ANSWERED, lambda v: v.pop())),
    Case("captions for answers", VQA_FILE, ("no 'question_id'",), given("--vqa", RESULTS)),
    Case(
        "an annotation without answers",
        VQA_FILE,
        ("entry 1 (question 1)", "has no answers"),
        values_of(ANNOTATED, lambda v: v["annotations"][1].pop("answers")),
    ),
    Case(
        "an annotation with no answer",
        VQA_FILE,
        ("entry 1 (question 1)", "an empty list"),
        values_of(ANNOTATED, lambda v: v["annotations"][1].update(answers=[])),
    ),
    Case(
        "an answer of a person a number",
        VQA_FILE,
        ("entry 1", "a number"),
        values_of(ANNOTATED, lambda v: v["annotations"][1].update(answers=[1])),
    ),
    Case(
        "a type a number",
        VQA_FILE,
        ("entry 1", "answer_type"),
        values_of(ANNOTATED, lambda v: v["annotations"][1].update(answer_type=1)),
    ),
    Case("questions for annotations", VQA_FILE, ("holds questions and no answers",), given("--references", "questions.json"), 2),
    Case(
        "questions of another split",
        VQA_FILE,
        ("question 2", "no such question"),
        values_of("questions.json", lambda v: v["questions"].pop(), "--questions", "questions.json"),
    ),
    Case("metrics of answers", VQA_FILE, ("--metrics belongs to --captions",), options("--metrics", "bleu"), 2),
    Case("an unknown rule", VQA_FILE, ("--vqa-rule", "agreement"), options("--vqa-rule", "strict"), 2),
]
VQA_RUNS = [
    Case("answers of captions", VQA, ("task 'caption'", "blip-post --captions"), given("--outputs", "captions/outputs")),
    Case(
        "questions without answers to them",
        VQA,
        ("--questions belongs to --references",),
        given("--questions", "questions.json"),
        2,
    ),
    Case("answers of another run", VQA, ("not the results of one run",), texts_of("vqa", "answers.json", lambda v: v.pop())),
    Case(
        "answers to other questions",
        VQA,
        ("3 results, which are not of the 3 questions",),
        texts_of("vqa", "answers.json", lambda v: v[0].update(question_id=7)),
    ),
    Case("ranked without a k", VQA, ("garbles 'k_test'",), signed("vqa/outputs", lambda m: m["options"].update(answers=["a"]))),
    Case(
        "a question nobody answered",
        VQA,
        ("Nobody answered the question 101",),
        data_of("vqa", lambda m: m["questions"][1].update(answers=[])),
    ),
    Case(
        "a question about no picture", VQA, ("beyond the 2 images",), data_of("vqa", lambda m: m["questions"][1].update(image=2))
    ),
    Case(
        "a question without a type",
        VQA,
        ("garbles 'answer_type'",),
        data_of("vqa", lambda m: m["questions"][1].pop("answer_type")),
    ),
]


@pytest.mark.parametrize("case", CAPTION_FILES + CAPTION_RUNS + ANSWER_FILES + VQA_RUNS, ids=str)
def test_scores(case: Case, scores: Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scores.root)
    refused(case, scores)


def test_the_usual_ones_succeed(scores: Scores) -> None:
    for step in OLDER:
        chain.done(scores.call(step))
        shutil.rmtree(scores.out)
