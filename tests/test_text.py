"""Captions: the original's cleaning, and WordPiece equal to transformers' two implementations of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.config import BlipConfig, Protocol
from models.errors import UserError
from preprocess.annotations import read_annotations
from preprocess.text import CaptionTokenizer, pre_caption, with_first
from tests.tiny import TINY

WORDS = [
    "dog",
    "##s",
    "un",
    "##aff",
    "##able",
    "a",
    "b",
    "##a",
    "##b",
    "cafe",
    "naive",
    "don",
    "t",
    "'",
    "-",
    ",",
    "?",
    "[",
    "]",
    "1",
    "2",
]
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sep", "enc", "pad", "x", "##x", "你", "好", *WORDS]
ODD = [
    "", " ", "a dog", "unaffable dogs", "a [SEP] b", "x[ENC]a", "[MASK]", "[CLS] dog [DEC]", "[UNK]", "[PAD]", "[sep]", "[enc]",
    "[ PAD ]", "naïve café", "ÀB", "你好 dog", "😀 dog", "\u200bdog", "a\u0301b", "ß ſ İ", "don't", "a-b", "x" * 100, "x" * 101,
    "\t\n a", "\x00a", "\ufffd", "한국어", "ﬁne", "½ 1/2 2'1\"", "a_b", "@#%^&", "a—b…", "a\u2028b", "\u00ad dog",
    "dog " * 40, "a, b? dogs!",
]  # fmt: skip


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(TOKENS) + "\n", "utf-8")
    return path


def original(name: str, vocabulary: Path) -> Any:
    """transformers' tokenizer with the tokens added as salesforce/BLIP init_tokenizer adds them."""
    if name == "python":
        from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

        tokenizer = BertTokenizerLegacy(vocab_file=str(vocabulary))
    else:
        from transformers import BertTokenizer

        tokenizer = BertTokenizer(vocab=str(vocabulary))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def assert_equal(ours: CaptionTokenizer, theirs: Any, captions: list[str], length: int) -> None:
    ids, mask = ours.encode(captions, length)
    want = theirs(captions, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    np.testing.assert_array_equal(ids, want["input_ids"])
    np.testing.assert_array_equal(mask, want["attention_mask"])


@pytest.mark.parametrize(
    ("caption", "words", "cleaned"),
    [
        ("A Dog.", 30, "a dog"),
        ('"Two" (big) dogs: *run*; #now ~ !', 30, "two big dogs run now"),
        ("Don't stop, well-known? yes", 30, "don't stop, well-known? yes"),
        ("  a \t\n  dog \n", 30, "a dog"),
        ("one two three four", 2, "one two"),
        ("one\ttwo", 30, "one\ttwo"),  # a single tab is neither collapsed nor a word's end
        ("a dog\n", 30, "a dog"),
        ("...", 30, ""),
        ("word " * 10_000, 30, " ".join(["word"] * 30)),
    ],
)
def test_pre_caption(caption: str, words: int, cleaned: str) -> None:
    assert pre_caption(caption, words) == cleaned


@pytest.mark.parametrize("name", ["python", "rust"])
@pytest.mark.parametrize("length", [2, 3, 8, 35])
def test_equal_to_transformers(vocabulary: Path, name: str, length: int) -> None:
    ours, theirs = CaptionTokenizer.load(vocabulary), original(name, vocabulary)
    assert ours.size == len(theirs)
    assert [ours.decode_id, ours.encode_id] == theirs.convert_tokens_to_ids(["[DEC]", "[ENC]"])
    assert_equal(ours, theirs, ODD, length)
    assert_equal(ours, theirs, [pre_caption(caption, 30) for caption in ODD], length)


@pytest.mark.parametrize("name", ["python", "rust"])
def test_equal_to_transformers_on_noise(vocabulary: Path, name: str) -> None:
    pick = random.Random(0)
    # Only characters that every Unicode table of the last ten years knows.
    known = [c for c in map(chr, range(0x3000)) if unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cs")]
    noise = ["".join(pick.choices(known, k=pick.randrange(1, 30))) for _ in range(300)]
    assert_equal(CaptionTokenizer.load(vocabulary), original(name, vocabulary), noise, 35)


def test_the_comparison_can_fail(vocabulary: Path) -> None:
    other = vocabulary.with_name("other.txt")
    other.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *reversed(TOKENS[4:])]), "utf-8")
    with pytest.raises(AssertionError):
        assert_equal(CaptionTokenizer.load(other), original("rust", vocabulary), ODD, 35)


