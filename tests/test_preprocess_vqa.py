"""`blip-pre vqa`: what it writes, that questions stay with their pictures, and what a wrong input costs."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from models import manifest
from models.errors import UserError
from preprocess.__main__ import main
from preprocess.dataset import read_vqa
from preprocess.images import normalise, read_image
from preprocess.tensors import LAYOUTS, PACKED, Writer
from tests.chain import call, done, refusal
from tests.tiny import TINY

SIZE = TINY.vision.image_size
NAMES = [f"COCO_val2014_{n:012d}.jpg" for n in (42, 7, 9)]
ROWS = ((42001, 42, "What is it?"), (7000, 7, "Where?"), (42000, 42, "Is it red?"), (9000, 9, "How many?"))


class Work:
    """A folder with everything that the command reads, and the command."""

    def __init__(self, root: Path, graphs: Path) -> None:
        self.root, self.graphs, self.out, self.images = root, graphs, root / "data", root / "images"
        self.images.mkdir()
        for number, name in enumerate(NAMES):
            pixels = np.random.default_rng(number).integers(0, 256, (20, 30 + number, 3), np.uint8)
            Image.fromarray(pixels).save(self.images / name)
        questions = [{"question_id": each, "image_id": image, "question": text} for each, image, text in ROWS]
        self.write("questions.json", {"questions": questions})
        annotations = [{"question_id": each, "answers": answers(each), "answer_type": "other"} for each, _, _ in ROWS]
        self.write("annotations.json", {"annotations": annotations})

    def write(self, name: str, values: object) -> Path:
        (self.root / name).write_text(json.dumps(values), "utf-8")
        return self.root / name

    def call(self, *options: object) -> Result:
        named = ("--images", self.images, "--graphs", self.graphs, "--out", self.out, "--workers", 1)
        return call(main, "vqa", *named, "--questions", self.root / "questions.json", *options)

    def annotated(self, *options: object) -> Result:
        return self.call("--annotations", self.root / "annotations.json", *options)

    def refused(self, *options: object, code: int = 1) -> str:
        """Run, expect a failure that leaves every file as it was. Returns all that it said."""
        before = {path: path.stat().st_mtime_ns for path in self.root.rglob("*")}
        result = self.call(*options)
        refusal(result, code)
        assert not result.stdout
        assert {path: path.stat().st_mtime_ns for path in self.root.rglob("*")} == before
        return result.stderr.removeprefix("Error: ")


def answers(question: int) -> list[dict[str, Any]]:
    return [{"answer": f"{question} {n}", "answer_id": n + 1} for n in range(10)]


def stored(question: int, image: int, text: str, **changes: Any) -> dict[str, Any]:
    """A question as the manifest keeps it."""
    return {
        "question_id": question,
        "image": image,
        "question": text,
        "answers": [f"{question} {n}" for n in range(10)],
        "answer_type": "other",
        "question_type": None,
        **changes,
    }


@pytest.fixture
def work(tmp_path: Path, ort_graphs: Path) -> Work:
    """Four questions about three pictures, in VQA v2's form."""
    return Work(tmp_path, ort_graphs)


def same_pictures(work: Work, img: Any, names: list[str]) -> None:
    assert (img.shape, img.dtype) == ((len(names), 3, SIZE, SIZE), np.float32)
    for number, name in enumerate(names):
        pixels = read_image(work.images / name, SIZE, "bicubic")
        assert img[number].tobytes() == normalise(pixels, TINY.protocol.mean, TINY.protocol.std).tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written(work: Work, layout: str) -> None:
    choices = work.write("list.json", ["yes", "no"])
    said = done(work.annotated("--layout", layout, "--answer-list", choices))
    assert said.splitlines() == [
        f"{work.out}: 3 pictures, 4 questions, 40 answers to compare with",
        "answers to choose from: 2",
    ]
    data = read_vqa(work.out, verify=True)
    same_pictures(work, data.img, NAMES)
    assert data.images == [
        {"image": name, "width": 30 + n, "height": 20, "image_id": each}
        for n, (name, each) in enumerate(zip(NAMES, (42, 7, 9), strict=True))
    ]
    rows = zip(ROWS, (0, 1, 0, 2), strict=True)
    assert data.questions == [stored(each, image, text) for (each, _, text), image in rows]
    assert (data.answer_list, data.broken) == (["yes", "no"], [])
    sha256 = manifest.file_record(work.graphs / "tokenizer/vocab.txt")["sha256"]
    assert (data.protocol["image_size"], data.protocol["tokenizer_sha256"]) == (SIZE, sha256)
    assert "vocab" not in data.protocol
    content = data.source.content
    assert (content["task"], content["layout"], content["source"]["kind"]) == ("vqa", layout, "questions")
    assert not list(work.root.glob(".*"))


