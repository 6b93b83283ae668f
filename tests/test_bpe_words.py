"""OPT's words: equal to transformers' GPT2Tokenizer with OPT's special tokens."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from models.errors import UserError
from preprocess.bpe_words import BpeRules, BpeWords
from preprocess.spaces import clean_up
from tests.test_text import ODD
from tests.vocabularies import BPE_SIZE, write_bpe

PAD, FIRST = 1, 2
PROMPTS = [*ODD, "a </s> b", "<pad>", "<s> <unk>", "  two  blanks ", "a\n\nb\n", "Question: what?\nAnswer:", "👩‍🚀 123 isn't"]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, ...]:
    folder = write_bpe(tmp_path)
    return folder / "vocab.json", folder / "merges.txt"


@pytest.fixture
def words(files: tuple[Path, ...]) -> BpeWords:
    return BpeWords.load(files)


def original(folder: Path) -> Any:
    """transformers' tokenizer as facebook/opt-* configures it, padding where LAVIS's `predict_answers` does."""
    from transformers import GPT2Tokenizer

    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    return GPT2Tokenizer.from_pretrained(folder, add_bos_token=True, padding_side="left", **special)


def assert_equal(ours: BpeWords, theirs: Any, texts: list[str], length: int | None) -> None:
    want = theirs(texts, padding="longest", truncation=length is not None, max_length=length, return_tensors="np")
    for found, name in zip(ours.prompts(texts), ("input_ids", "attention_mask"), strict=True):
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, want[name])


def their_text(theirs: Any, ids: list[int]) -> str:
    """What 4.33 decodes to: 5.x refuses to clean the text of a BPE."""
    return clean_up(theirs.decode(ids, skip_special_tokens=True)).strip()


def test_what_it_knows(words: BpeWords, files: tuple[Path, ...]) -> None:
    newline = json.loads(files[0].read_text("utf-8"))["Ċ"]
    assert (words.family, words.files, words.file) == ("bpe", files, files[0])
    assert (words.size, words.pad_id, words.start_ids, words.stop_ids) == (BPE_SIZE, PAD, (FIRST,), (newline,))


def test_prompts_are_left_padded(words: BpeWords) -> None:
    ids, mask = words.prompts(["aa", "", "</s>"])
    a = words.prompts(["a"])[0][0, 1]
    assert ids.tolist() == [[FIRST, a, a], [PAD, PAD, FIRST], [PAD, FIRST, FIRST]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert words.prompts([])[0].shape == (0, 0)


@pytest.mark.parametrize("length", [None, 1, 2, 8])
def test_equal_to_transformers(files: tuple[Path, ...], length: int | None) -> None:
    assert_equal(BpeWords.load(files, max_length=length), original(files[0].parent), PROMPTS, length)


def test_the_comparison_can_fail(files: tuple[Path, ...]) -> None:
    with pytest.raises(AssertionError):
        assert_equal(BpeWords.load(files, max_length=7), original(files[0].parent), PROMPTS, 8)


def test_text_is_equal_to_transformers(words: BpeWords, files: tuple[Path, ...]) -> None:
    theirs, pick = original(files[0].parent), random.Random(0)
    token_of = {number: token for token, number in json.loads(files[0].read_text("utf-8")).items()}
    # GPT-2's table: printable characters of Latin-1 stand for themselves, the other bytes for those from U+0100 on, in order.
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(b): b for b in plain} | {chr(0x100 + n): b for n, b in enumerate(sorted({*range(256)} - {*plain}))}
    for _ in range(500):  # most are no UTF-8
        ids = pick.choices(range(BPE_SIZE), k=pick.randrange(12))
        assert words.text(ids) == their_text(theirs, ids)
        letters = "".join(token_of[i] for i in ids if i not in (PAD, FIRST))
        assert words.text(ids) == clean_up(bytes(byte_of[c] for c in letters).decode("utf-8", "replace")).strip()


def test_text_comes_back(words: BpeWords) -> None:
    for text in ("a dog", "狗 and 👩‍🚀", "two\nlines", "naïve café"):
        assert words.text(words.prompts([text])[0][0]) == text
    assert words.text(words.prompts([" a dog , it is . \n"])[0][0]) == "a dog, it is."
    assert words.text([BPE_SIZE, BPE_SIZE + 6]) == ""  # rows of an embedding that is larger
    assert words.text([-1]) == ""


def test_tokenizer_json(words: BpeWords, files: tuple[Path, ...], tmp_path: Path) -> None:
    theirs = original(files[0].parent)
    theirs.save_pretrained(tmp_path / "fast")
    found = BpeWords.load((tmp_path / "fast/tokenizer.json",))
    assert (found.size, found.pad_id, found.start_ids, found.stop_ids) == (
        words.size, words.pad_id, words.start_ids, words.stop_ids,
    )  # fmt: skip
    np.testing.assert_array_equal(found.prompts(PROMPTS)[0], words.prompts(PROMPTS)[0])


def test_windows_line_ends_and_no_version(words: BpeWords, files: tuple[Path, ...]) -> None:
    lines = files[1].read_text("utf-8").splitlines()
    assert lines[0].startswith("#version")
    files[1].write_bytes("\r\n".join(lines[1:]).encode())
    np.testing.assert_array_equal(BpeWords.load(files).prompts(PROMPTS)[0], words.prompts(PROMPTS)[0])


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("vocab.json", b"", "is empty"),
        ("vocab.json", b"{", "is not JSON"),
        ("vocab.json", b"[" * 100_000, "is not JSON"),
        ("vocab.json", b"\xff\xfe{}", "byte 0 is not UTF-8"),
        ("vocab.json", b"[1, 2]", "expected an object with the number of each token"),
        ("vocab.json", b"{}", "expected an object with the number of each token"),
        ("vocab.json", b'{"a": true, "b": 1}', "the number of 'a' is True"),
        ("vocab.json", b'{"a": NaN}', "the number of 'a' is nan"),
        ("vocab.json", b'{"a": "0"}', "the number of 'a' is '0'"),
        ("vocab.json", b'{"a": 0, "b": 7}', "the number of 'b' is 7, expected a whole number from 0 to 1"),
        ("vocab.json", b'{"a": 0, "b": 0}', "'a' and 'b' are both number 0"),
        ("vocab.json", b'{"a": 0, "b": 1}', "merges.txt does not belong to vocab.json"),
        ("vocab.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        ("merges.txt", b"\n", "is empty"),
        ("merges.txt", b"#version: 0.2\n\xc4 t\n", "byte 14 is not UTF-8"),
        ("merges.txt", b"#version: 0.2\na b\nabc\n", "line 3 is 'abc'"),
        ("merges.txt", b"a b c\n", "line 1 is 'a b c'"),
        ("merges.txt", b"qq ww\n", "merges.txt does not belong to vocab.json"),
    ],
)
def test_wrong_files(files: tuple[Path, ...], name: str, data: bytes, says: str) -> None:
    (files[0].parent / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        BpeWords.load(files)
    assert error.value.message.startswith(str(files[0].parent))
    assert says in error.value.message


def test_another_models_vocabulary(files: tuple[Path, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        BpeWords.load(files, BpeRules(pad="[PAD]"))
    assert error.value.message == (
        f"{files[0]} is not the vocabulary of OPT: it has no [PAD]. "
        "Give the tokenizer that belongs to the language model (--tokenizer)."
    )
    numbers = json.loads(files[0].read_text("utf-8"))
    del numbers["ł"]  # a byte
    files[0].write_text(json.dumps({token: number for number, token in enumerate(numbers)}), "utf-8")
    with pytest.raises(UserError, match="it is no byte-level BPE with a token for each byte"):
        BpeWords.load(files)
    other = tmp_path / "tokenizer.json"
    Tokenizer.from_str('{"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<pad>", 0], ["</s>", 0]]}}').save(str(other))
    with pytest.raises(UserError, match="it is no byte-level BPE"):
        BpeWords.load((other,))
    with pytest.raises(ValueError, match="needs 1"):
        BpeWords.load(files, max_length=0)


@pytest.mark.real_data
def test_the_published_vocabularies() -> None:
    data = Path(os.environ["BLIP_REAL_DATA"])
    folder = data / "tokenizers/opt"
    files = folder / "vocab.json", folder / "merges.txt"
    words = BpeWords.load(files)
    assert (words.size, words.pad_id, words.start_ids, words.stop_ids) == (50265, 1, (2,), (50118,))
    assert words.prompts(["Hello world"])[0].tolist() == [[2, 31414, 232]]
    entries = json.loads((data / "coco108/annotations.json").read_text("utf-8"))
    captions = [caption for entry in entries for caption in entry["caption"]]
    questions = [f"Question: {e['question']} Answer:" for e in json.loads((data / "coco108/vqav2.json").read_text("utf-8"))]
    texts, theirs = captions + questions + PROMPTS, original(folder)
    assert len(captions) == 540
    for length in (None, 8, 32):
        assert_equal(BpeWords.load(files, max_length=length), theirs, texts, length)
    for row in words.prompts(texts)[0].tolist():
        assert words.text(row) == their_text(theirs, row)
    pick = random.Random(0)
    for _ in range(300):
        ids = pick.choices(range(words.size), k=8)
        assert words.text(ids) == their_text(theirs, ids)
    gpt2 = tuple(data / "tokenizers/gpt2" / file.name for file in files)
    end = "<|endoftext|>"
    assert BpeWords.load(gpt2, BpeRules(first=end, pad=end)).prompts(["Hello world"])[0].tolist() == [[50256, 15496, 995]]
    with pytest.raises(UserError, match="it has no </s> and no <pad>"):
        BpeWords.load(gpt2)
