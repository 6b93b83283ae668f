"""Questions about pictures: the forms of files, answers, and one sentence for each kind of wrong file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from models import manifest
from models.errors import UserError
from preprocess.questioned import Question, Questioned, of_pictures, read_questioned

SEVEN, COCO42 = "000000000007.jpg", "COCO_val2014_000000000042.jpg"
NAN = float("nan")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with empty files where pictures would be: reading questions opens none."""
    (tmp_path / "images").mkdir()
    for name in (SEVEN, COCO42, "dog.jpg"):
        (tmp_path / "images" / name).touch()
    return tmp_path / "images"


def write(images: Path, name: str, values: object) -> Path:
    path = images.parent / name
    path.write_text(json.dumps(values), "utf-8")
    return path


def read(images: Path, questions: object, annotations: object = None, answer_list: object = None) -> Questioned:
    beside = [
        None if values is None else write(images, name, values)
        for name, values in (("a.json", annotations), ("list.json", answer_list))
    ]
    return read_questioned(images, write(images, "q.json", questions), *beside)


def refused(images: Path, *values: object) -> str:
    with pytest.raises(UserError) as error:
        read(images, *values)
    assert "\n" not in error.value.message
    return error.value.message.replace(f"{images.parent}/", "")


def official() -> dict[str, Any]:
    """Three questions as VQA v2 publishes them."""
    rows = ((42001, 42, "What is it?"), (7000, 7, "Where?"), (42000, 42, "Is it red?"))
    return {
        "info": {},
        "questions": [{"image_id": image, "question": text, "question_id": each} for each, image, text in rows],
    }


def annotations() -> dict[str, Any]:
    """Their annotations in another order, and one of another question."""
    return {
        "annotations": [
            {
                "question_id": each,
                "image_id": each // 1000,
                "answer_type": "other",
                "question_type": "what is",
                "multiple_choice_answer": "x",
                "answers": [{"answer": f"{each} {n}", "answer_confidence": "yes", "answer_id": n + 1} for n in range(10)],
            }
            for each in (7000, 42000, 42001, 99000)
        ]
    }


def listed(**changes: Any) -> dict[str, Any]:
    """An entry of BLIP's list; None removes a part."""
    entry = {"image": "dog.jpg", "question": "What?", "question_id": 1, **changes}
    return {key: value for key, value in entry.items() if value is not None}


def test_vqa_v2(images: Path) -> None:
    found = read(images, official(), annotations())
    assert (found.pictures.names, found.pictures.entries) == ([COCO42, SEVEN], [0, 1])
    assert found.pictures.sources == [images / COCO42, images / SEVEN]
    assert (found.ids, found.answer_list) == ([42, 7], None)
    expected = ((42001, 0, "What is it?"), (7000, 1, "Where?"), (42000, 0, "Is it red?"))
    assert found.questions == [
        Question(each, image, text, [f"{each} {n}" for n in range(10)], "other", "what is") for each, image, text in expected
    ]
    files = {name: images.parent / f"{name[0]}.json" for name in ("questions", "annotations")}
    assert found.source == {
        "kind": "questions",
        "folder": str(images),
        **{name: str(file) for name, file in files.items()},
        **{f"{name}_sha256": manifest.file_record(file)["sha256"] for name, file in files.items()},
    }


def test_questions_without_annotations(images: Path) -> None:
    found = read(images, official())
    assert [(each.answers, each.answer_type, each.question_type) for each in found.questions] == [([], None, None)] * 3


def test_pictures_of_the_test_split(images: Path) -> None:
    (images / COCO42).rename(images / "COCO_test2015_000000000042.jpg")
    assert read(images, official()).pictures.names == ["COCO_test2015_000000000042.jpg", SEVEN]


def test_limit_counts_pictures(images: Path) -> None:
    found = read(images, official(), annotations())
    assert found.first(None) == found
    first = found.first(1)
    assert (first.pictures.names, first.ids) == ([COCO42], [42])
    assert [(each.question_id, each.image) for each in first.questions] == [(42001, 0), (42000, 0)]


def test_of_pictures(images: Path) -> None:
    questions = read(images, official()).questions
    assert [(each.question_id, each.image) for each in of_pictures(questions, [1])] == [(7000, 0)]
    assert of_pictures(questions, []) == []


