"""Pictures to be captioned: the forms of lists, ids, prompts, and one sentence for each kind of wrong file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from models import manifest
from models.errors import Misuse, UserError
from preprocess import lines
from preprocess.captioned import Captioned, pictures_in, read_captioned
from preprocess.image_ids import Id, coco_names, id_of, image_id

NAMES = ("a_1.jpg", "val2014/COCO_val2014_000000000042.jpg", "000000000007.jpg", "dog.jpg")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with empty files where pictures would be: reading lists opens none."""
    for name in NAMES:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "images"


def read(images: Path, values: object, *others: Any) -> Captioned:
    path = images.parent / "list.json"
    path.write_text(json.dumps(values), "utf-8")
    return read_captioned(images, path, *others)


def refused(images: Path, values: object, *others: Any) -> str:
    with pytest.raises(UserError) as error:
        read(images, values, *others)
    assert "\n" not in error.value.message
    return error.value.message.removeprefix(f"{images.parent / 'list.json'}")


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("val2014/COCO_val2014_000000522418.jpg", 522418),
        ("000000039769.jpg", 39769),
        ("COCO_val2014_000000000042.v2.jpg", "COCO_val2014_000000000042.v2.jpg"),
        ("a_1/b.jpg", "a_1/b.jpg"),
        ("flickr30k-images/1007129816.jpg", 1007129816),
        ("1000268201_693b08cb0e.jpg", "1000268201_693b08cb0e.jpg"),
        ("dog.jpg", "dog.jpg"),
        ("x_.jpg", "x_.jpg"),
        ("x_0.jpg", 0),
        ("x_-1.jpg", "x_-1.jpg"),
        ("x_٣.jpg", "x_٣.jpg"),
        (f"{'9' * 18}.jpg", 10**18 - 1),
        (f"{'9' * 19}.jpg", f"{'9' * 19}.jpg"),
    ],
)
def test_the_id_that_a_file_name_tells(image: str, expected: Id) -> None:
    assert id_of(image) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(7, 7), (0, 0), ("coco_522418", 522418), ("0042", 42), ("vg_7", "vg_7"), ("a b", "a b"), (2**63 - 1, 2**63 - 1)],
)
def test_the_id_that_annotations_give(value: object, expected: Id) -> None:
    assert image_id(value, "here") == expected


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (True, "true"),
        (1.0, "1.0"),
        (float("nan"), "NaN"),
        (float("inf"), "Infinity"),
        (-1, "-1"),
        (2**63, "9223372036854775808"),
        (None, "null"),
        ([7], "a list"),
    ],
)
def test_no_id(value: object, found: str) -> None:
    with pytest.raises(UserError) as error:
        image_id(value, "here")
    assert error.value.message == f"here: its image_id is {found}; expected a whole number from 0, or a text."


@pytest.mark.parametrize(("value", "found"), [(" ", "is an empty text"), ("\ud800", "half a character")])
def test_no_text_of_an_id(value: str, found: str) -> None:
    with pytest.raises(UserError, match=found):
        image_id(value, "here")


def test_names_of_coco(images: Path) -> None:
    (images / "COCO_test2015_000000000009.jpg").touch()
    names = coco_names([42, 7, 9, 8], images)
    assert names == [NAMES[1], NAMES[2], "COCO_test2015_000000000009.jpg", "COCO_test2015_000000000008.jpg"]
    assert coco_names([42], images / "nowhere") == ["000000000042.jpg"]
    assert coco_names([], images) == []


def test_a_folder(images: Path) -> None:
    (images / "b").mkdir()
    for name in ("b/Z.JPEG", "b/y.PNG", "c.bmp", "d.webp", "notes.txt", ".hidden.jpg", "e.gif"):
        (images / name).touch()
    (images / ".git").mkdir()
    (images / ".git/x.jpg").touch()
    expected = ["000000000007.jpg", "a_1.jpg", "b/Z.JPEG", "b/y.PNG", "c.bmp", "d.webp", "dog.jpg", NAMES[1]]
    assert pictures_in(images) == expected
    found = read_captioned(images)
    assert (found.pictures.names, found.pictures.entries) == (expected, list(range(8)))
    assert found.pictures.sources == [images / name for name in expected]
    assert found.ids == [7, 1, "b/Z.JPEG", "b/y.PNG", "c.bmp", "d.webp", "dog.jpg", 42]
    assert (found.references, found.prompts) == ([[]] * 8, None)
    assert found.source == {"kind": "folder", "folder": str(images)}