def test_what_a_row_looks_like(vocabulary: Path) -> None:
    tokenizer = CaptionTokenizer.load(vocabulary)
    ids, mask = tokenizer.encode(["a dog", "dog dog dog dog"], 5)
    id_of = {token: number for number, token in enumerate(TOKENS)}
    assert ids.dtype == mask.dtype == np.int64
    assert ids[0].tolist() == [id_of[t] for t in ("[CLS]", "a", "dog", "[SEP]", "[PAD]")]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert ids[1].tolist() == [id_of[t] for t in ("[CLS]", "dog", "dog", "dog", "[SEP]")]
    assert tokenizer.encode([], 5)[0].shape == (0, 5)
    with pytest.raises(ValueError, match="need 2"):
        tokenizer.encode(["a"], 1)


def test_special_tokens_are_added_or_found(vocabulary: Path) -> None:
    tokenizer = CaptionTokenizer.load(vocabulary)
    assert (tokenizer.pad_id, tokenizer.decode_id, tokenizer.encode_id, tokenizer.size) == (
        0,
        len(TOKENS),
        len(TOKENS) + 1,
        len(TOKENS) + 2,
    )
    assert tokenizer.file == vocabulary
    assert tokenizer.sha256 == hashlib.sha256(vocabulary.read_bytes()).hexdigest()
    vocabulary.write_text("\n".join([*TOKENS[:4], "[ENC]", "[DEC]", *TOKENS[4:]]), "utf-8")
    present = CaptionTokenizer.load(vocabulary)
    assert (present.encode_id, present.decode_id, present.size) == (4, 5, len(TOKENS) + 2)
    renamed = CaptionTokenizer.load(vocabulary, model_of(len(TOKENS) + 3, Protocol(encode_token="[MATCH]")))
    assert renamed.encode_id == len(TOKENS) + 2


def model_of(tokens: int, protocol: Protocol = TINY.protocol) -> BlipConfig:
    return dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, vocab=tokens), protocol=protocol)


def test_tokenizer_of_a_model(vocabulary: Path) -> None:
    assert CaptionTokenizer.load(vocabulary, model_of(len(TOKENS) + 2)).size == len(TOKENS) + 2
    with pytest.raises(UserError) as error:
        CaptionTokenizer.load(vocabulary, model_of(30524))
    assert error.value.message == (
        f"{vocabulary} has {len(TOKENS) + 2} tokens, counting those BLIP adds, but the model has 30,524. "
        "Give blip-export and blip-train the vocabulary that belongs to the model (--tokenizer)."
    )


def test_with_first_changes_a_copy() -> None:
    ids = np.array([[2, 7, 3], [2, 8, 3]])
    assert with_first(ids, 9).tolist() == [[9, 7, 3], [9, 8, 3]]
    assert ids.tolist() == [[2, 7, 3], [2, 8, 3]]


def test_windows_line_ends_and_no_last_one(vocabulary: Path) -> None:
    unix = CaptionTokenizer.load(vocabulary).encode(ODD, 35)
    vocabulary.write_bytes("\r\n".join(TOKENS).encode())
    np.testing.assert_array_equal(CaptionTokenizer.load(vocabulary).encode(ODD, 35), unix)