def test_a_list_of_blip(images: Path) -> None:
    found = read(
        images,
        [
            listed(answer=["yes", "", "no"]),
            listed(question_id="b", image=COCO42, answer="yes", dataset="vqa"),
            listed(question_id=3, answers=["a", {"answer": "b"}], answer_type="other", image_id=None),
        ],
    )
    assert (found.pictures.names, found.ids) == (["dog.jpg", COCO42], ["dog.jpg", 42])
    assert found.questions == [
        Question(1, 0, "What?", ["yes", "", "no"]),
        Question("b", 1, "What?", ["yes"]),
        Question(3, 0, "What?", ["a", "b"], "other"),
    ]
    assert read(images, [listed(image_id="coco_5")]).ids == [5]
    assert read(images, [listed()]).questions[0].answers == []


def test_a_list_with_annotations_takes_theirs(images: Path) -> None:
    """As LAVIS, which evaluates its lists against the official files."""
    entries = [listed(image=COCO42, question_id=42001, answer=["mine"]), listed(image=SEVEN, question_id=7000)]
    found = read(images, entries, annotations())
    assert [each.answers[0] for each in found.questions] == ["42001 0", "7000 0"]


def test_a_list_of_answers(images: Path) -> None:
    found = read(images, [listed()], None, ["yes", "no", "yes"])
    assert found.answer_list == ["yes", "no", "yes"]
    assert found.source["answer_list"] == str(images.parent / "list.json")
    for values, says in (
        ([], "list.json holds an empty list; expected a list of answers."),
        ({"yes": 1}, "list.json holds an object; expected a list of answers."),
        (["yes", 3], "list.json: answer 1 is a number; expected a text."),
        ([" "], "list.json: answer 0 is an empty text; expected a text."),
    ):
        assert refused(images, [listed()], None, values) == says


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([], "q.json holds an empty list; expected a list of entries with 'image' and 'question'."),
        ("x", "q.json holds a text; expected a list of entries with 'image' and 'question'."),
        ({"annotations": []}, "q.json has no 'questions'; it has 'annotations'."),
        ({"questions": []}, "q.json: its 'questions' is an empty list; expected a list of questions."),
        ([3], "q.json, entry 0 is a number; expected an object with 'image_id'."),
        ([listed(image=None)], "q.json, entry 0 has no 'image_id'; it has 'question', 'question_id'."),
        ([listed(image="../dog.jpg")], "q.json, entry 0: its image '../dog.jpg' leaves the --images folder"),
        ([listed(image=3)], "q.json, entry 0: its image is a number; expected the path"),
        ([listed(image_id=NAN)], "q.json, entry 0: its image_id is NaN; expected a whole number from 0, or a text."),
        ([listed(image=None, image_id=True)], "q.json, entry 0: its image_id is true; expected"),
        ([listed(image=None, image_id="dog")], "q.json, entry 0: its image_id is a text, and it has no 'image'; only a number"),
        ([listed(question_id=None)], "q.json, entry 0 (dog.jpg) has no 'question_id'; it has 'image', 'question'."),
        ([listed(question_id=False)], "q.json, entry 0 (dog.jpg): its question_id is false; expected a whole number"),
        ([listed(question_id=NAN)], "q.json, entry 0 (dog.jpg): its question_id is NaN; expected a whole number"),
        ([listed(question_id=-1)], "q.json, entry 0 (dog.jpg): its question_id is -1; expected a whole number"),
        ([listed(), listed()], "q.json, entry 1 (dog.jpg): its question_id, 1, is that of entry 0; expected one of its own."),
        ([listed(question=None)], "q.json, entry 0 (dog.jpg) has no 'question'; it has 'image', 'question_id'."),
        ([listed(question=" ")], "q.json, entry 0 (dog.jpg): its question is an empty text; expected a text."),
        ([listed(question="\ud800")], "q.json, entry 0 (dog.jpg): its question, '\\ud800', holds half a character"),
        ([listed(answer=[])], "q.json, entry 0 (dog.jpg): its answers are an empty list; expected a list of texts."),
        ([listed(answers=3)], "q.json, entry 0 (dog.jpg): its answers are a number; expected a list of texts."),
        ([listed(answer="")], "q.json, entry 0 (dog.jpg): its answer is an empty text; expected a text."),
        ([listed(answer=["x", 3])], "q.json, entry 0 (dog.jpg): an answer is a number; expected a text."),
        ([listed(answer=["\ud800"])], "q.json, entry 0 (dog.jpg): an answer is half a character (a lone surrogate)"),
        ([listed(answers=[{"x": 1}])], "q.json, entry 0 (dog.jpg), an answer has no 'answer'; it has 'x'."),
        ([listed(answer_type=3)], "q.json, entry 0 (dog.jpg): its answer_type is a number; expected a text."),
        (
            [listed(), listed(question_id=2, answer="x")],
            "q.json, entry 0: it has no answers, but entry 1 has. Give every question answers, or none.",
        ),
        (
            [listed(image_id=5), listed(question_id=2), listed(question_id=3, image_id=6)],
            "q.json, entry 2 (dog.jpg): its image_id is 6, but entry 0, which asks about the same picture, has 5.",
        ),
        ([listed(image="cat.jpg")], "None of the 1 pictures of q.json is in images; the first is cat.jpg."),
        ([listed(image=None, image_id=8)], "None of the 1 pictures of q.json is in images; the first is 000000000008.jpg."),
    ],
)
def test_questions_refused(images: Path, values: object, says: str) -> None:
    assert refused(images, values).startswith(says)


