"""blip-pre caption and blip-pre vqa: lists, prompts, questions and answers that cannot be read or say something impossible."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import chain
from tests.bad_input import table
from tests.bad_input.damage import changed, cut, given, gone, holding, linked, together
from tests.bad_input.table import Case, Spoil, Work, options, refused

LIST, FOLDER, VQA = "pre caption", "pre folder", "pre vqa"
OLDER = {LIST: "caption-data", FOLDER: "caption-data", VQA: "vqa-data"}
NAN = float("nan")
ASKED = [{"image": f"{n % 4}.png", "question": "word1 word2?", "question_id": n} for n in range(6)]
NOTED = [{"question_id": n, "answers": [{"answer": "yes"}] * 10, "answer_type": "other"} for n in range(6)]


class Prepared(Work):
    """With the steps of these two tasks."""

    def usual(self, step: str) -> list[object]:
        prepared = ("--images", self["images"], "--graphs", self["graphs"], "--out", self.out, "--workers", 1)
        noted = ("--questions", self["questions.json"], "--annotations", self["answers.json"])
        steps: dict[str, tuple[object, ...]] = {
            LIST: ("caption", "--annotations", self["annotations.json"], *prepared),
            FOLDER: ("caption", *prepared),
            VQA: ("vqa", *noted, *prepared),
        }
        return list(steps[step])


@pytest.fixture(scope="module")
def made(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The questions, and what both tasks have written before. Read only."""
    root = tmp_path_factory.mktemp("captioned")
    (root / "questions.json").write_text(json.dumps(ASKED))
    (root / "answers.json").write_text(json.dumps({"annotations": NOTED}))
    for name in ("images", "graphs", "annotations.json"):
        (root / name).symlink_to(good / name)
    for step in (LIST, VQA):
        chain.done(Prepared(root).call(step, "--out", root / OLDER[step], "--limit", 2))
    return root


