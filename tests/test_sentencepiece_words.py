"""The words of LLaMA, Baichuan, Vicuna and T5: equal to the sentencepiece library, and to transformers 5 where that is.

The originals read tokenizer.model with the library. transformers 5 makes a BPE of its own from the file, which joins runs of
blanks in another order, drops a blank that the text begins with, does not normalise as Baichuan's file asks for, and keeps
the blanks beside special tokens written out in a text, which LAVIS's Vicuna drops.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

from models.errors import UserError
from preprocess.sentencepiece_words import LLAMA, RULES, T5, VICUNA, SentenceRules, SentenceWords
from preprocess.spaces import clean_up
from tests.test_text import ODD
from tests.vocabularies import LLAMA_WITH_BOS, SENTENCEPIECE, write_sentencepiece
from tests.vocabularies import T5 as T5_SIZE
from tests.vocabularies import VICUNA as VICUNA_SIZE

BAICHUAN_PROMPT = "###问题:\n详细描述图片内容。\n\n###答案:"  # of mindformers' model card
PROMPTS = [
    *ODD, "  two  blanks ", "a\n\nb\n", "Question: what?\nAnswer:", "👩‍🚀 123 isn't", BAICHUAN_PROMPT, "Hello <s>.", "a </s> b",
    "<unk><s></s>", "<pad> a", "▁a",
]  # fmt: skip
NAMES = {"llama": "tokenizer.model", "baichuan": "tokenizer.model", "vicuna": "tokenizer.model", "t5": "spiece.model"}
MADE_AS = {"llama": "llama", "baichuan": "baichuan", "vicuna": "llama", "t5": "t5"}
PUBLISHED = {"llama": "llama", "baichuan": "baichuan-7b", "vicuna": "llama", "t5": "flan-t5"}


def file_of(tmp_path: Path, kind: str) -> Path:
    return write_sentencepiece(tmp_path, MADE_AS[kind]) / NAMES[kind]


def load(file: Path, rules: SentenceRules, max_length: int | None = None) -> SentenceWords:
    return SentenceWords.load(file, rules, "LLaMA", max_length)


def agreed(texts: list[str], rules: SentenceRules) -> list[str]:
    """Those that transformers 5 reads as the originals do."""
    texts = [text for text in texts if "  " not in text and not text.startswith(" ") and "▁" not in text]
    texts = [text for text in texts if "</s> " not in text and "x" * 101 not in text]
    return [text for text in texts if "<s>" not in text] if rules.trimmed else texts


def original(folder: Path, rules: SentenceRules) -> Any:
    """transformers' tokenizer, with `first` as its beginning token."""
    from transformers import LlamaTokenizer, T5Tokenizer

    side = {"padding_side": "right" if rules.pads_right else "left", "truncation_side": "left" if rules.cut_left else "right"}
    if rules is T5:
        return T5Tokenizer.from_pretrained(folder, **side)
    first = {(): "<s>", (1,): "<s>", (2,): "</s>"}[rules.first]
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=True, bos_token=first, add_bos_token=bool(rules.first), **side)
    tokenizer.add_special_tokens({"pad_token": "<unk>" if rules.pad_id == 0 else "[PAD]"})
    return tokenizer


def assert_equal(ours: SentenceWords, theirs: Any, texts: list[str], length: int | None) -> None:
    want = theirs(texts, padding="longest", truncation=length is not None, max_length=length, return_tensors="np")
    for found, name in zip(ours.prompts(texts), ("input_ids", "attention_mask"), strict=True):
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, want[name])


def their_text(theirs: Any, ids: list[int], rules: SentenceRules) -> str:
    text = theirs.decode(ids, skip_special_tokens=True)
    return (clean_up(text) if rules.cleaned else text).strip()


def test_what_they_know(tmp_path: Path) -> None:
    sizes = {"llama": SENTENCEPIECE["llama"], "baichuan": SENTENCEPIECE["baichuan"], "vicuna": VICUNA_SIZE, "t5": T5_SIZE}
    ids = {
        "llama": (0, (1,), (2,)),
        "baichuan": (0, (1,), (2,)),
        "vicuna": (VICUNA_SIZE - 1, (1,), (2,)),
        "t5": (0, (0,), (1,)),
    }
    for kind, rules in RULES.items():
        file = file_of(tmp_path, kind)
        words = load(file, rules)
        assert (words.family, words.files, words.size) == ("sentencepiece", (file,), sizes[kind])
        assert (words.pad_id, words.start_ids, words.stop_ids) == ids[kind]