def changed(part: str, value: object, number: int = 0) -> dict[str, Any]:
    values = annotations()
    values["annotations"][number][part] = value
    return values


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([], "a.json is a list; expected an object with 'annotations'."),
        (official(), "a.json has no 'annotations'; it has 'info', 'questions'."),
        ({"annotations": []}, "a.json: its 'annotations' is an empty list; expected a list of annotations."),
        ({"annotations": [3]}, "a.json, annotation 0 is a number; expected an object with 'question_id'."),
        (
            {"annotations": [{"question_id": 7000}]},
            "a.json, annotation 0 (question 7000) has no 'answers'; it has 'question_id'.",
        ),
        (
            {"annotations": [{"question_id": 7000, "answers": ["x"]}]},
            f"q.json, entry 0 ({COCO42}): --annotations has none of the question 42001. Are both files of the same split?",
        ),
        (
            changed("answers", []),
            "a.json, annotation 0 (question 7000): its answers are an empty list; expected a list of texts.",
        ),
        (changed("answers", None), "a.json, annotation 0 (question 7000): its answers are null; expected a list of texts."),
        (changed("answers", [{"answer": None}]), "a.json, annotation 0 (question 7000): an answer is null; expected a text."),
        (changed("question_id", 42000), "a.json, annotation 1 (question 42000): the question is annotated twice."),
        (changed("question_id", NAN), "a.json, annotation 0: its question_id is NaN; expected"),
        (changed("image_id", True), "a.json, annotation 0 (question 7000): its image_id is true; expected"),
        (
            changed("image_id", 42),
            f"a.json, annotation 0 (question 7000): its image_id is 42, but q.json, entry 1 ({SEVEN}) asks about 7.",
        ),
        (
            changed("question_type", ["what"]),
            "a.json, annotation 0 (question 7000): its question_type is a list; expected a text.",
        ),
    ],
)
def test_annotations_refused(images: Path, values: object, says: str) -> None:
    assert refused(images, official(), values).startswith(says)


def test_files_that_are_not_there(images: Path) -> None:
    questions, absent = write(images, "q.json", [listed()]), images / "absent.json"
    for files, option in (
        ((absent,), "--questions"),
        ((questions, absent), "--annotations"),
        ((questions, None, images), "--answer-list"),
    ):
        with pytest.raises(UserError, match=f"There is no file .*; {option}"):
            read_questioned(images, *files)
    with pytest.raises(UserError, match=r"There is no folder .*absent\.json; --images takes the folder"):
        read_questioned(absent, questions)


@pytest.mark.real_data
def test_questions_about_photographs() -> None:
    root = Path(os.environ["BLIP_REAL_DATA"]) / "coco108"
    found = read_questioned(root / "images", root / "vqav2.json")
    assert len(found.questions) == len(found.pictures.names) == 8
    first = Question(790001, 0, "Are they celebrating a birthday?", ["yes"] * 10, "yes/no", "are they")
    assert (found.questions[0], found.ids[0], found.pictures.names[0]) == (first, 790, "000000000790.jpg")
    assert {len(each.answers) for each in found.questions} == {10}
    assert next(each.question_id for each in found.questions if each.answer_type == "number") == 174632001


@pytest.mark.real_data
def test_the_same_questions_in_the_official_form(images: Path) -> None:
    root = Path(os.environ["BLIP_REAL_DATA"]) / "coco108"
    entries = json.loads((root / "vqav2.json").read_text("utf-8"))
    questions = {"questions": [{key: entry[key] for key in ("question_id", "image_id", "question")} for entry in entries]}
    notes = [{**entry, "answers": [{"answer": text, "answer_id": 1} for text in entry["answers"]]} for entry in reversed(entries)]
    files = [write(images, "q.json", questions), write(images, "a.json", {"annotations": notes})]
    found, plain = read_questioned(root / "images", *files), read_questioned(root / "images", root / "vqav2.json")
    assert (found.questions, found.ids, found.pictures) == (plain.questions, plain.ids, plain.pictures)