@pytest.fixture
def prepared(work: Work, made: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """A copy to spoil."""
    for step, name in OLDER.items():
        monkeypatch.setitem(table.OLDER, step, name)
        shutil.copytree(made / name, work[name], dirs_exist_ok=True)
    for name in ("questions.json", "answers.json"):
        shutil.copy(made / name, work[name])
    return Prepared(work.root)


def _list(values: object) -> Spoil:
    return holding("annotations.json", json.dumps(values))


def _coco(images: object, annotations: object) -> Spoil:
    return _list({"images": images, "annotations": annotations})


def _second(**changes: Any) -> Spoil:
    """The second of four pictures in the list; None removes a part."""
    entry = {"image": "1.png", "caption": ["word1"], **changes}
    return lambda work: work.annotate({key: value for key, value in entry.items() if value is not None})


def _flickr(text: str, listed: str) -> Spoil:
    files = together(holding("token.txt", text), holding("Flickr_8k.testImages.txt", listed))
    return together(files, given("--annotations", "token.txt"))


def _prompts(text: str | bytes) -> Spoil:
    return together(holding("prompts.txt", text), given("--prompts-file", "prompts.txt"))


def _pictures(change: Callable[[Path], object]) -> Spoil:
    """The folder of pictures is changed."""
    return lambda work: change(work["images"]) and None


def _emptied(images: Path) -> None:
    for path in images.iterdir():
        path.unlink()


def _copied(images: Path, name: str) -> None:
    shutil.copy(images / "1.png", images / name)


def _asked(**changes: Any) -> Spoil:
    """The second of six questions; None removes a part."""
    return holding("questions.json", json.dumps(_with(ASKED, changes)))


def _noted(**changes: Any) -> Spoil:
    """The annotation of that question."""
    return holding("answers.json", json.dumps({"annotations": _with(NOTED, changes)}))


def _with(rows: list[dict[str, Any]], changes: dict[str, Any]) -> list[dict[str, Any]]:
    entry = {key: value for key, value in {**rows[1], **changes}.items() if value is not None}
    return [rows[0], entry, *rows[2:]]


def _choices(text: str) -> Spoil:
    return together(holding("list.json", text), given("--answer-list", "list.json"))


def _official(work: Work) -> list[object]:
    """VQA v2's questions about pictures that have other names here."""
    questions = [{"question_id": n, "image_id": n % 4, "question": "word1?"} for n in range(6)]
    work["questions.json"].write_text(json.dumps({"questions": questions}))
    return []


ENTRY = ("annotations.json, entry 1 (1.png)",)
LISTS = [
    Case("empty list", LIST, ("annotations.json holds an empty list",), _list([])),
    Case("empty file", LIST, ("annotations.json is empty",), holding("annotations.json", "")),
    Case("JSON cut off", LIST, ("annotations.json is not JSON",), changed("annotations.json", cut)),
    Case("JSON nested deeply", LIST, ("nested too deeply",), holding("annotations.json", "[" * 200_000)),
    Case("not UTF-8", LIST, ("is not UTF-8",), holding("annotations.json", b"\xff\xfe[")),
    Case("a text, no list", LIST, ("holds a text", "a list of entries"), _list("0.png")),
    Case("no such list", LIST, ("no annotation file nowhere.json",), options("--annotations", "nowhere.json")),
    Case("questions as list", LIST, ("have the same image_id, 0",), given("--annotations", "questions.json")),
    Case("answers as list", LIST, ("answers.json has no 'images'",), given("--annotations", "answers.json")),
    Case("../ in a path", LIST, ("entry 1", "leaves the --images folder"), _second(image="../images/1.png")),
    Case("absolute path", LIST, ("entry 1", "leaves the --images folder"), _second(image="/etc/passwd")),
    Case("an address", LIST, ("entry 1", "is an address"), _second(image="https://example.org/1.png")),
    Case("NUL in a path", LIST, ("entry 1", "control character"), _second(image="1.png\0")),
    Case("picture missing", LIST, ("9.png (entry 1)", "does not exist", "--skip-broken"), _second(image="9.png")),
    Case("no image", LIST, ("entry 1 has no 'image'",), _second(image=None)),
    Case("caption list empty", LIST, (*ENTRY, "an empty list"), _second(caption=[])),
    Case("caption a number", LIST, (*ENTRY, "its caption is a number"), _second(caption=7)),
    Case("caption half a character", LIST, (*ENTRY, "lone surrogate"), _second(caption="\ud800")),
    Case("captions of some", LIST, ("1.png (entry 1) has no caption", "or none"), _second(caption=None)),
    Case("id NaN", LIST, (*ENTRY, "its image_id is NaN"), _second(image_id=NAN)),
    Case("id infinite", LIST, (*ENTRY, "its image_id is Infinity"), _second(image_id=float("inf"))),
    Case("id true", LIST, (*ENTRY, "its image_id is true"), _second(image_id=True)),
    Case("id below 0", LIST, (*ENTRY, "its image_id is -1"), _second(image_id=-1)),
    Case("id of 300 digits", LIST, (*ENTRY, "its image_id is 1000"), _second(image_id=10**300)),
    Case("id a fraction", LIST, (*ENTRY, "its image_id is 0.5"), _second(image_id=0.5)),
    Case("id an object", LIST, (*ENTRY, "its image_id is an object"), _second(image_id={"id": 1})),
    Case("id twice", LIST, ("0.png and 1.png have the same image_id, 0",), _second(image_id=0)),
    Case("prompts of some", LIST, ("0.png (entry 0) has no prompt", "or none"), _second(prompt="word1")),
    Case("prompt a number", LIST, (*ENTRY, "its prompt is a number"), _second(prompt=7)),
    Case("picture of COCO without id", LIST, ("image 0 has no 'id'",), _coco([{"file_name": "0.png"}], [])),
    Case("caption of no picture", LIST, ("annotation 0", "7, is none of the 1"), _coco([{"id": 0}], [{"image_id": 7}])),
    Case("captions of COCO a text", LIST, ("its 'annotations' is a text",), _coco([{"id": 0}], "x")),
    Case("no picture of COCO there", LIST, ("None of the 1", "000000000000.jpg"), _coco([{"id": 0}], [])),
    Case(
        "split that is not there",
        LIST,
        ("'val'", "test (1)"),
        together(
            _list({"images": [{"filename": "0.png", "split": "test", "sentences": [{"raw": "word1"}]}]}),
            options("--split", "val"),
        ),
    ),
    Case("Flickr's captions without a tab", LIST, ("token.txt, line 1", "<TAB>"), _flickr("0.png#0 word1\n", "0.png\n")),
    Case("Flickr's list of others", LIST, ("line 2", "no caption of '1.png'"), _flickr("0.png#0\tword1\n", "0.png\n1.png\n")),
    Case(
        "no list of Flickr",
        LIST,
        ("Flickr_8k.trainImages.txt is missing",),
        together(_flickr("0.png#0\tword1\n", "0.png\n"), options("--split", "train")),
    ),
]
PROMPTS = [
    Case("fewer prompts", FOLDER, ("prompts.txt holds 3 prompts for 4 pictures",), _prompts("a\nb\nc\n")),
    Case("more prompts", FOLDER, ("prompts.txt holds 5 prompts for 4 pictures",), _prompts("a\nb\nc\nd\ne")),
    Case("no prompts", FOLDER, ("prompts.txt is empty",), _prompts("\n")),
    Case("prompts not UTF-8", FOLDER, ("prompts.txt is not UTF-8",), _prompts(b"a\n\xff\n")),
    Case("no file of prompts", FOLDER, ("There is no file nowhere.txt",), options("--prompts-file", "nowhere.txt")),
    Case("folder of prompts", FOLDER, ("There is no file", "images"), given("--prompts-file", "images")),
]
FOLDERS = [
    Case("no folder", FOLDER, ("no folder nowhere",), options("--images", "nowhere")),
    Case("no pictures in the folder", FOLDER, ("images holds no picture", ".jpg"), _pictures(_emptied)),
    Case("file as folder", FOLDER, ("no folder", "annotations.json"), given("--images", "annotations.json")),
    Case("split of a folder", FOLDER, ("--split chooses from a list",), options("--split", "test"), 2),
    Case("two pictures with one id", FOLDER, ("1.png and x_1.png", "image_id, 1"), _pictures(lambda f: _copied(f, "x_1.png"))),
    Case("linked folder", FOLDER, ("images/more is a link to a folder",), linked("images/more", "../model")),
    Case("pipe as picture", FOLDER, ("9.png", "is not a file"), _pictures(lambda f: os.mkfifo(f / "9.png"))),
    Case("name that is not UTF-8", FOLDER, ("control character",), _pictures(lambda f: _copied(f, os.fsdecode(b"\xff.png")))),
    Case("line break in a name", FOLDER, ("control character",), _pictures(lambda f: _copied(f, "a\nb.png"))),
    Case(
        "broken JPEG",
        FOLDER,
        ("x.jpg (entry 4)", "truncated"),
        together(_pictures(lambda f: _copied(f, "x.jpg")), changed("images/x.jpg", cut)),
    ),
    Case(
        "every picture broken",
        FOLDER,
        ("4 of 4", "Nothing would remain"),
        together(_pictures(lambda f: [path.write_bytes(b"") for path in f.iterdir()]), options("--skip-broken")),
    ),
    Case("no graphs", FOLDER, ("no folder nowhere", "blip-export"), options("--graphs", "nowhere")),
    Case("data for graphs", FOLDER, ("is a 'data' folder",), given("--graphs", "data")),
    Case("captions over retrieval", FOLDER, ("'retrieval'", "'caption'"), given("--out", "data"), 2),
    Case("captions over questions", LIST, ("'vqa'", "'caption'"), given("--out", "vqa-data"), 2),
    Case("no picture wanted", FOLDER, ("--limit", "0"), options("--limit", 0), 2),
]
ASKING = ("questions.json, entry 1 (1.png)",)
QUESTIONS = [
    Case("no questions", VQA, ("questions.json holds an empty list",), holding("questions.json", "[]")),
    Case("no such questions", VQA, ("no file nowhere.json", "--questions"), options("--questions", "nowhere.json")),
    Case("questions cut off", VQA, ("questions.json is not JSON",), changed("questions.json", cut)),
    Case("annotations as questions", VQA, ("answers.json has no 'questions'",), given("--questions", "answers.json")),
    Case("captions as questions", VQA, ("entry 0 (0.png) has no 'question_id'",), given("--questions", "annotations.json")),
    Case("question_id twice", VQA, (*ASKING, "its question_id, 0, is that of entry 0"), _asked(question_id=0)),
    Case("question_id NaN", VQA, (*ASKING, "its question_id is NaN"), _asked(question_id=NAN)),
    Case("question_id true", VQA, (*ASKING, "its question_id is true"), _asked(question_id=True)),
    Case("question_id blank", VQA, (*ASKING, "its question_id is an empty text"), _asked(question_id=" ")),
    Case("no question", VQA, (*ASKING, "has no 'question'"), _asked(question=None)),
    Case("question blank", VQA, (*ASKING, "its question is an empty text"), _asked(question="")),
    Case("question a list", VQA, (*ASKING, "its question is a list"), _asked(question=["word1"])),
    Case("question of an unknown picture", VQA, ("9.png (entry 1)", "does not exist"), _asked(image="9.png")),
    Case("questions of unknown pictures", VQA, ("None of the 4", "000000000000.jpg"), _official),
    Case("picture outside", VQA, ("entry 1", "leaves the --images folder"), _asked(image="../questions.json")),
    Case("image_id NaN in a question", VQA, ("entry 1", "its image_id is NaN"), _asked(image=None, image_id=NAN)),
    Case("image_id a text", VQA, ("entry 1", "has no 'image'"), _asked(image=None, image_id="cat")),
    Case("broken picture", VQA, ("1.png (entry 1)", "their questions"), changed("images/1.png", cut)),
    Case("questions over captions", VQA, ("'caption'", "'vqa'"), given("--out", "caption-data"), 2),
]
ANSWERS = [
    Case("no such answers", VQA, ("no file nowhere.json", "--annotations"), options("--annotations", "nowhere.json")),
    Case("answers gone", VQA, ("no file", "answers.json"), gone("answers.json")),
    Case("questions as answers", VQA, ("questions.json is a list", "'annotations'"), given("--annotations", "questions.json")),
    Case("annotation without answers", VQA, ("annotation 1 (question 1) has no 'answers'",), _noted(answers=None)),
    Case("annotation with no answer", VQA, ("annotation 1", "answers are an empty list"), _noted(answers=[])),
    Case("answer a number", VQA, ("annotation 1", "an answer is a number"), _noted(answers=[{"answer": 7}])),
    Case("annotation of another question", VQA, (*ASKING, "none of the question 1"), _noted(question_id=99)),
    Case("annotated twice", VQA, ("annotation 1", "annotated twice"), _noted(question_id=0)),
    Case("answer_type a list", VQA, ("annotation 1", "its answer_type is a list"), _noted(answer_type=[])),
    Case("answer list empty", VQA, ("list.json holds an empty list",), _choices("[]")),
    Case("answer list an object", VQA, ("list.json holds an object",), _choices('{"yes": 0}')),
    Case("answer list with a number", VQA, ("list.json: answer 1 is a number",), _choices('["yes", 7]')),
    Case("answer list not JSON", VQA, ("list.json is not JSON",), _choices("yes\nno\n")),
    Case("no answer list", VQA, ("no file nowhere.json", "--answer-list"), options("--answer-list", "nowhere.json")),
]


@pytest.mark.parametrize("case", LISTS + PROMPTS + FOLDERS + QUESTIONS + ANSWERS, ids=str)
def test_captioned(case: Case, prepared: Prepared) -> None:
    refused(case, prepared)


def test_the_steps_succeed_unspoilt(prepared: Prepared) -> None:
    """Else a case could be refused for another reason than its own."""
    for step, said in ((LIST, "4 pictures, 8 captions"), (FOLDER, "4 pictures, no captions"), (VQA, "6 questions, 60 answers")):
        assert said in chain.done(prepared.call(step, "--out", prepared[step]))
