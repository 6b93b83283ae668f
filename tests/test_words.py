"""The words of a decoder: which files they are read from, and whether they are the model's."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.errors import UserError
from preprocess.padding import left_padded, right_padded
from preprocess.spaces import clean_up
from preprocess.words import KINDS, SPARE, Words, check_size, find_vocabulary, load_words
from tests import vocabularies
from tests.vocabularies import LLAMA_WITH_BOS, write_bpe, write_sentencepiece, write_wordpiece

WRITE: dict[str, Callable[[Path], Path]] = {
    "bert": write_wordpiece,
    "opt": write_bpe,
    "llama": lambda folder: write_sentencepiece(folder, "llama"),
    "baichuan": lambda folder: write_sentencepiece(folder, "baichuan"),
    "vicuna": lambda folder: write_sentencepiece(folder, "llama"),
    "t5": lambda folder: write_sentencepiece(folder, "t5"),
}
SIZES = {
    "bert": vocabularies.WORDPIECE_BLIP,
    "opt": vocabularies.BPE_SIZE,
    "llama": vocabularies.SENTENCEPIECE["llama"],
    "baichuan": vocabularies.SENTENCEPIECE["baichuan"],
    "vicuna": vocabularies.VICUNA,
    "t5": vocabularies.T5,
}
FILES = {
    "bert": ["vocab.txt"],
    "opt": ["vocab.json", "merges.txt"],
    "llama": ["tokenizer.model"],
    "baichuan": ["tokenizer.model"],
    "vicuna": ["tokenizer.model"],
    "t5": ["spiece.model"],
}
ADVICE = "Give the tokenizer that belongs to the model (--tokenizer)."


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(tmp_path: Path, kind: str) -> None:
    words = load_words(WRITE[kind](tmp_path), kind, SIZES[kind])
    assert words.family == KINDS[kind].family
    assert [file.name for file in words.files] == FILES[kind]
    assert words.file == words.files[0]
    assert words.sha256 == hashlib.sha256(b"".join(file.read_bytes() for file in words.files)).hexdigest()
    assert words.size == SIZES[kind]
    ids, mask = words.prompts(["a picture of a dog", "", "the cat"])
    assert ids.shape == mask.shape == (3, mask.sum(1).max())
    assert ids.dtype == mask.dtype == np.int64
    assert (np.diff(mask[:, ::-1] if kind == "t5" else mask, axis=1) >= 0).all()  # padding comes first; T5's last
    assert (ids[mask == 0] == words.pad_id).all()
    assert max(ids.max(), words.pad_id, *words.start_ids, *words.stop_ids) < words.size
    assert [words.text(row) for row in ids] == ["a picture of a dog", "", "the cat"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_the_folder_will_do(tmp_path: Path, kind: str) -> None:
    folder = WRITE[kind](tmp_path)
    for name in FILES[kind]:
        assert load_words(folder / name, kind).sha256 == load_words(folder, kind).sha256


def test_a_renamed_file(tmp_path: Path) -> None:
    for kind in ("bert", "llama", "t5"):
        file = find_vocabulary(WRITE[kind](tmp_path), kind)[0]
        assert load_words(file.rename(tmp_path / f"own-{kind}{file.suffix}"), kind).size == SIZES[kind]


def test_what_comes_first(tmp_path: Path) -> None:
    for kind, first in (
        ("bert", "tokenizer.json"),
        ("opt", "vocab.json"),
        ("llama", "tokenizer.model"),
        ("t5", "tokenizer.json"),
    ):
        folder = WRITE[kind](tmp_path)
        (folder / "tokenizer.json").write_text("{}")
        assert find_vocabulary(folder, kind)[0].name == first
    (tmp_path / "merges.txt").unlink()
    assert find_vocabulary(tmp_path, "opt") == (tmp_path / "tokenizer.json",)


def test_other_rules(tmp_path: Path) -> None:
    folder = WRITE["llama"](tmp_path)
    ids = load_words(folder, "llama").prompts(["a dog"])[0][0].tolist()
    assert load_words(folder, "llama", rules=LLAMA_WITH_BOS).prompts(["a dog"])[0].tolist() == [[1, *ids]]
    assert load_words(folder, "llama", max_length=1).prompts(["a dog"])[0].tolist() == [ids[:1]]
    with pytest.raises(ValueError, match="takes no such rules"):
        load_words(WRITE["opt"](tmp_path), "opt", rules=LLAMA_WITH_BOS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_of_another_model(tmp_path: Path, kind: str) -> None:
    """Every kind refuses every other's folder, by its files or by what they hold. LLaMA's and Vicuna's are the same."""
    for other in KINDS:
        folder = tmp_path / other
        folder.mkdir()
        WRITE[other](folder)
        if other == kind or FILES[other] == FILES[kind]:
            continue
        with pytest.raises(UserError) as error:
            load_words(folder, kind)
        held = sorted(FILES[other], reverse=True)
        assert error.value.message.startswith(f"{folder} holds {', '.join(held)}, but {KINDS[kind].model} reads ")
        with pytest.raises(UserError, match=f"^{folder / FILES[other][0]} is something else: {KINDS[kind].model} reads"):
            load_words(folder / FILES[other][0], kind)
    with pytest.raises(UserError, match="is not the vocabulary of T5: it begins with '<unk>' '<s>' '</s>', expected"):
        load_words((tmp_path / "llama/tokenizer.model").rename(tmp_path / "a.model"), "t5")