def test_without_answers(work: Work) -> None:
    assert done(work.call()) == f"{work.out}: 3 pictures, 4 questions, no answers to compare with\n"
    data = read_vqa(work.out)
    assert [question["answers"] for question in data.questions] == [[]] * 4
    assert data.answer_list is None
    assert "answer_list" not in data.source.content


def test_a_list_of_blip(work: Work) -> None:
    names = {42: NAMES[0], 7: NAMES[1], 9: NAMES[2]}
    listed = [
        {"image": names[image], "question": text, "question_id": each, "answer": [a["answer"] for a in answers(each)]}
        for each, image, text in ROWS
    ]
    done(work.annotated())
    want = read_vqa(work.out)
    done(work.call("--questions", work.write("list.json", listed)))
    found = read_vqa(work.out)
    assert found.images == want.images
    assert found.questions == [{**question, "answer_type": None} for question in want.questions]


def test_limit_counts_pictures(work: Work) -> None:
    assert done(work.call("--limit", 1)) == f"{work.out}: 1 pictures, 2 questions, no answers to compare with\n"
    data = read_vqa(work.out)
    assert [question["question_id"] for question in data.questions] == [42001, 42000]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_skip_broken_drops_the_questions(work: Work, layout: str) -> None:
    (work.images / NAMES[1]).write_bytes(b"text")
    assert work.refused("--layout", layout) == (
        f"1 of 3 pictures cannot be used:\n  {NAMES[1]} (entry 1): is not a picture in a format that Pillow decodes by itself\n"
        "Mend them, or leave them and their questions out with --skip-broken.\n"
    )
    said = done(work.annotated("--skip-broken", "--layout", layout))
    assert said.splitlines() == [
        f"{work.out}: 2 pictures, 3 questions, 30 answers to compare with",
        "left out: 1 broken pictures and their questions; the manifest lists them",
    ]
    data = read_vqa(work.out, verify=True)
    same_pictures(work, data.img, [NAMES[0], NAMES[2]])
    assert [image["image_id"] for image in data.images] == [42, 9]
    rows = [(ROWS[0], 0), (ROWS[2], 0), (ROWS[3], 1)]
    assert data.questions == [stored(each, image, text) for (each, _, text), image in rows]
    assert [(record["image"], record["entry"]) for record in data.broken] == [(NAMES[1], 1)]


def test_an_older_result_stays(work: Work) -> None:
    done(work.annotated())
    before = manifest.read(work.out, "data", verify=True).digest
    (work.images / NAMES[2]).unlink()
    assert f"  {NAMES[2]} (entry 3): does not exist\n" in work.refused()
    assert manifest.read(work.out, "data", verify=True).digest == before


def test_misuse(work: Work) -> None:
    for options, says in (
        (("--limit", "0"), "0 is not in the range x>=1."),
        (("--split", "test"), "No such option"),
    ):
        assert says in work.refused(*options, code=2)
    assert call(main, "vqa", "--images", work.images).exit_code == 2


CONTENT: dict[str, Any] = {
    "task": "vqa",
    "protocol": {"image_size": 4},
    "images": [{"image": f"{n}.png", "width": 4, "height": 4, "image_id": n} for n in range(2)],
    "questions": [stored(5, 0, "a"), stored(6, 1, "b", answers=[], answer_type=None), stored(7, 1, "c")],
    "answer_list": ["yes", "no"],
    "broken": [],
}


