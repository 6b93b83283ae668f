"""Annotations that cannot be read or that say something impossible, and odd ones that are all right."""

from __future__ import annotations

import json
from typing import Any

import pytest

from preprocess import annotations
from tests import chain
from tests.bad_input.damage import holding
from tests.bad_input.table import Case, Spoil, Work, options, refused


def _holding(data: str | bytes) -> Spoil:
    return holding("annotations.json", data)


def _entry(entry: Any) -> Spoil:
    return lambda work: work.annotate(entry)


def _image(name: Any) -> Spoil:
    return _entry({"image": name, "caption": "word1"})


def _caption(text: Any) -> Spoil:
    return _entry({"image": "1.png", "caption": text})


KARPATHY = json.dumps({"images": [{"filename": "0.png", "split": "val", "sentences": [{"raw": "word1"}]}]})
SILENT = json.dumps({"images": [{"filename": "0.png", "split": "test", "sentences": []}]})
ENTRY = ("annotations.json, entry 1",)
CASES = [
    Case("malformed JSON", "pre", ("annotations.json is not JSON", "line 1"), _holding('[{"image": "0.png", ')),
    Case("empty file", "pre", ("annotations.json is empty",), _holding("")),
    Case("empty list", "pre", ("annotations.json is an empty list",), _holding("[]")),
    Case("JSON nested deeply", "pre", ("annotations.json is nested too deeply",), _holding("[" * 200_000)),
    Case("a number of 10,000 digits", "pre", ("annotations.json is not JSON",), _holding("[" + "9" * 10_000 + "]")),
    Case("a text, no list", "pre", ("annotations.json holds a text", "a list of entries"), _holding('"0.png"')),
    Case("not UTF-8", "pre", ("annotations.json is not UTF-8",), _holding(b"\xff\xfe\x00[")),
    Case("no such file", "pre", ("no annotation file", "nowhere.json"), options("--annotations", "nowhere.json")),
    Case("folder as file", "pre", ("images is not a file",), lambda work: ("--annotations", work["images"])),
    Case("../ in a path", "pre", (*ENTRY, "leaves the --images folder"), _image("../images/1.png")),
    Case("absolute path", "pre", (*ENTRY, "leaves the --images folder"), _image("/etc/passwd")),
    Case("an address", "pre", (*ENTRY, "is an address"), _image("https://example.org/1.png")),
    Case("backslash in a path", "pre", (*ENTRY, "backslash"), _image("images\\1.png")),
    Case("NUL in a path", "pre", (*ENTRY, "control character"), _image("1.png\0")),
    Case("image is a number", "pre", (*ENTRY, "its image is a number"), _image(7)),
    Case("image is null", "pre", (*ENTRY, "its image is null"), _image(None)),
    Case("entry is a number", "pre", (*ENTRY, "is a number"), _entry(7)),
    Case("no image", "pre", (*ENTRY, "has no 'image'"), _entry({"caption": "word1"})),
    Case("no caption", "pre", (*ENTRY, "has no 'caption'"), _entry({"image": "1.png"})),
    Case("caption empty", "pre", (*ENTRY, "has no words"), _caption("")),
    Case("caption of blanks and points", "pre", (*ENTRY, "has no words"), _caption(" ... ")),
    Case("caption null", "pre", (*ENTRY, "its caption is null"), _caption(None)),
    Case("caption list empty", "pre", (*ENTRY, "its caption is an empty list"), _caption([])),
    Case("caption list with a number", "pre", (*ENTRY, "a caption is a number"), _caption(["word1", 7])),
    Case("half a character", "pre", (*ENTRY, "lone surrogate"), _caption("word1 \ud83d")),
    Case("split that is not there", "pre", ("'test'", "val (1)", "--split"), _holding(KARPATHY)),
    Case("picture without sentences", "pre", ("entry 0", "no sentences"), _holding(SILENT)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_annotations(case: Case, work: Work) -> None:
    refused(case, work)


def test_huge(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    size = work["annotations.json"].stat().st_size
    monkeypatch.setattr(annotations, "LARGEST", size - 1)
    refused(Case("huge", "pre", ("annotations.json", f"{size:,} bytes", "Split the file")), work)


@pytest.mark.parametrize(
    "caption",
    [
        "word1 " * 10_000,
        "w" * 100_000,
        "\N{DOG FACE} word1 \N{FAMILY}",
        "一只棕色的狗在草地上奔跑",
        "\u202ekcab",
        "word1\tword2\nword3",
    ],
    ids=["10,000 words", "one word of 100,000 letters", "emoji", "Chinese", "right to left", "lines"],
)
def test_odd_captions_are_all_right(work: Work, caption: str) -> None:
    """They are prepared and scored as any other: the model's limits cut them, its vocabulary knows them or not."""
    work.annotate({"image": "1.png", "caption": caption})
    chain.done(work.call("pre"))
    run = work.call("run", "--data", work.out, "--out", work["new outputs"])
    assert "Outputs: " in chain.done(run)
    report = work.call("post", "--outputs", work["new outputs"], "--data", work.out, "--out", work["new report"])
    assert "report.html" in chain.done(report)


def test_a_key_given_twice(work: Work) -> None:
    """JSON leaves open which one counts; Python and the original take the last."""
    text = work["annotations.json"].read_text("utf-8")
    work["annotations.json"].write_text(text.replace('{"image"', '{"image": "nowhere.png", "image"'), "utf-8")
    assert "4 pictures" in chain.done(work.call("pre"))