def test_folders_that_are_refused(images: Path) -> None:
    with pytest.raises(UserError, match=r"There is no folder .*nowhere; --images takes a folder of pictures\."):
        read_captioned(images / "nowhere")
    with pytest.raises(Misuse, match="--split chooses from a list of pictures"):
        read_captioned(images, split="test")
    (images / "empty").mkdir()
    (images / "empty/a.txt").touch()
    with pytest.raises(UserError, match=r"empty holds no picture: no file whose name ends in \.bmp, \.jpeg, "):
        read_captioned(images / "empty")
    (images / "2_1.png").touch()
    with pytest.raises(UserError, match=r"the pictures 2_1\.png and a_1\.jpg have the same image_id, 1\. Name a picture once"):
        read_captioned(images)
    (images / "2_1.png").unlink()
    (images / "linked").symlink_to(images / "val2014")
    with pytest.raises(UserError, match=r"images/linked is a link to a folder, and is not entered\."):
        read_captioned(images)


def test_a_list_of_blip(images: Path) -> None:
    entries = [
        {"image": NAMES[1], "caption": ["A dog.", " two "]},
        {"image": "dog.jpg", "caption": "A cat"},
        {"image": NAMES[0], "caption": ["x"], "image_id": "coco_9"},
        {"image": NAMES[2], "caption": ["y"], "img_id": 3},
    ]
    found = read(images, entries)
    assert found.pictures.names == [NAMES[1], "dog.jpg", NAMES[0], NAMES[2]]
    assert found.ids == [42, "dog.jpg", 9, 3]
    assert found.references == [["A dog.", " two "], ["A cat"], ["x"], ["y"]]
    path = images.parent / "list.json"
    sha256 = manifest.file_record(path)["sha256"]
    assert found.source == {"kind": "annotations", "file": str(path), "sha256": sha256, "folder": str(images)}
    assert found.pictures.lost == "them and their captions"
    assert found.first(None) == found
    assert (found.first(2).ids, found.first(2).references) == ([42, "dog.jpg"], found.references[:2])
    assert (found.first(2).pictures.names, found.first(2).prompts) == (found.pictures.names[:2], None)


def test_single_captions_of_one_picture_are_merged(images: Path) -> None:
    entries = [("dog.jpg", "one"), ("a_1.jpg", "two"), ("dog.jpg", "three")]
    found = read(images, [{"image": image, "caption": caption, "image_id": image} for image, caption in entries])
    assert (found.pictures.names, found.pictures.entries) == (["dog.jpg", "a_1.jpg"], [0, 1])
    assert found.references == [["one", "three"], ["two"]]
    other = [{"image": "dog.jpg", "caption": "one"}, {"image": "dog.jpg", "caption": "two", "image_id": 5}]
    assert refused(images, other) == (
        ", entry 1 (dog.jpg): its image_id or prompt is not that of entry 0, which is the same picture."
    )
    twice = [{"image": "dog.jpg", "caption": ["one"]}, {"image": "dog.jpg", "caption": ["two"]}]
    assert "the pictures dog.jpg and dog.jpg have the same image_id" in refused(images, twice)


def test_a_list_without_captions(images: Path) -> None:
    found = read(images, [{"image": "dog.jpg"}, {"image": "a_1.jpg", "img_id": 5}])
    assert (found.ids, found.references) == (["dog.jpg", 5], [[], []])
    mixed = [{"image": "dog.jpg", "caption": ["x"]}, {"image": "a_1.jpg"}]
    assert refused(images, mixed) == (
        ": the picture a_1.jpg (entry 1) has no caption, but dog.jpg has. Give every picture a caption, or none."
    )


def coco(**changes: Any) -> dict[str, Any]:
    annotations = [(42, "one"), (7, "two"), (42, "three")]
    return {
        "images": [{"id": 7, "file_name": "dog.jpg"}, {"id": 42}],
        "annotations": [{"image_id": each, "id": n, "caption": text} for n, (each, text) in enumerate(annotations)],
        **changes,
    }


