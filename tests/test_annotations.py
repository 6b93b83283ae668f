"""Annotations: the three forms, and one sentence for each kind of wrong file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from models.errors import UserError
from preprocess import annotations
from preprocess.annotations import Annotations, read_annotations


def read(tmp_path: Path, values: object, split: str = "test") -> Annotations:
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(values), "utf-8")
    return read_annotations(path, split)


def test_a_list_of_captions_is_one_picture(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        [{"image": "val/a.jpg", "caption": ["A dog.", "Two dogs"], "image_id": 7}, {"image": "b.jpg", "caption": ["a cat 😀"]}],
    )
    assert found == Annotations(["val/a.jpg", "b.jpg"], ["A dog.", "Two dogs", "a cat 😀"], [0, 0, 1], [0, 1], [0, 0, 1])


def test_string_captions_of_one_picture_are_merged(tmp_path: Path) -> None:
    entries = [("a.jpg", "one"), ("b.jpg", "two"), ("a.jpg", "three"), ("b.jpg", "four"), ("c.jpg", "five")]
    found = read(tmp_path, [{"image": image, "caption": caption, "image_id": "x"} for image, caption in entries])
    assert found.images == ["a.jpg", "b.jpg", "c.jpg"]
    assert found.captions == ["one", "two", "three", "four", "five"]
    assert found.image_of_text == [0, 1, 0, 1, 2]
    assert found.entries == [0, 1, 4]
    assert found.caption_entries == [0, 1, 2, 3, 4]


def test_a_picture_listed_twice_with_lists_counts_twice(tmp_path: Path) -> None:
    found = read(tmp_path, [{"image": "a.jpg", "caption": ["one"]}, {"image": "a.jpg", "caption": ["two"]}])
    assert (found.images, found.image_of_text) == (["a.jpg", "a.jpg"], [0, 1])


def karpathy(coco: bool) -> dict[str, Any]:
    splits = ["train", "test", "val", "restval", "test"]
    pictures: list[dict[str, Any]] = [
        {"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": f"caption {n}", "tokens": []}, {"raw": "x"}]}
        for n, split in enumerate(splits)
    ]
    for picture in pictures if coco else []:
        picture["filepath"] = "val2014"
    return {"images": pictures, "dataset": "coco" if coco else "flickr30k"}


@pytest.mark.parametrize(("split", "entries"), [("train", [0, 3]), ("val", [2]), ("test", [1, 4])])
def test_karpathys_own_file(tmp_path: Path, split: str, entries: list[int]) -> None:
    coco, flickr = read(tmp_path, karpathy(True), split), read(tmp_path, karpathy(False), split)
    assert coco.images == [f"val2014/{n}.jpg" for n in entries]
    assert flickr.images == [f"{n}.jpg" for n in entries]
    assert coco.captions == [text for n in entries for text in (f"caption {n}", "x")]
    assert coco.entries == entries
    assert coco.image_of_text == [n for n in range(len(entries)) for _ in range(2)]


def test_keep(tmp_path: Path) -> None:
    found = read(tmp_path, karpathy(True), "test")
    kept = found.keep([1])
    assert kept == Annotations(["val2014/4.jpg"], ["caption 4", "x"], [0, 0], [4], [4, 4])
    assert found.keep([0, 1]) == found
    assert found.keep([]) == Annotations()


def test_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\ufeff[{"image": "a.jpg", "caption": "a dog"}]', "utf-8")
    assert read_annotations(tmp_path / "a.json").captions == ["a dog"]


def test_long_and_odd_captions_are_kept_as_annotated(tmp_path: Path) -> None:
    captions = ["word " * 10_000, "😀", "一只狗", " A  Dog. ", "\u200b"]
    assert read(tmp_path, [{"image": "a.jpg", "caption": captions}]).captions == captions


WRONG_TEXT = {
    b"": "is empty",
    b" \n\t": "is empty",
    b"[": "is not JSON: Expecting value in line 1, column 2",
    b'[{"image": "a.jpg",\n "caption": "x",}]': "is not JSON: ",
    b'[{"image": "a.jpg", "caption": "a dog"}]]': "is not JSON: Extra data in line 1, column 41",
    b"a dog": "is not JSON: Expecting value in line 1, column 1",
    b"\xff\xd8\xff\xe0\x00\x10JFIF": "is not UTF-8 text (byte 0)",
    b'[{"image": "a.jpg", "caption": "caf\xe9"}]': "is not UTF-8 text (byte 35)",
    b"[" * 200_000: "is nested too deeply",
    b"[" + b"9" * 5_000 + b"]": "is not JSON that can be read: ",
}


@pytest.mark.parametrize("data", WRONG_TEXT, ids=range(len(WRONG_TEXT)))
def test_not_json(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "annotations.json"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read_annotations(path)
    assert error.value.message.startswith(f"{path} {WRONG_TEXT[data]}")
    assert "\n" not in error.value.message


GOOD = {"image": "good.jpg", "caption": ["a dog"]}
WRONG_VALUES: list[tuple[object, str]] = [
    ([], "is an empty list"),
    (None, "holds null; expected a list"),
    (3, "holds a number; expected a list"),
    ("text", "holds a text; expected a list"),
    ({}, "has no 'images'; it has nothing"),
    ({"annotations": [], "info": 1}, "has no 'images'; it has 'annotations', 'info'"),
    ({"images": []}, "its 'images' is an empty list"),
    ({"images": {"a": 1}}, "its 'images' is an object"),
    ({"images": [{"file_name": "a.jpg", "id": 3}]}, "entry 0 has no 'split'; it has 'file_name', 'id'"),
    ({"images": [{"split": "test"}]}, "entry 0 has no 'filename'"),
    (
        {"images": [{"split": "test", "filename": "a.jpg", "filepath": 5, "sentences": [{"raw": "x"}]}]},
        "entry 0: its image is a number",
    ),
    (
        {"images": [{"split": "test", "filename": "a.jpg", "filepath": "..", "sentences": [{"raw": "x"}]}]},
        "'..' leaves the --images",
    ),
    ({"images": [{"split": "test", "filename": "a.jpg"}]}, "entry 0 has no 'sentences'"),
    ({"images": [{"split": "test", "filename": "a.jpg", "sentences": []}]}, "entry 0 (a.jpg): it has no sentences"),
    (
        {"images": [{"split": "test", "filename": "a.jpg", "sentences": ["x"]}]},
        "entry 0 (a.jpg) is a text; expected an object with 'raw'",
    ),
    ({"images": [{"split": "test", "filename": "a.jpg", "sentences": [{"raw": None}]}]}, "entry 0 (a.jpg): a caption is null"),
    (
        {"images": [{"split": "val"}, {"split": "val"}, {"split": "train"}]},
        "no picture in the split 'test'; it has train (1), val (2)",
    ),
    ([GOOD, "a.jpg"], "entry 1 is a text; expected an object"),
    ([GOOD, [GOOD]], "entry 1 is a list; expected an object"),
    ([GOOD, {"caption": "x"}], "entry 1 has no 'image'; it has 'caption'"),
    ([GOOD, {"image": "a.jpg"}], "entry 1 has no 'caption'; it has 'image'"),
    ([GOOD, {"image": None, "caption": "x"}], "entry 1: its image is null"),
    ([GOOD, {"image": 5, "caption": "x"}], "entry 1: its image is a number"),
    ([GOOD, {"image": " ", "caption": "x"}], "entry 1: its image is an empty text"),
    ([GOOD, {"image": "a.jpg", "caption": None}], "entry 1 (a.jpg): its caption is null"),
    ([GOOD, {"image": "a.jpg", "caption": 7}], "entry 1 (a.jpg): its caption is a number"),
    ([GOOD, {"image": "a.jpg", "caption": {"raw": "x"}}], "entry 1 (a.jpg): its caption is an object"),
    ([GOOD, {"image": "a.jpg", "caption": []}], "entry 1 (a.jpg): its caption is an empty list"),
    ([GOOD, {"image": "a.jpg", "caption": ["x", None]}], "entry 1 (a.jpg): a caption is null"),
    ([GOOD, {"image": "a.jpg", "caption": ["x", True]}], "entry 1 (a.jpg): a caption is true or false"),
    ([GOOD, {"image": "a.jpg", "caption": ["x", ["y"]]}], "entry 1 (a.jpg): a caption is a list"),
    ([GOOD, {"image": "a.jpg", "caption": ""}], "entry 1 (a.jpg): the caption '' has no words"),
    ([GOOD, {"image": "a.jpg", "caption": [" \n\t"]}], "entry 1 (a.jpg): the caption ' \\n\\t' has no words"),
    ([GOOD, {"image": "a.jpg", "caption": ["..."]}], "entry 1 (a.jpg): the caption '...' has no words"),
    (
        [GOOD, {"image": "a.jpg", "caption": ["a \ud83d dog"]}],
        "entry 1 (a.jpg): the caption 'a \\ud83d dog' holds half a character",
    ),
    ([GOOD, {"image": "/etc/passwd", "caption": "x"}], "entry 1: its image '/etc/passwd' leaves the --images folder"),
    ([GOOD, {"image": "../a.jpg", "caption": "x"}], "entry 1: its image '../a.jpg' leaves the --images folder"),
    ([GOOD, {"image": "a/../../b.jpg", "caption": "x"}], "entry 1: its image 'a/../../b.jpg' leaves the --images folder"),
    ([GOOD, {"image": "a\\..\\b.jpg", "caption": "x"}], "has a backslash"),
    ([GOOD, {"image": "C:\\a.jpg", "caption": "x"}], "has a backslash"),
    ([GOOD, {"image": "a\0.jpg", "caption": "x"}], "entry 1: its image 'a\\x00.jpg' has a control character"),
    ([GOOD, {"image": "a\n.jpg", "caption": "x"}], "has a control character"),
    ([GOOD, {"image": "a\ud800.jpg", "caption": "x"}], "has a control character"),
    ([GOOD, {"image": "http://host/a.jpg", "caption": "x"}], "is an address"),
    ([GOOD, {"image": "file:///a.jpg", "caption": "x"}], "is an address"),
]


@pytest.mark.parametrize(("values", "says"), WRONG_VALUES, ids=range(len(WRONG_VALUES)))
def test_wrong_values(tmp_path: Path, values: object, says: str) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, values)
    assert error.value.message.startswith(str(tmp_path / "annotations.json"))
    assert says in error.value.message
    assert error.value.message.isprintable()


def test_harmless_paths_are_kept(tmp_path: Path) -> None:
    names = ["./a.jpg", "a..b/c.jpg", "...", "deep/er/ä ö.jpg", "a:b.jpg"]
    assert read(tmp_path, [{"image": name, "caption": ["x"]} for name in names]).images == names


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no annotation file"):
        read_annotations(tmp_path / "absent.json")
    with pytest.raises(UserError, match="is not a file"):
        read_annotations(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="is not a file"):
        read_annotations(tmp_path / "pipe.json")


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(annotations.LARGEST + 1)  # sparse
    with pytest.raises(UserError, match=r"has 1,073,741,825 bytes; annotations of more than 1,073,741,824 bytes are not read"):
        read_annotations(tmp_path / "huge.json")


@pytest.mark.real_data
def test_the_karpathy_test_split() -> None:
    found = read_annotations(Path(os.environ["BLIP_REAL_DATA"]) / "annotations/coco_karpathy_test.json")
    assert (len(found.images), len(found.captions)) == (5_000, 25_010)
    assert found.images[0] == "val2014/COCO_val2014_000000391895.jpg"
    assert max(found.image_of_text) == 4_999
