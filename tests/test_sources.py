"""Training samples: every form of file, several joined, and one sentence for each kind of wrong file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import Misuse, UserError
from training.sources import FLICKR8K, KARPATHY, VQA, Part, Samples, Source, join, read_source, read_sources, weighted

COCO = [
    {"image": "val2014/COCO_val2014_000000522418.jpg", "caption": "A woman cutting a cake. ", "image_id": "coco_522418"},
    {"image": "val2014/COCO_val2014_000000522418.jpg", "caption": "Somebody at a table", "image_id": "coco_522418"},
    {"image": "train2014/COCO_train2014_000000000009.jpg", "caption": "Lunch", "image_id": "coco_9"},
]
OWN = {
    "images": [
        {"filename": "1.jpg", "split": "train", "sentences": [{"raw": "one"}, {"raw": "two"}]},
        {"filename": "2.jpg", "split": "test", "sentences": [{"raw": "three"}]},
        {"filename": "3.jpg", "filepath": "val2014", "split": "restval", "sentences": [{"raw": "four"}]},
    ]
}
GENOME = [{"image": "VG_100K/1.jpg", "caption": "a clock"}, {"image": "VG_100K_2/1.jpg", "caption": "a tree"}]
BLIP_VQA = [
    {"question_id": 1, "question": "What is it?", "answer": ["cat", "dog", "cat", "cat"], "image": "a.jpg", "dataset": "vqa"},
    {"question_id": 2, "question": "Where?", "answer": "here", "image": "b.jpg", "dataset": "vg"},
    {"question_id": 3, "question": "When?", "answer": ["now"], "image": "a.jpg", "dataset": "vqa"},
]


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def source(folder: Path, content: object, kind: str = KARPATHY, name: str = "a.json", **others: Any) -> Source:
    """A source of `content`, whose pictures are there, though empty: reading samples opens none."""
    images = folder / "images"
    for picture in ("a.jpg", "1.jpg", "2.jpg", COCO[0]["image"], GENOME[0]["image"], "000000000007.jpg"):
        (images / picture).parent.mkdir(parents=True, exist_ok=True)
        (images / picture).touch()
    return Source(kind, write(folder, name, content), images, **others)


def rows(samples: Samples, folder: Path) -> list[tuple[str, tuple[str, ...]]]:
    names = [path.relative_to(folder / "images").as_posix() for path in samples.pictures]
    return [(names[picture], texts) for picture, texts in zip(samples.picture, samples.texts, strict=True)]


def refused(folder: Path, content: object, kind: str = KARPATHY, name: str = "a.json", **others: Any) -> str:
    with pytest.raises(UserError) as error:
        read_source(source(folder, content, kind, name, **others))
    assert "\n" not in error.value.message
    return error.value.message.replace(f"{folder}/", "")


def test_karpathys_list(tmp_path: Path) -> None:
    found = read_source(source(tmp_path, COCO))
    assert rows(found, tmp_path) == [(entry["image"], (entry["caption"],)) for entry in COCO]
    assert found.picture.tolist() == [0, 0, 1]  # two captions of one picture share their target
    assert found.answers is None
    assert found.parts == (Part(str(tmp_path / "a.json"), 3),)


def test_pictures_with_one_of_their_captions(tmp_path: Path) -> None:
    found = read_source(source(tmp_path, COCO, per_picture=True))
    assert rows(found, tmp_path) == [
        (COCO[0]["image"], ("A woman cutting a cake. ", "Somebody at a table")),
        (COCO[2]["image"], ("Lunch",)),
    ]


def test_karpathys_own_file(tmp_path: Path) -> None:
    found = read_source(source(tmp_path, OWN))
    assert rows(found, tmp_path) == [("1.jpg", ("one",)), ("1.jpg", ("two",)), ("val2014/3.jpg", ("four",))]
    assert rows(read_source(source(tmp_path, OWN, split="test")), tmp_path) == [("2.jpg", ("three",))]


def test_visual_genome(tmp_path: Path) -> None:
    """Two folders hold files of the same name."""
    found = read_source(source(tmp_path, GENOME))
    assert rows(found, tmp_path) == [("VG_100K/1.jpg", ("a clock",)), ("VG_100K_2/1.jpg", ("a tree",))]


def test_flickr8k(tmp_path: Path) -> None:
    write(tmp_path, "Flickr_8k.trainImages.txt", "a.jpg\n")
    tokens = "a.jpg#0\tA dog .\n1.jpg#0\tA cat .\na.jpg#1\tA brown dog\n"
    found = read_source(source(tmp_path, tokens, FLICKR8K, "Flickr8k.token.txt"))
    assert rows(found, tmp_path) == [("a.jpg", ("A dog .",)), ("a.jpg", ("A brown dog",))]
    assert len(read_source(source(tmp_path, tokens, FLICKR8K, "Flickr8k.token.txt", split="all"))) == 3


def test_blips_questions(tmp_path: Path) -> None:
    found = read_source(source(tmp_path, BLIP_VQA, VQA))
    assert rows(found, tmp_path) == [("a.jpg", ("What is it?",)), ("b.jpg", ("Where?",)), ("a.jpg", ("When?",))]
    assert found.answers == ((("cat", 0.75), ("dog", 0.25)), (("here", 0.2),), (("now", 1.0),))


def test_vqa_v2(tmp_path: Path) -> None:
    questions = {"questions": [{"question_id": 70, "image_id": 7, "question": "Is it?"}]}
    answers = [{"answer": word, "answer_id": n} for n, word in enumerate(["yes"] * 7 + ["no"] * 3)]
    annotations = {"annotations": [{"question_id": 70, "image_id": 7, "answers": answers}]}
    found = read_source(source(tmp_path, annotations, VQA, questions=write(tmp_path, "q.json", questions)))
    assert rows(found, tmp_path) == [("000000000007.jpg", ("Is it?",))]
    assert found.answers == ((("yes", 0.7), ("no", 0.3)),)
    assert found.parts[0].name.endswith("q.json")


def test_weights_are_the_shares_of_answers() -> None:
    found = weighted(["two", "2", "two", "two", ""])
    assert [answer for answer, _ in found] == ["two", "2", ""]
    assert [weight for _, weight in found] == pytest.approx([0.6, 0.2, 0.2])


def test_sources_are_joined(tmp_path: Path) -> None:
    first = source(tmp_path, COCO, name="coco.json")
    again = source(tmp_path, [COCO[2], *GENOME], name="vg.json", weight=0.5)
    found = read_sources([first, again])
    assert len(found) == 6
    assert [part.count for part in found.parts] == [3, 3]
    assert found.parts[1] == Part(str(again.annotations), 3, 0.5)
    assert found.picture.tolist() == [0, 0, 1, 1, 2, 3]  # a picture that both name is one
    assert rows(found, tmp_path) == rows(read_source(first), tmp_path) + rows(read_source(again), tmp_path)
    questions = read_source(source(tmp_path, BLIP_VQA, VQA, "vqa.json"))
    twice = join([questions, questions])
    assert twice.answers == (questions.answers or ()) * 2
    with pytest.raises(Misuse, match=r"coco.json holds captions and .*vqa.json questions; a training takes one or the other"):
        join([questions, found])
    with pytest.raises(Misuse, match="No source of samples is named"):
        read_sources([])


def test_wrong_files_are_one_sentence(tmp_path: Path) -> None:
    assert refused(tmp_path, "[{") == "a.json is not JSON: Expecting property name enclosed in double quotes in line 1, column 3."
    assert refused(tmp_path, []) == "a.json is an empty list: there is nothing to prepare."
    assert refused(tmp_path, 3) == "a.json holds a number; expected a list of entries with 'image' and 'caption'."
    assert "a.json, entry 0 has no 'caption'; it has 'image'" in refused(tmp_path, [{"image": "a.jpg"}])
    assert "its image '../a.jpg' leaves the --images folder" in refused(tmp_path, [{"image": "../a.jpg", "caption": "x"}])
    assert "has no picture in the split 'val'; it has restval (1), test (1), train (1)" in refused(tmp_path, OWN, split="val")
    assert "None of the 1 pictures of a.json is in images" in refused(tmp_path, [{"image": "no.jpg", "caption": "x"}])
    assert "expected 'name.jpg#0<TAB>caption'" in refused(tmp_path, "a.jpg dog", FLICKR8K, "t.txt")
    assert "Flickr_8k.trainImages.txt is missing" in refused(tmp_path, "a.jpg#0\tdog", FLICKR8K, "t.txt")
    no_answers = [{"image": "a.jpg", "question": "What?", "question_id": 1}]
    assert refused(tmp_path, no_answers, VQA) == "a.json holds questions without answers; training needs both."
    other = write(tmp_path, "q.json", {"questions": [{"question_id": 1, "image_id": 7, "question": "Is it?"}]})
    unequal = {"annotations": [{"question_id": 2, "answers": [{"answer": "x"}]}]}
    assert "has none of the question 1. Are both files of the same split?" in refused(tmp_path, unequal, VQA, questions=other)
    with pytest.raises(UserError, match=r"There is no annotation file .*none.json"):
        read_source(Source(KARPATHY, tmp_path / "none.json", tmp_path))
    lists = write(tmp_path, "a.json", COCO)
    with pytest.raises(UserError, match=r"There is no folder .*nowhere; --images takes the folder"):
        read_source(Source(KARPATHY, lists, tmp_path / "nowhere"))


def test_wrong_sources_are_one_sentence(tmp_path: Path) -> None:
    assert "No source of samples is of the kind 'coco'; expected karpathy, flickr8k, vqa." in refused(tmp_path, COCO, "coco")
    assert "The weight of a.json is 0; expected a number above 0." in refused(tmp_path, COCO, weight=0)
    assert "The weight of a.json is nan" in refused(tmp_path, COCO, weight=float("nan"))
    assert "only a source of the kind vqa" in refused(tmp_path, COCO, questions=tmp_path)
    assert "Flickr8k's text is of the kind flickr8k." in refused(tmp_path, "a.jpg#0\tdog", KARPATHY, "t.txt")


def test_sets_of_ones_own_are_checked() -> None:
    part, path = Part("mine", 2), Path("a.jpg")
    texts = (("a",), ("b",))
    assert len(Samples((path,), np.array([0, 0]), texts, (part,))) == 2
    with pytest.raises(UserError, match="mine: 2 pictures, 1 texts, 2 samples in parts; expected as many of each"):
        Samples((path,), np.array([0, 0]), texts[:1], (part,))
    with pytest.raises(UserError, match="2 samples in parts, 1 lists of answers; expected as many of each"):
        Samples((path,), np.array([0, 0]), texts, (part,), ((("x", 1.0),),))
    with pytest.raises(UserError, match="mine: a sample is of a picture beyond the 1 that there are"):
        Samples((path,), np.array([0, 1]), texts, (part,))
    with pytest.raises(UserError, match="mine holds no sample; there is nothing to train on"):
        Samples((path,), np.array([], np.int64), (), (Part("mine", 0),))
