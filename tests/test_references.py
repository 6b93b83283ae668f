"""References and results from their files, and what is said of those that cannot be compared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.errors import Misuse, UserError
from postprocess.references import (
    Asked,
    paired,
    question_id,
    read_answer_results,
    read_answers,
    read_caption_results,
    read_captions,
)

Written = Callable[[Any], Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Writes JSON into files, one after the other."""

    def write(values: Any) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values), "utf-8")
        return path

    return write


def test_captions_of_coco(written: Written) -> None:
    """In the order of `images`; without it, in the order in which pictures are first named."""
    annotations = [
        {"image_id": 9, "id": 1, "caption": "a dog"},
        {"image_id": 7, "id": 2, "caption": "a cat"},
        {"image_id": 9, "id": 3, "caption": "one dog"},
    ]
    whole = read_captions(written({"images": [{"id": 7}, {"id": 9}], "annotations": annotations}))
    assert list(whole.items()) == [(7, ["a cat"]), (9, ["a dog", "one dog"])]
    assert list(read_captions(written({"annotations": annotations}))) == [9, 7]


def test_captions_of_blip(written: Written) -> None:
    found = read_captions(
        written(
            [
                {"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["a dog", "one dog"]},
                {"image": "x.jpg", "caption": ["a cat"], "image_id": 12},
                {"image": "some/flowers.jpg", "caption": ["a rose"]},
                {"image": "y.jpg", "img_id": 3, "caption": ["a pig"]},
            ]
        )
    )
    assert found == {391895: ["a dog", "one dog"], 12: ["a cat"], "some/flowers.jpg": ["a rose"], 3: ["a pig"]}


def test_single_captions_of_one_picture_are_its_captions(written: Written) -> None:
    entries = [
        {"image": f"{name}.jpg", "caption": text, "image_id": f"coco_{name}"} for name, text in ((1, "a"), (2, "b"), (1, "c"))
    ]
    assert read_captions(written(entries)) == {1: ["a", "c"], 2: ["b"]}


def test_captions_of_karpathy(written: Written) -> None:
    images = [
        {"filename": f"COCO_val2014_{n:012d}.jpg", "filepath": "val2014", "split": split, "sentences": [{"raw": f"dog {n}"}]}
        for n, split in ((5, "test"), (6, "val"), (4, "test"))
    ]
    path = written({"images": images})
    assert list(read_captions(path).items()) == [(5, ["dog 5"]), (4, ["dog 4"])]
    assert read_captions(path, "val") == {6: ["dog 6"]}


@pytest.mark.parametrize("own", [522418, "522418", "000000522418", "coco_522418"])
@pytest.mark.parametrize("other", [522418, "522418", "000000522418", "coco_522418"])
def test_ids_of_different_kinds(written: Written, own: int | str, other: int | str) -> None:
    references = read_captions(written({"annotations": [{"image_id": own, "caption": "a dog"}]}))
    results = read_caption_results(written([{"image_id": other, "caption": "a cat"}]))
    assert paired(references, results, "pictures") == [(522418, "a cat", ["a dog"])]


def test_ids_of_questions() -> None:
    assert question_id("262148000", "a.json") == question_id(262148000, "a.json") == 262148000
    assert question_id("vg_1", "a.json") == "vg_1"


def test_answers_of_vqa(written: Written) -> None:
    people = [{"answer": "yes", "answer_confidence": "yes", "answer_id": 1}, {"answer": "", "answer_id": 2}]
    annotation = {"question_id": 5, "image_id": 9, "answers": people, "answer_type": "yes/no", "question_type": "is the"}
    path = written({"annotations": [annotation]})
    assert read_answers(path) == {5: Asked(("yes", ""), "yes/no", "is the", None, 9)}
    questions = written({"questions": [{"question_id": 5, "image_id": 9, "question": "Is it?"}]})
    assert read_answers(path, questions)[5].question == "Is it?"


def test_answers_of_lavis(written: Written) -> None:
    entry = {"image": "val2014/COCO_val2014_000000262148.jpg", "question_id": 262148000, "question": "Where?", "dataset": "vqa"}
    found = read_answers(written([{**entry, "answer": ["down", "up"]}]))
    assert found == {262148000: Asked(("down", "up"), None, None, "Where?", 262148)}
    assert read_answers(written([{**entry, "answer": "down"}]))[262148000].answers == ("down",)


def test_results_may_be_empty_texts(written: Written) -> None:
    assert read_caption_results(written([{"image_id": 1, "caption": ""}])) == {1: ""}
    assert read_answer_results(written([{"question_id": "1", "answer": ""}])) == {1: ""}


def test_pairing() -> None:
    assert paired({1: "a", 2: "b"}, {2: "x", 1: "y"}, "pictures") == [(2, "x", "b"), (1, "y", "a")]
    assert paired({1: "a", 2: "b"}, {2: "x"}, "pictures", only_results=True) == [(2, "x", "b")]
    many = dict.fromkeys(range(1, 2_001), "a")
    with pytest.raises(UserError, match=r"1,999 of 2,000 pictures have no result: 2, 3, 4, 5, 6 and 1,994 more\. Give a result"):
        paired(many, {1: "x"}, "pictures")
    for only in (True, False):
        with pytest.raises(UserError, match=r'1 of 2 results are of pictures that the references do not have: "x"\. Are results'):
            paired({1: "a"}, {1: "a", "x": "b"}, "pictures", only)
        with pytest.raises(UserError, match="no results to compare; expected one for each of 2,000 pictures"):
            paired(many, {}, "pictures", only)


CAPTION = {"image_id": 1, "caption": "a dog"}
ASKED = {"question_id": 1, "answers": ["yes"]}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("", "is empty; expected a JSON file of captions"),
        ("{", "is not JSON: "),
        ([], "holds an empty list; expected a list of entries with 'image'"),
        (7, "holds a number; expected a list of entries with 'image'"),
        ({"a": 1}, "holds an object; expected a list of entries with 'image'"),
        ({"annotations": []}, "its 'annotations' is an empty list; expected a list of captions"),
        ({"annotations": {}}, "its 'annotations' is an object; expected a list of captions"),
        ({"images": 3, "annotations": [CAPTION]}, "its 'images' is a number; expected a list"),
        ({"annotations": [7]}, "annotation 0 is a number; expected an object with 'image_id'"),
        ({"annotations": [{"caption": "a"}]}, "annotation 0 has no 'image_id'; it has 'caption'"),
        ({"annotations": [{**CAPTION, "caption": None}]}, "annotation 0: its caption is null; expected a text"),
        ({"annotations": [{**CAPTION, "caption": " "}]}, "annotation 0: its caption is an empty text"),
        ({"annotations": [{**CAPTION, "image_id": True}]}, "its image_id is true; expected a whole number from 0, or a text"),
        ({"annotations": [{**CAPTION, "image_id": -1}]}, "its image_id is -1; expected a whole number"),
        ({"annotations": [{**CAPTION, "image_id": 1.5}]}, "its image_id is 1.5; expected a whole number"),
        ('{"annotations": [{"image_id": NaN, "caption": "a"}]}', "its image_id is NaN; expected a whole number"),
        ({"images": [{"id": 2}], "annotations": [CAPTION]}, "its image_id, 1, is none of the 1 pictures in 'images'"),
        (
            {"images": [{"id": 1}, {"id": 2}], "annotations": [CAPTION]},
            "1 of 2 pictures have no caption: 2; expected one or more",
        ),
        ({"annotations": [{**ASKED, "image_id": 1}]}, "holds answers to questions, not captions"),
        ([{"image": "a.jpg"}], "entry 0 has no 'caption'; it has 'image'"),
        ([{"image": "a.jpg", "caption": []}], "entry 0: its caption is an empty list; expected a list of texts"),
        ([{"image": "a.jpg", "caption": [3]}], "entry 0: its caption is a number; expected a text"),
        ([{"image": None, "caption": ["a"]}], "entry 0: its image is null; expected a text"),
        ([{"image": "1.jpg", "caption": ["a"]}] * 2, "entry 1: its picture, 1, is that of entry 0. Name a picture once"),
        ([{"image": f"{f}/1.jpg", "caption": "a"} for f in "ab"], "entry 1: its picture, 1, is that of entry 0"),
        (["a"], "entry 0 is a text; expected an object with 'image'"),
    ],
)
def test_wrong_captions(written: Written, values: Any, says: str) -> None:
    path = written(values)
    with pytest.raises(UserError) as error:
        read_captions(path)
    assert error.value.message.startswith(str(path))
    assert says in error.value.message


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([], "holds an empty list; expected a list of results"),
        ({"a": 1}, "holds an object; expected a list of results"),
        ([{"image_id": 1}], "entry 0 has no 'caption'; it has 'image_id'"),
        ([{**CAPTION, "caption": 7}], "entry 0: its caption is a number; expected a text"),
        ([{**CAPTION, "caption": ["a"]}], "entry 0: its caption is a list; expected a text"),
        ([{**CAPTION, "caption": None}], "entry 0: its caption is null; expected a text"),
        ('[{"image_id": 1, "caption": "\\ud800"}]', "entry 0: its caption is half a character"),
        ([CAPTION, {**CAPTION, "image_id": "coco_1"}], "entry 1: the image_id 1 comes a second time. Give one of each"),
    ],
)
def test_wrong_results(written: Written, values: Any, says: str) -> None:
    path = written(values)
    with pytest.raises(UserError) as error:
        read_caption_results(path)
    assert error.value.message.startswith(str(path))
    assert says in error.value.message


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"annotations": []}, "holds an empty list; expected a list of questions with answers"),
        ({"images": []}, "has no 'annotations'; it has 'images'"),
        ({"questions": [{"question_id": 1, "question": "Is it?"}]}, "holds questions and no answers. VQA v2's answers are in"),
        ([{"answers": ["yes"]}], "entry 0 has no 'question_id'"),
        ([{"question_id": 1}], "entry 0 (question 1) has no answers; expected 'answers' or 'answer'"),
        ([{**ASKED, "answers": []}], "entry 0 (question 1): its 'answers' is an empty list; expected a list of texts"),
        ([{**ASKED, "answers": None}], "entry 0 (question 1): its 'answers' is null; expected a list of texts"),
        ([{**ASKED, "answers": [2]}], "entry 0 (question 1): its answer is a number; expected a text"),
        ([{**ASKED, "answers": [{"text": "a"}]}], "entry 0 (question 1), an answer has no 'answer'; it has 'text'"),
        ([{**ASKED, "answer_type": 3}], "entry 0 (question 1): its answer_type is a number; expected a text"),
        ([ASKED, {**ASKED, "question_id": "1"}], "entry 1 (question 1): the question_id 1 comes a second time"),
    ],
)
def test_wrong_answers(written: Written, values: Any, says: str) -> None:
    path = written(values)
    with pytest.raises(UserError) as error:
        read_answers(path)
    assert error.value.message.startswith(str(path))
    assert says in error.value.message