@pytest.mark.parametrize("kind", RULES)
def test_equal_to_the_library(tmp_path: Path, kind: str) -> None:
    """Without special tokens in the text, the ids are the library's and what the model puts around them."""
    rules, file = RULES[kind], file_of(tmp_path, kind)
    words, library = load(file, rules), SentencePieceProcessor(model_file=str(file))
    for text in PROMPTS:
        if not any(token in text for token in (*rules.begins, *rules.added)):
            assert words.prompts([text])[0].tolist() == [[*rules.first, *library.encode(text), *rules.last]]
    pick = random.Random(0)
    for _ in range(300):
        ids = pick.choices(range(3, library.get_piece_size()), k=pick.randrange(12))
        text = library.decode(ids)
        assert words.text([*rules.first, *ids, *rules.last]) == (clean_up(text) if rules.cleaned else text).strip()


@pytest.mark.parametrize("length", [None, 2, 7])
@pytest.mark.parametrize("rules", [LLAMA, LLAMA_WITH_BOS, VICUNA, T5], ids=["llama", "bos", "vicuna", "t5"])
def test_equal_to_transformers(tmp_path: Path, rules: SentenceRules, length: int | None) -> None:
    file = file_of(tmp_path, "t5" if rules is T5 else "llama")
    assert_equal(load(file, rules, length), original(tmp_path, rules), agreed(PROMPTS, rules), length)


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    file = file_of(tmp_path, "llama")
    with pytest.raises(AssertionError):
        assert_equal(load(file, LLAMA_WITH_BOS), original(tmp_path, VICUNA), PROMPTS, None)
    with pytest.raises(AssertionError):
        assert_equal(load(file, dataclasses.replace(VICUNA, cut_left=False), 7), original(tmp_path, VICUNA), PROMPTS, 7)


def test_prompts_are_left_padded(tmp_path: Path) -> None:
    file = file_of(tmp_path, "llama")
    (a,) = load(file, LLAMA).prompts(["a"])[0].tolist()
    assert len(a) == 1
    pad = VICUNA_SIZE - 1
    for rules, rows in (
        (LLAMA, [[*a, *a], [0, 0], [0, *a]]),
        (LLAMA_WITH_BOS, [[1, *a, *a], [0, 0, 1], [0, 1, *a]]),
        (VICUNA, [[2, *a, *a], [pad, pad, 2], [pad, 2, *a]]),
    ):
        ids, mask = load(file, rules).prompts(["a a", "", "a"])
        assert ids.tolist() == rows
        assert mask.sum(1).tolist() == [len(a) * 2 + len(rules.first), len(rules.first), len(a) + len(rules.first)]
        assert (np.diff(mask, axis=1) >= 0).all()
    assert load(file, LLAMA).prompts([])[0].shape == (0, 0)


def test_cutting(tmp_path: Path) -> None:
    whole = load(file_of(tmp_path, "llama"), LLAMA).prompts(["a dog on a chair"])[0][0].tolist()
    for rules, row in ((LLAMA_WITH_BOS, [1, *whole[:3]]), (VICUNA, [2, *whole[-3:]])):
        assert load(tmp_path / "tokenizer.model", rules, 4).prompts(["a dog on a chair"])[0].tolist() == [row]
    t5 = file_of(tmp_path, "t5")
    whole = load(t5, T5).prompts(["a dog on a chair"])[0][0].tolist()
    assert load(t5, T5, 4).prompts(["a dog on a chair"])[0].tolist() == [[*whole[:3], 1]]
    with pytest.raises(ValueError, match="max_length is 1; 1 are taken"):
        load(t5, T5, 1)


@pytest.mark.parametrize("kind", ["llama", "baichuan", "vicuna"])
def test_text_comes_back(tmp_path: Path, kind: str) -> None:
    words = load(file_of(tmp_path, kind), RULES[kind])
    for text in (BAICHUAN_PROMPT, "a dog", "two\n\nlines", "狗 and 🚀", "a , b ."):
        assert words.text(words.prompts([text])[0][0]) == text
    assert words.text([words.size, words.size + 7, -1]) == ""  # rows of an embedding that is larger


def test_newline_is_a_byte_where_the_vocabulary_has_none(tmp_path: Path) -> None:
    llama = load(file_of(tmp_path, "llama"), LLAMA)
    assert llama.prompts(["\n"])[0][0, -1] == 3 + 0x0A  # <0x0A>
    assert llama.text([3 + byte for byte in "狗".encode()]) == "狗"
    assert llama.text([3 + "狗".encode()[0]]) == "\ufffd"


def test_special_tokens_of_t5(tmp_path: Path) -> None:
    words = load(file_of(tmp_path, "t5"), T5)
    assert words.prompts(["<extra_id_0><extra_id_99>"])[0].tolist() == [[T5_SIZE - 1, T5_SIZE - 100, 1]]
    dog = words.prompts(["dog"])[0][0].tolist()
    assert words.text([0, T5_SIZE - 1, *dog, 2, 0, 0]) == "dog"