def test_cocos_form(images: Path) -> None:
    found = read(images, coco())
    assert (found.pictures.names, found.ids) == (["dog.jpg", NAMES[1]], [7, 42])
    assert found.references == [["two"], ["one", "three"]]
    found = read(images, {"images": [{"id": 7}, {"id": 42}]})  # image_info_test2014.json has no annotations
    assert (found.pictures.names, found.references) == ([NAMES[2], NAMES[1]], [[], []])
    found = read(images, {"images": [{"id": "dog", "file_name": "dog.jpg"}], "annotations": []})
    assert (found.ids, found.references) == (["dog"], [[]])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"images": []}, ": its 'images' is an empty list; expected a list of pictures."),
        ({"images": 3}, ": its 'images' is a number; expected a list of pictures."),
        ({"images": [3]}, ", image 0 is a number; expected an object with 'id'."),
        ({"images": [{"name": 3}]}, ", image 0 has no 'id'; it has 'name'."),
        (
            {"images": [{"id": "dog"}]},
            ", image 0: its id is a text, and it has no 'file_name'; only a number tells COCO's file name.",
        ),
        ({"images": [{"id": 7, "file_name": "../dog.jpg"}]}, ", image 0: its image '../dog.jpg' leaves the --images folder"),
        ({"images": [{"id": True}]}, ", image 0: its id is true; expected a whole number from 0, or a text."),
        ({"images": [{"id": 42}]}, ", annotation 1: its image_id, 7, is none of the 1 pictures in 'images'."),
        ({"images": [{"id": 7}, {"id": 42}, {"id": 7}]}, f": the pictures {NAMES[2]} and {NAMES[2]} have the same image_id, 7."),
        (
            {"images": [{"id": 7}, {"id": 42}, {"id": 8}]},
            ": the picture val2014/COCO_val2014_000000000008.jpg (entry 2) has no caption, but",
        ),
        ({"annotations": 3}, ": its 'annotations' is a number; expected a list of captions."),
        ({"annotations": [3]}, ", annotation 0 is a number; expected an object with 'image_id'."),
        ({"annotations": [{"image_id": 7}]}, ", annotation 0 has no 'caption'; it has 'image_id'."),
        ({"annotations": [{"image_id": 7, "caption": 3}]}, ", annotation 0: its caption is a number; expected a text."),
        ({"annotations": [{"image_id": float("nan")}]}, ", annotation 0: its image_id is NaN; expected"),
    ],
)
def test_cocos_form_refused(images: Path, changes: dict[str, Any], says: str) -> None:
    assert refused(images, coco(**changes)).startswith(says)


