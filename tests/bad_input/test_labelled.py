"""blip-pre classify: class folders, lists of labels and CIFAR's pickles that cannot be read or say something impossible."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models import manifest
from tests import chain
from tests.bad_input.damage import Hostile, changed, cut, given, gone, holding, linked, together
from tests.bad_input.table import Case, Spoil, Work, options, refused
from tests.test_cifar import batch, pictures, python2

STEP = "pre classify"
CIFAR = "cifar/cifar-100-python"
ONE = {"image": "0.png", "label": "cat"}


def _classes(change: Callable[[Path], object]) -> Spoil:
    """The folder of class folders is changed."""
    return lambda work: change(work["classes"]) and None


def _list(data: str | bytes) -> Spoil:
    """labels.json holds these bytes, and is what is read."""
    named: Spoil = lambda work: ("--annotations", work["labels.json"], "--images", work["images"])  # noqa: E731
    return together(holding("labels.json", data), named)


def _values(values: object) -> Spoil:
    return _list(json.dumps(values))


def _second(image: Any = "1.png", label: Any = "cat", classes: Any = None) -> Spoil:
    """The second of two entries is this one, beside the names of classes if there are any."""
    entries = [ONE, {"image": image, "label": label}]
    return _values(entries if classes is None else {"classes": classes, "images": entries})


def _batch(**changes: Any) -> Spoil:
    """The test part of CIFAR-100, with these parts of it replaced; None removes one."""
    return holding(f"{CIFAR}/test", python2(batch(**changes)))


def _copy(images: Path, name: str, other: str) -> None:
    shutil.copytree(images / name, images / other)


def _not_utf8(images: Path) -> None:
    (images / "word3" / "0.png").rename(images / "word3" / os.fsdecode(b"\xff.png"))


def _all_broken(work: Work) -> list[object]:
    for path in work["classes"].rglob("*.png"):
        path.write_bytes(b"")
    return ["--skip-broken"]


ENTRY = ("labels.json, entry 1",)
FOLDERS = [
    Case("no folder of classes", STEP, ("no folder nowhere", "one folder of pictures per class"), options("--images", "nowhere")),
    Case("a file as folder of classes", STEP, ("no folder", "annotations.json"), given("--images", "annotations.json")),
    Case("pictures without classes", STEP, ("images holds no class folders", "need --annotations"), given("--images", "images")),
    Case("empty class", STEP, ("classes/cat holds no picture", "remove it"), _classes(lambda c: (c / "cat").mkdir())),
    Case("a text in a class", STEP, ("word3 holds", "a.txt", "Remove it"), holding("classes/word3/a.txt", "x")),
    Case("a picture in no class", STEP, ("classes holds loose.png",), holding("classes/loose.png", b"x")),
    Case("a pipe as picture", STEP, ("word3/x.png", "is not a file"), _classes(lambda c: os.mkfifo(c / "word3/x.png"))),
    Case("a pipe beside the classes", STEP, ("classes holds x beside",), _classes(lambda c: os.mkfifo(c / "x"))),
    Case("a link in circles", STEP, ("classes holds out beside",), linked("classes/out", "out")),
    Case("a link out of a class", STEP, ("word3 holds", "up", "no picture"), linked("classes/word3/up", "..")),
    Case("a picture that links to itself", STEP, ("word3/x.png", "symbolic links"), linked("classes/word3/x.png", "x.png")),
    Case("a picture that links to nothing", STEP, ("word3/x.png", "does not exist"), linked("classes/word3/x.png", "gone.png")),
    Case("a picture that links to a text", STEP, ("is not a picture",), linked("classes/word3/x.png", "../../model/vocab.txt")),
    Case(
        "two names of one class",
        STEP,
        ("two classes are called 'word1 word2'",),
        _classes(lambda c: _copy(c, "word1 word2", "word1_word2")),
    ),
    Case("classes but for a blank", STEP, ("two classes are called 'word3'",), _classes(lambda c: _copy(c, "word3", "word3_"))),
    Case("a class without a name", STEP, ("class 0 is an empty text",), _classes(lambda c: _copy(c, "word3", "_"))),
    Case("a name that is not UTF-8", STEP, ("is not UTF-8", "Rename it"), _classes(_not_utf8)),
    Case("truncated picture", STEP, ("word3/1.png (entry 9)", "truncated"), changed("classes/word3/1.png", cut)),
    Case("empty pictures", STEP, ("20 of 20", "Nothing would remain"), _all_broken),
]
LISTS = [
    Case("no list", STEP, ("no annotation file nowhere.json",), options("--annotations", "nowhere.json")),
    Case("empty list file", STEP, ("labels.json is empty", "a JSON list"), _list("")),
    Case("list not UTF-8", STEP, ("labels.json is not UTF-8",), _list(b"\xff\xfe[")),
    Case("list cut off", STEP, ("labels.json is not JSON", "line 1"), _list('[{"image": ')),
    Case("list nested deeply", STEP, ("nested too deeply",), _list("[" * 200_000)),
    Case("empty list of labels", STEP, ("labels.json holds an empty list",), _values([])),
    Case("a text of labels", STEP, ("labels.json holds a text", "a list of entries"), _values("cat")),
    Case("no pictures in the list", STEP, ("has 'classes'", "'samples'"), _values({"classes": ["cat"]})),
    Case("two lists", STEP, ("has 'samples', 'images'",), _values({"samples": [ONE], "images": [ONE]})),
    Case("absolute path of a labelled picture", STEP, (*ENTRY, "leaves the --images folder"), _second("/etc/passwd")),
    Case("../ in a labelled path", STEP, (*ENTRY, "leaves the --images folder"), _second("../images/1.png")),
    Case("address of a labelled picture", STEP, (*ENTRY, "is an address"), _second("https://example.org/1.png")),
    Case("NUL in a labelled path", STEP, (*ENTRY, "control character"), _second("1.png\0")),
    Case("labelled picture missing", STEP, ("9.png (entry 1)", "does not exist", "--skip-broken"), _second("9.png")),
    Case("entry without a label", STEP, (*ENTRY, "has no 'label'"), _values([ONE, {"image": "1.png"}])),
    Case("label null", STEP, (*ENTRY, "its label is null"), _second(label=None)),
    Case("label blank", STEP, (*ENTRY, "its label is an empty text"), _second(label=" ")),
    Case("label half a character", STEP, (*ENTRY, "lone surrogate"), _second(label="\ud800")),
    Case("label a number of nothing", STEP, (*ENTRY, "the file has no 'classes'"), _second(label=1)),
    Case("label a fraction", STEP, (*ENTRY, "its whole number"), _second(label=0.5, classes=["cat"])),
    Case("label out of range", STEP, (*ENTRY, "none of the numbers", "0 to 0"), _second(label=1, classes=["cat"])),
    Case("label below 0", STEP, (*ENTRY, "none of the numbers"), _second(label=-1, classes=["cat"])),
    Case("label of no class", STEP, (*ENTRY, "'dog' is none of the 1 classes"), _second(label="dog", classes=["cat"])),
    Case("labels but for a blank", STEP, ("two classes are called 'cat'",), _second(label="cat ")),
    Case("no names of classes", STEP, ("'classes' is an empty list",), _second(classes=[])),
    Case("a text of classes", STEP, ("'classes' is a text",), _second(classes="cat")),
    Case("class a number", STEP, ("class 1 is a number",), _second(classes=["cat", 7])),
    Case("class twice", STEP, ("two classes are called 'cat'",), _second(classes=["cat", "cat"])),
]
PICKLES = [
    Case("no CIFAR folder", "pre cifar", ("no folder nowhere", "unpacked cifar-100-python"), options("--cifar", "nowhere")),
    Case("CIFAR folder without CIFAR", "pre cifar", ("images holds neither",), given("--cifar", "images")),
    Case("test part gone", "pre cifar", ("test does not exist", "Unpack"), gone(f"{CIFAR}/test")),
    Case("train part absent", "pre cifar", ("train does not exist",), options("--split", "train")),
    Case("part empty", "pre cifar", ("test is empty (0 bytes)",), holding(f"{CIFAR}/test", b"")),
    Case("part cut off", "pre cifar", ("test is no pickle, or was cut off",), changed(f"{CIFAR}/test", cut)),
    Case("names of classes cut off", "pre cifar", ("meta is no pickle, or was cut off",), changed(f"{CIFAR}/meta", cut)),
    Case("archive not unpacked", "pre cifar", ("test is no pickle",), holding(f"{CIFAR}/test", b"\x1f\x8b\x08\0archive")),
    Case("a list for a part", "pre cifar", ("test holds a list",), holding(f"{CIFAR}/test", python2([1]))),
    Case("a bomb", "pre cifar", ("test is refused", "more memory"), holding(f"{CIFAR}/test", b"}p4294967280\n.")),
    Case("no pictures in the part", "pre cifar", ("has no 'data'",), _batch(data=None)),
    Case("pictures of 3,071 bytes", "pre cifar", ("expected uint8 (N, 3,072)",), _batch(data=pictures()[:, :-1].copy())),
    Case("fewer labels than pictures", "pre cifar", ("6 pictures, but 5 entries",), _batch(fine_labels=[0] * 5)),
    Case("CIFAR label out of range", "pre cifar", ("entry 3", "0 to 2"), _batch(fine_labels=[0, 1, 2, 3, 0, 0])),
]
MISUSE = [
    Case(name, step, said, options(*values), 2)
    for name, step, said, values in (
        ("no picture wanted", STEP, ("--limit", "0"), ("--limit", 0)),
        ("no worker", STEP, ("--workers", "0"), ("--workers", 0)),
        ("unknown layout", STEP, ("--layout", "zip", "packed"), ("--layout", "zip")),
        ("unknown resize", STEP, ("--interpolation", "nearest"), ("--interpolation", "nearest")),
        ("a split of folders", STEP, ("--split and --labels choose from CIFAR",), ("--split", "test")),
        ("labels of folders", STEP, ("--split and --labels choose from CIFAR",), ("--labels", "fine")),
        ("captions of labels", STEP, ("--skip-captions",), ("--skip-captions",)),
        ("two sources", "pre cifar", ("Both --cifar and --images",), ("--images", "x")),
        ("unknown split", "pre cifar", ("--split", "valid", "'test'"), ("--split", "valid")),
        ("unknown labels", "pre cifar", ("--labels", "rough", "'coarse'"), ("--labels", "rough")),
    )
]
GRAPHS = [
    Case("no graphs", STEP, ("no folder nowhere", "blip-export"), options("--graphs", "nowhere")),
    Case("data for graphs", STEP, ("is a 'data' folder", "expected 'graphs'"), given("--graphs", "data")),
    Case("--out of another step", STEP, ("images is not empty and is not a data folder",), given("--out", "images"), 2),
    Case("--out a file", STEP, ("annotations.json is a file",), given("--out", "annotations.json"), 2),
]


@pytest.mark.parametrize("case", FOLDERS + LISTS + PICKLES + MISUSE + GRAPHS, ids=str)
def test_labelled(case: Case, work2: Work) -> None:
    refused(case, work2)


@pytest.mark.parametrize("file", ["meta", "test"])
def test_a_pickle_that_executes_code(work2: Work, file: str, tmp_path: Path) -> None:
    hostile = Hostile(tmp_path / "executed")
    evil = pickle.dumps({"data": hostile}, 2)
    said = (f"{file} is refused: reading it would run code", "posix.mkdir")
    refused(Case("pickle", "pre cifar", said, holding(f"{CIFAR}/{file}", evil)), work2)
    assert not hostile.mark.exists()
    pickle.loads(evil)
    assert hostile.mark.exists()  # else the check above would see nothing


def test_a_class_folder_may_be_a_link(work2: Work) -> None:
    """As a picture may: where it leads is the business of whoever made it. Inside of a class a linked folder is refused."""
    (work2["classes"] / "word3").rename(work2["elsewhere"])
    (work2["classes"] / "word3").symlink_to(work2["elsewhere"])
    assert "20 pictures, 5 classes" in chain.done(work2.call(STEP))


def test_fewer_pictures_than_wanted(work2: Work) -> None:
    assert "20 pictures" in chain.done(work2.call(STEP, "--limit", 1000))
    assert manifest.read(work2.out, "data").content["classes"][0] == "long1er1"