@pytest.mark.parametrize(("kind", "rules"), [("llama", LLAMA), ("llama", VICUNA), ("t5", T5)], ids=["llama", "vicuna", "t5"])
def test_tokenizer_json(tmp_path: Path, kind: str, rules: SentenceRules) -> None:
    words = load(file_of(tmp_path, kind), rules)
    original(tmp_path, rules).save_pretrained(tmp_path / "fast")
    found = load(tmp_path / "fast/tokenizer.json", rules)
    assert (found.size, found.pad_id) == (words.size, words.pad_id)
    texts = agreed(PROMPTS, rules)
    np.testing.assert_array_equal(found.prompts(texts)[0], words.prompts(texts)[0])
    for row in words.prompts(PROMPTS)[0]:
        assert found.text(row) == words.text(row)


@pytest.mark.parametrize("data", [b"\x00" * 100, b"some text\n", bytes(range(256)) * 9, b"half"])
def test_damaged_files(tmp_path: Path, data: bytes) -> None:
    file = file_of(tmp_path, "llama")
    file.write_bytes(file.read_bytes()[:3000] if data == b"half" else data)
    with pytest.raises(UserError) as error:
        load(file, LLAMA)
    assert error.value.message == f"{file} is damaged, or not a SentencePiece model. Give the published tokenizer.model."


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("tokenizer.model", b"", "is empty"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("tokenizer.json", b"{", "is not a tokenizer.json"),
        ("tokenizer.json", b"\xff", "byte 0 is not UTF-8"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "is not the vocabulary of LLaMA"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        load(tmp_path / name, LLAMA)
    assert error.value.message.startswith(str(tmp_path / name))
    assert says in error.value.message


def test_another_models_vocabulary(tmp_path: Path) -> None:
    file = file_of(tmp_path, "t5")
    with pytest.raises(UserError) as error:
        load(file, LLAMA)
    assert error.value.message == (
        f"{file} is not the vocabulary of LLaMA: it begins with '<pad>' '</s>' '<unk>', expected '<unk>' '<s>' '</s>'. "
        "Give the tokenizer that belongs to the language model (--tokenizer)."
    )


@pytest.mark.real_data
@pytest.mark.parametrize("kind", [*RULES, "bos"])
def test_the_published_vocabularies(kind: str) -> None:
    data = Path(os.environ["BLIP_REAL_DATA"])
    rules = RULES.get(kind, LLAMA_WITH_BOS)
    file = data / "tokenizers" / PUBLISHED.get(kind, "llama") / NAMES.get(kind, "tokenizer.model")
    words = load(file, rules)
    sizes = {"llama": 32000, "bos": 32000, "baichuan": 64000, "vicuna": 32001, "t5": 32100}
    assert (words.size, words.pad_id) == (sizes[kind], 32000 if kind == "vicuna" else 0)
    hello = {"llama": [15043, 3186], "bos": [1, 15043, 3186], "vicuna": [2, 15043, 3186], "t5": [8774, 296, 1]}
    if kind in hello:
        assert words.prompts(["Hello world"])[0].tolist() == [hello[kind]]
    entries = json.loads((data / "coco108/annotations.json").read_text("utf-8"))
    captions = [caption for entry in entries for caption in entry["caption"]]
    questions = [f"Question: {e['question']} Short answer:" for e in json.loads((data / "coco108/vqav2.json").read_text("utf-8"))]
    assert len(captions) == 540
    library = SentencePieceProcessor(model_file=str(file))
    for text in captions + questions:
        ids = library.encode(text)
        assert words.prompts([text])[0].tolist() == [[*rules.first, *ids, *rules.last]]
        assert words.text(ids) == (clean_up(library.decode(ids)) if rules.cleaned else library.decode(ids)).strip()
    if kind == "baichuan":
        assert words.prompts([BAICHUAN_PROMPT])[0].tolist() == [library.encode(BAICHUAN_PROMPT)]
    else:
        texts, theirs = agreed(captions + questions + PROMPTS, rules), original(file.parent, rules)
        assert len(texts) > 540
        for length in (None, 8, 32):
            assert_equal(load(file, rules, length), theirs, texts, length)
        for row in words.prompts(texts)[0].tolist():
            assert words.text(row) == their_text(theirs, row, rules)
    if kind != "t5":
        assert words.text(words.prompts([BAICHUAN_PROMPT])[0][0]) == BAICHUAN_PROMPT
    # Special tokens written out: from transformers 4.33.2.
    if kind == "llama":
        assert words.prompts(["a </s> b"])[0].tolist() == [[263, 29871, 2, 29871, 289]]
        assert words.prompts(["Hello <s>."])[0].tolist() == [[15043, 29871, 1, 869]]
    if kind == "vicuna":
        assert words.prompts(["a </s> b"])[0].tolist() == [[2, 263, 2, 289]]
        assert words.prompts(["<s> <unk>"])[0].tolist() == [[2, 1, 0]]