def test_sentences(tmp_path: Path) -> None:
    folder = WRITE["llama"](tmp_path)
    for path, kind, message in (
        (folder, "opt", f"{folder} holds tokenizer.model, but OPT reads vocab.json with merges.txt, or tokenizer.json. {ADVICE}"),
        (
            tmp_path / "absent",
            "t5",
            f"There is no tokenizer at {tmp_path / 'absent'}. T5 reads tokenizer.json, or spiece.model: give that, or a folder "
            "that holds it.",
        ),
        (folder, "bloom", "No decoder is called 'bloom'; expected bert, opt, llama, baichuan, vicuna, t5."),
    ):
        with pytest.raises(UserError) as error:
            load_words(path, kind)
        assert error.value.message == message


@pytest.mark.parametrize(("kept", "lost"), [("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")])
def test_half_of_two_files(tmp_path: Path, kept: str, lost: str) -> None:
    (WRITE["opt"](tmp_path) / lost).unlink()
    for path in (tmp_path, tmp_path / kept):
        with pytest.raises(UserError) as error:
            load_words(path, "opt")
        assert error.value.message == (
            f"{tmp_path} holds {kept} without {lost}, but OPT reads vocab.json with merges.txt, or tokenizer.json. {ADVICE}"
        )


def test_size(tmp_path: Path) -> None:
    opt = load_words(WRITE["opt"](tmp_path), "opt")
    for vocab in (opt.size, opt.size + 7, opt.size + SPARE):
        check_size(opt, "opt", vocab)
    for vocab in (opt.size - 1, opt.size + SPARE + 1):
        with pytest.raises(UserError) as error:
            load_words(tmp_path, "opt", vocab)
        assert error.value.message == (
            f"{tmp_path / 'vocab.json'} has 300 tokens, counting those that OPT adds, but the model has {vocab:,}: it is another "
            f"model's. {ADVICE}"
        )
    bert = WRITE["bert"](tmp_path)
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    for vocab in (SIZES["bert"] - 1, SIZES["bert"] + 1):  # BLIP's tables have no spare rows
        with pytest.raises(UserError, match="counting those that BLIP adds"):
            load_words(bert, "bert", vocab)


def test_copied_files_are_the_same_words(tmp_path: Path) -> None:
    """What an export does: the files go beside the graphs."""
    for kind in KINDS:
        source, copy = tmp_path / kind, tmp_path / f"copy-{kind}"
        source.mkdir()
        copy.mkdir()
        words: Words = load_words(WRITE[kind](source), kind)
        for file in words.files:
            shutil.copy(file, copy)
        found = load_words(copy, kind)
        assert (found.sha256, found.size, found.stop_ids) == (words.sha256, words.size, words.stop_ids)


def test_padding() -> None:
    rows = [[5, 6], [], [7, 8, 9]]
    ids, mask = left_padded(rows, 1)
    assert ids.tolist() == [[1, 5, 6], [1, 1, 1], [7, 8, 9]]
    assert mask.tolist() == [[0, 1, 1], [0, 0, 0], [1, 1, 1]]
    ids, mask = right_padded(rows, 1)
    assert ids.tolist() == [[5, 6, 1], [1, 1, 1], [7, 8, 9]]
    assert mask.tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
    assert left_padded([[], []], 1)[0].shape == (2, 0)
    assert left_padded([], 1)[0].shape == (0, 0)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a dog . a cat ! is it ? yes , it is .", "a dog. a cat! is it? yes, it is."),
        ("it is n't , i 'm , tom 's , we 've , you 're", "it isn't, i'm, tom's, we've, you're"),
        ("don ' t", "don't"),
        ("a 'd b ; c : d", "a 'd b ; c : d"),  # these are not in the list
        ("  .", " ."),
    ],
)
def test_clean_up(text: str, cleaned: str) -> None:
    assert clean_up(text) == cleaned


def test_neither_torch_nor_transformers_is_needed() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import preprocess.words, preprocess.questions"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