def test_tokenizer_json_is_read_and_preferred(vocabulary: Path) -> None:
    from transformers import BertTokenizer

    want = CaptionTokenizer.load(vocabulary).encode(ODD, 35)
    original("rust", vocabulary).save_pretrained(vocabulary.parent)
    BertTokenizer(vocab=str(vocabulary)).save_pretrained(vocabulary.parent / "plain")
    for folder in (vocabulary.parent, vocabulary.parent / "plain"):
        tokenizer = CaptionTokenizer.load(folder)
        assert tokenizer.file == folder / "tokenizer.json"
        assert tokenizer.size == len(TOKENS) + 2
        np.testing.assert_array_equal(tokenizer.encode(ODD, 35), want)


def without_template(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "post_processor": None}


def without_sep(values: dict[str, Any]) -> dict[str, Any]:
    words = {token: number for token, number in values["model"]["vocab"].items() if token != "[SEP]"}
    tokens = [token for token in values["added_tokens"] if token["content"] != "[SEP]"]
    return {**values, "added_tokens": tokens, "model": {**values["model"], "vocab": words}, "post_processor": None}


@pytest.mark.parametrize(("spoil", "says"), [(without_template, "does not put [CLS] before"), (without_sep, "it has no [SEP]")])
def test_tokenizer_json_of_another_model(vocabulary: Path, spoil: Any, says: str) -> None:
    original("rust", vocabulary).save_pretrained(vocabulary.parent)
    file = vocabulary.parent / "tokenizer.json"
    file.write_text(json.dumps(spoil(json.loads(file.read_text("utf-8")))), "utf-8")
    with pytest.raises(UserError) as error:
        CaptionTokenizer.load(vocabulary.parent)
    assert str(file) in error.value.message
    assert says in error.value.message


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("vocab.txt", b"", "is empty"),
        ("vocab.txt", b"\n \n", "is empty"),
        ("vocab.txt", b"[PAD]\n\xff\xfe\n", "byte 6 is not UTF-8"),
        ("vocab.txt", b"just\nsome\nwords\n", "it has no [PAD], [UNK], [CLS], [SEP]"),
        ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\ndog\n", "it has no [SEP]"),
        ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\ndog\na\ndog\n", "'dog' twice, in lines 5 and 7"),
        ("tokenizer.json", b"{", "is not a tokenizer.json"),
        ("tokenizer.json", b"[1, 2]", "is not a tokenizer.json"),
        ("tokenizer.json", b'{"a": 1}', "is not a tokenizer.json"),
        ("tokenizer.json", b"\x80\x04", "byte 0 is not UTF-8"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        CaptionTokenizer.load(tmp_path)
    assert error.value.message.startswith(str(tmp_path / name))
    assert says in error.value.message


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither tokenizer\.json nor vocab\.txt"):
        CaptionTokenizer.load(tmp_path)
    with pytest.raises(UserError, match="There is no tokenizer at"):
        CaptionTokenizer.load(tmp_path / "absent")


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["python", "rust"])
def test_the_captions_of_coco(name: str) -> None:
    """All captions of the Karpathy test split with the vocabulary of bert-base-uncased."""
    data = Path(os.environ["BLIP_REAL_DATA"])
    captions = read_annotations(data / "annotations/coco_karpathy_test.json").captions
    cleaned = [pre_caption(caption, 30) for caption in captions]
    vocabulary = data / "tokenizers/bert-base-uncased/vocab.txt"
    ours = CaptionTokenizer.load(vocabulary)
    assert (ours.decode_id, ours.encode_id, ours.size) == (30522, 30523, 30524)
    assert_equal(ours, original(name, vocabulary), cleaned, 35)
    lengths = ours.encode(cleaned, 35)[1].sum(1)
    assert len(lengths) == 25_010
    assert (lengths.min(), lengths.max(), round(float(lengths.mean()), 4)) == (8, 35, 13.0256)