def test_karpathys_own_file(images: Path) -> None:
    rows = (("test", "", NAMES[0]), ("restval", "val2014", NAMES[1][8:]), ("train", "", NAMES[2]))
    pictures = [
        {"filepath": folder, "filename": name, "split": split, "imgid": n, "sentences": [{"raw": f"{n}"}, {"raw": "x"}]}
        for n, (split, folder, name) in enumerate(rows)
    ]
    found = read(images, {"images": pictures, "dataset": "coco"})
    assert (found.pictures.names, found.references, found.ids) == ([NAMES[0]], [["0", "x"]], [1])
    found = read(images, {"images": pictures}, "train")
    assert (found.pictures.names, found.pictures.entries) == ([NAMES[1], NAMES[2]], [1, 2])
    assert (found.references, found.ids) == ([["1", "x"], ["2", "x"]], [42, 7])
    assert "no picture in the split 'val'; it has restval (1), test (1), train (1)." in refused(
        images, {"images": pictures}, "val"
    )


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([], " holds an empty list; expected a list of entries with 'image'."),
        ("dog.jpg", " holds a text; expected a list of entries with 'image'."),
        ({}, " has no 'images'; it has nothing."),
        ({"annotations": []}, " has no 'images'; it has 'annotations'."),
        ({"images": [{"filename": "dog.jpg"}]}, ", entry 0 has no 'split'; it has 'filename'."),
        ([3], ", entry 0 is a number; expected an object with 'image'."),
        ([{"caption": ["x"]}], ", entry 0 has no 'image'; it has 'caption'."),
        ([{"image": "/dog.jpg"}], ", entry 0: its image '/dog.jpg' leaves the --images folder"),
        ([{"image": "dog.jpg", "caption": []}], ", entry 0 (dog.jpg): its caption is an empty list; expected a list of texts."),
        ([{"image": "dog.jpg", "caption": None}], ", entry 0 (dog.jpg): its caption is null; expected a text."),
        ([{"image": "dog.jpg", "caption": ["x", 3]}], ", entry 0 (dog.jpg): a caption is a number; expected a text."),
        ([{"image": "dog.jpg", "caption": " "}], ", entry 0 (dog.jpg): its caption is an empty text; expected a text."),
        ([{"image": "dog.jpg", "caption": "\ud800"}], ", entry 0 (dog.jpg): its caption, '\\ud800', holds half a character"),
        ([{"image": "dog.jpg", "image_id": 0.5}], ", entry 0 (dog.jpg): its image_id is 0.5; expected a whole number"),
        ([{"image": "dog.jpg", "img_id": False}], ", entry 0 (dog.jpg): its img_id is false; expected a whole number"),
        ([{"image": "dog.jpg", "image_id": None}], ", entry 0 (dog.jpg): its image_id is null; expected a whole number"),
        ([{"image": "dog.jpg", "prompt": 3}], ", entry 0 (dog.jpg): its prompt is a number; expected a text."),
        (
            [{"image": "dog.jpg", "prompt": "a"}, {"image": "a_1.jpg"}],
            ": the picture a_1.jpg (entry 1) has no prompt, but dog.jpg has. Give every picture a prompt, or none.",
        ),
    ],
)
def test_lists_refused(images: Path, values: object, says: str) -> None:
    assert refused(images, values).startswith(says)


def test_a_list_of_other_pictures(images: Path) -> None:
    path = images.parent / "list.json"
    path.write_text('[{"image": "9.jpg"}]')
    with pytest.raises(UserError, match=rf"None of the 1 pictures of {path} is in {images}; the first is 9\.jpg\."):
        read_captioned(images, path)
    with pytest.raises(UserError, match="There is no annotation file"):
        read_captioned(images, images / "nowhere.json")


TOKENS = "dog.jpg#0\tA dog .\r\ndog.jpg#1\ttwo#1\tdogs\n\na_1.jpg#0\tA cat\nb.jpg.1#0\tno file\n"


def flickr(images: Path, tokens: str | bytes = TOKENS, **lists: str) -> Path:
    path = images.parent / "Flickr8k.token.txt"
    path.write_bytes(tokens.encode() if isinstance(tokens, str) else tokens)
    for split, text in lists.items():
        (images.parent / f"Flickr_8k.{split}Images.txt").write_text(text)
    return path


def test_flickr8k(images: Path) -> None:
    path = flickr(images, test="a_1.jpg\ndog.jpg\n", dev="dog.jpg\n", train="b.jpg.1\n")
    found = read_captioned(images, path)
    assert (found.pictures.names, found.pictures.entries, found.ids) == (["a_1.jpg", "dog.jpg"], [0, 1], [1, "dog.jpg"])
    assert found.references == [["A cat"], ["A dog .", "two#1\tdogs"]]
    for split in ("dev", "val"):
        assert read_captioned(images, path, split).pictures.names == ["dog.jpg"]
    everything = read_captioned(images, path.rename(path.with_name("results.token")), "all")
    assert everything.pictures.names == ["dog.jpg", "a_1.jpg", "b.jpg.1"]


