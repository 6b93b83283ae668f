"""BLIP's decoder words: equal to transformers' BertTokenizer with [DEC] and [ENC] put where BLIP puts them."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import UserError
from preprocess.questions import pre_question
from preprocess.wordpiece_words import WordpieceWords
from tests.test_text import ODD, original
from tests.vocabularies import WORDPIECE, WORDPIECE_BLIP, write_wordpiece

DEC, ENC, SEP, PAD = WORDPIECE, WORDPIECE + 1, 3, 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_wordpiece(tmp_path)


@pytest.fixture
def words(folder: Path) -> WordpieceWords:
    return WordpieceWords.load(folder)


def first_set(batch: Any, token: int) -> tuple[np.ndarray, np.ndarray]:
    batch["input_ids"][:, 0] = token
    return batch["input_ids"], batch["attention_mask"]


def assert_same(found: tuple[np.ndarray, np.ndarray], want: tuple[np.ndarray, np.ndarray]) -> None:
    for ours, theirs in zip(found, want, strict=True):
        assert ours.dtype == np.int64
        np.testing.assert_array_equal(ours, theirs)


def test_what_it_knows(words: WordpieceWords, folder: Path) -> None:
    assert words.family == "wordpiece"
    assert (words.files, words.file) == ((folder / "vocab.txt",), folder / "vocab.txt")
    assert (words.size, words.pad_id, words.start_ids, words.stop_ids) == (WORDPIECE_BLIP, PAD, (DEC,), (SEP,))


def test_prompts_are_left_padded_and_have_no_end(words: WordpieceWords) -> None:
    ids, mask = words.prompts(["a picture of ", "", "the dogs"])
    assert ids.tolist() == [[DEC, 5, 6, 7], [PAD, PAD, PAD, DEC], [DEC, 12, 8, 10]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    assert words.prompts([])[0].shape == (0, 0)


def test_questions_and_answers(words: WordpieceWords) -> None:
    ids, mask = words.questions(["what color?", "a"], 35)
    assert ids.tolist() == [[ENC, 24, 25, 22, SEP], [ENC, 5, SEP, PAD, PAD]]
    assert mask.sum(1).tolist() == [5, 3]
    assert words.questions(["a dog a dog a dog"], 4)[0].tolist() == [[ENC, 5, 8, SEP]]
    ids, mask = words.answers(["red", "two dogs", ""])
    assert ids.tolist() == [[DEC, 13, SEP, PAD, PAD], [DEC, 14, 8, 10, SEP], [DEC, SEP, PAD, PAD, PAD]]
    assert mask.sum(1).tolist() == [3, 5, 2]
    with pytest.raises(ValueError, match="need 2"):
        words.questions(["a"], 1)


@pytest.mark.parametrize("name", ["python", "rust"])
def test_equal_to_transformers(words: WordpieceWords, folder: Path, name: str) -> None:
    theirs = original(name, folder / "vocab.txt")
    for length in (2, 5, 35):
        want = theirs(ODD, padding="longest", truncation=True, max_length=length, return_tensors="np")
        assert_same(words.questions(ODD, length), first_set(want, ENC))
    assert_same(words.answers(ODD), first_set(theirs(ODD, padding="longest", return_tensors="np"), DEC))
    for text in ODD:
        ids, _ = first_set(theirs([text], return_tensors="np"), DEC)
        assert words.prompts([text])[0].tolist() == ids[:, :-1].tolist()
    pick = random.Random(0)
    for _ in range(300):
        ids = pick.choices(range(WORDPIECE_BLIP), k=pick.randrange(12))
        assert words.text(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)


def test_text_joins_and_cleans(words: WordpieceWords) -> None:
    assert words.text([DEC, 5, 8, 10, 22, SEP, PAD]) == "a dogs?"
    assert words.text([16, 19, 17, 12, 20]) == "isn't the,"  # the apostrophe joins what is beside it
    assert words.text([]) == ""
    assert words.text([5, WORDPIECE_BLIP, WORDPIECE_BLIP + 7]) == "a"  # rows of an embedding that is larger


def test_after_a_prompt(words: WordpieceWords) -> None:
    assert words.after("a picture of ", [5, 8]) == "a dog"
    assert words.after("", [5, 8]) == "a dog"
    # As the original cuts: what joins the prompt's last word is lost with it.
    assert words.after("a picture of ", [10, 8]) == "dog"
    assert words.after("A PICTURE  OF ", [8, 9]) == "og cat"


def test_half_a_character(words: WordpieceWords) -> None:
    with pytest.raises(UserError, match=r"^Text 1 \(from 0\), 'a \\ud800', holds half a character"):
        words.prompts(["a", "a \ud800"])


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["python", "rust"])
def test_the_published_vocabulary(name: str) -> None:
    data = Path(os.environ["BLIP_REAL_DATA"])
    vocabulary = data / "tokenizers/bert-base-uncased/vocab.txt"
    words, theirs = WordpieceWords.load(vocabulary), original(name, vocabulary)
    assert (words.size, words.start_ids, words.stop_ids, words.pad_id) == (30524, (30522,), (102,), 0)
    assert words.prompts(["a picture of "])[0].tolist() == [[30522, 1037, 3861, 1997]]
    entries = json.loads((data / "coco108/annotations.json").read_text("utf-8"))
    captions = [caption for entry in entries for caption in entry["caption"]]
    assert len(captions) == 540
    questions = [pre_question(entry["question"]) for entry in json.loads((data / "coco108/vqav2.json").read_text("utf-8"))]
    for texts in (captions, questions):
        want = theirs(texts, padding="longest", truncation=True, max_length=35, return_tensors="np")
        assert_same(words.questions(texts, 35), first_set(want, 30523))
        for row in words.prompts(texts)[0]:
            assert words.text(row) == theirs.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=True)
    assert words.text(words.prompts(["It isn't Tom's, is it?"])[0][0]) == "it isn't tom's, is it?"