def test_questions_of_another_split(written: Written) -> None:
    questions = written({"questions": [{"question_id": 2, "question": "Is it?"}]})
    with pytest.raises(UserError, match=r"entry 0 \(question 1\): .* has no such question. Are both files of the same split\?"):
        read_answers(written([ASKED]), questions)


@pytest.mark.parametrize("read", [read_captions, read_caption_results, read_answers, read_answer_results])
def test_no_file(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    for path in (tmp_path, tmp_path / "absent.json"):
        with pytest.raises(UserError, match=r"There is no file .*; expected a JSON "):
            read(path)


def test_kinds_of_misuse(written: Written) -> None:
    with pytest.raises(Misuse):
        read_captions(written({"annotations": [{**ASKED, "image_id": 1}]}))
    with pytest.raises(Misuse):
        read_answers(written({"questions": [{"question_id": 1, "question": "Is it?"}]}))


@pytest.mark.real_data
def test_public_files() -> None:
    data = Path(os.environ["BLIP_REAL_DATA"])
    karpathy = read_captions(data / "annotations/coco_karpathy_test.json")
    assert (len(karpathy), sum(map(len, karpathy.values()))) == (5_000, 25_010)
    assert next(iter(karpathy)) == 391895
    blip, coco = (read_captions(data / f"coco108/{name}.json") for name in ("annotations", "annotations_gt"))
    assert len(blip) == 108
    assert {each: sorted(texts) for each, texts in blip.items()} == {each: sorted(texts) for each, texts in coco.items()}
    asked = read_answers(data / "coco108/vqav2.json")
    assert all(len(own.answers) == 10 and own.question and own.answer_type for own in asked.values())