@pytest.mark.parametrize(
    ("tokens", "listed", "says"),
    [
        ("dog.jpg\n", "", r"Flickr8k\.token\.txt, line 1: found 'dog\.jpg', expected 'name\.jpg#0<TAB>caption'\."),
        ("dog.jpg#0 a dog\n", "", r"line 1: found 'dog\.jpg#0 a dog', expected"),
        ("", "", r"Flickr8k\.token\.txt is empty; expected lines"),
        (b"\xff", "", r"Flickr8k\.token\.txt is not UTF-8 text \(byte 0\); expected lines"),
        (TOKENS, "", r"Flickr_8k\.testImages\.txt is empty; expected a picture in each line\."),
        (TOKENS, "dog.jpg\nc.jpg\n", r"Images\.txt, line 2: .*Flickr8k\.token\.txt has no caption of 'c\.jpg'\."),
        ("dog.jpg#0\t \n", "dog.jpg\n", r"Images\.txt, line 1: a caption is an empty text; expected a text\."),
        ("../dog.jpg#0\tx\n", "../dog.jpg\n", r"Images\.txt, line 1: its image '\.\./dog\.jpg' leaves the --images folder"),
        ("dog.jpg#0\tx\n", "dog.jpg\ndog.jpg\n", r"the pictures dog\.jpg and dog\.jpg have the same image_id"),
    ],
)
def test_flickr8k_refused(images: Path, tokens: str | bytes, listed: str, says: str) -> None:
    path = flickr(images, tokens, test=listed)
    with pytest.raises(UserError, match=says):
        read_captioned(images, path)


def test_flickr8k_without_its_lists(images: Path) -> None:
    path = flickr(images)
    for split in (None, "train", "../x"):
        with pytest.raises(UserError, match=r"Images\.txt is missing: it lists the pictures of .* take all with --split all\."):
            read_captioned(images, path, split)


def test_prompts(images: Path) -> None:
    entries = [{"image": "dog.jpg", "prompt": "a photo of"}, {"image": "a_1.jpg", "prompt": " Question: what? "}]
    found = read(images, entries)
    assert found.prompts == ["a photo of", " Question: what? "]
    assert found.first(1).prompts == ["a photo of"]
    text = images.parent / "prompts.txt"
    text.write_bytes("one \r\ntwo\u2028three\r\n".encode())
    plain = [{"image": "dog.jpg"}, {"image": "a_1.jpg"}]
    found = read(images, plain, None, text)
    assert found.prompts == ["one ", "two\u2028three"]
    assert found.source["prompts"] == str(text)
    text.write_text("\ntwo\n")
    assert read(images, plain, None, text).prompts == ["", "two"]
    assert "Both --prompts-file and" in refused(images, entries, None, text)
    for content, says in (
        ("one", f"{text} holds 1 prompts for 2 pictures of {images.parent / 'list.json'}; expected one each."),
        ("one\ntwo\nthree", f"{text} holds 3 prompts for 2 pictures"),
        ("", f"{text} is empty; expected one prompt in each line."),
    ):
        text.write_text(content)
        assert refused(images, plain, None, text).startswith(says)
    assert refused(images, plain, None, images).startswith(f"There is no file {images}; expected one prompt in each line.")


def test_a_huge_text(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = flickr(images)
    monkeypatch.setattr(lines, "LARGEST", 9)
    with pytest.raises(UserError, match=r"texts of more than 9 bytes are not read\. Split the file\."):
        read_captioned(images, path)


@pytest.mark.real_data
def test_the_same_pictures_in_two_forms() -> None:
    root = Path(os.environ["BLIP_REAL_DATA"]) / "coco108"
    listed = read_captioned(root / "images", root / "annotations.json")
    coco = read_captioned(root / "images", root / "annotations_gt.json")
    assert len(listed.ids) == 108
    assert sum(map(len, listed.references)) == 540
    assert (coco.ids, coco.references, coco.pictures.names) == (listed.ids, listed.references, listed.pictures.names)
    folder = read_captioned(root / "images")
    assert (folder.ids, folder.pictures.names) == (listed.ids, sorted(listed.pictures.names))


@pytest.mark.real_data
def test_ids_of_cocos_karpathy_test(tmp_path: Path) -> None:
    """5,000 pictures; the first is there so that the folder is taken for the right one."""
    path = Path(os.environ["BLIP_REAL_DATA"]) / "annotations/coco_karpathy_test.json"
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014/COCO_val2014_000000391895.jpg").touch()
    found = read_captioned(tmp_path, path)
    assert (len(found.ids), sum(map(len, found.references))) == (5000, 25010)
    assert found.ids[:2] == [391895, 60623]
    assert found.pictures.names == [f"val2014/COCO_val2014_{each:012d}.jpg" for each in found.ids]