def data_folder(folder: Path, **changes: Any) -> Path:
    """A data/ folder for questions; `changes` replace parts of its manifest, None removes one."""
    folder.mkdir()
    with closing(Writer(folder, "img", "float32", (2, 3, 4, 4), PACKED)) as writer:
        writer.write(0, np.zeros((2, 3, 4, 4), np.float32))
    content = {**CONTENT, "layout": PACKED, "tensors": {"img": writer.info()}, **changes}
    manifest.write(folder, "data", {key: value for key, value in content.items() if value is not None})
    return folder


def asked(**changes: Any) -> list[dict[str, Any]]:
    return [CONTENT["questions"][0], {**CONTENT["questions"][1], **changes}]


def test_read_vqa(tmp_path: Path) -> None:
    data = read_vqa(data_folder(tmp_path / "data"), verify=True)
    assert (data.images, data.questions, data.answer_list) == (CONTENT["images"], CONTENT["questions"], ["yes", "no"])
    assert read_vqa(data_folder(tmp_path / "other", answer_list=None, questions=[])).questions == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "caption"}, "was made for the task 'caption', expected 'vqa'. Use blip-pre vqa."),
        *(({part: None}, f"'{part}'") for part in ("protocol", "images", "questions", "broken", "tensors", "layout")),
        ({"images": CONTENT["images"][:1]}, "contradicts itself: 1 images for 2 in img."),
        ({"answer_list": []}, "contradicts itself: its answer_list is empty."),
        ({"answer_list": "yes"}, "lacks or garbles its answer_list, expected texts. Write it again with blip-pre vqa."),
        ({"questions": 3}, "lacks or garbles 'int' object is not iterable."),
        ({"questions": [3]}, "lacks or garbles 'int' object is not subscriptable."),
        ({"questions": asked(image=2)}, "contradicts itself: question 1 is about a picture beyond the 2 images."),
        ({"questions": asked(image=-1)}, "contradicts itself: question 1 is about a picture beyond the 2 images."),
        ({"questions": asked(image=True)}, "lacks or garbles its image of question 1, expected a whole number."),
        ({"questions": asked(question=3)}, "lacks or garbles its question 1, expected texts."),
        ({"questions": asked(answers="yes")}, "lacks or garbles its answers of question 1, expected texts."),
        ({"questions": asked(answers=[3])}, "lacks or garbles its answers of question 1, expected texts."),
        ({"questions": asked(answer_type=3)}, "lacks or garbles its types of question 1, expected texts."),
        ({"questions": asked(question_id=5)}, "contradicts itself: two questions have the same question_id."),
        ({"questions": asked(question_id=1.5)}, "lacks or garbles its question_id, expected a whole number."),
        ({"questions": [{}]}, "lacks or garbles 'question'."),
    ],
)
def test_folders_that_contradict_themselves(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        read_vqa(data_folder(tmp_path / "data", **changes))
    assert says in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.real_data
def test_photographs_of_coco(work: Work) -> None:
    root = Path(os.environ["BLIP_REAL_DATA"]) / "coco108"
    said = done(work.call("--images", root / "images", "--questions", root / "vqav2.json"))
    assert said == f"{work.out}: 8 pictures, 8 questions, 80 answers to compare with\n"
    data = read_vqa(work.out, verify=True)
    entries = json.loads((root / "vqav2.json").read_text("utf-8"))
    for number, (question, entry) in enumerate(zip(data.questions, entries, strict=True)):
        assert question["image"] == number
        assert data.images[number]["image_id"] == entry["image_id"]
        assert {key: question[key] for key in question if key != "image"} == {
            key: entry[key] for key in ("question_id", "question", "answers", "answer_type", "question_type")
        }
    pixels = read_image(root / "images" / entries[5]["image"], SIZE, "bicubic")
    np.testing.assert_array_equal(data.img[5], normalise(pixels, TINY.protocol.mean, TINY.protocol.std))
