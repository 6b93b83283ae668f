"""training/texts.py: what is learnt of a text, and that what is cut still ends as a text ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.config import Blip2LlmConfig
from preprocess.words import Words, load_words
from tests.generators import speaking, write_vocabulary
from training import texts

CAPTIONS = ("A red circle", "two blue stars and a green square above them")
WORDS = 50  # more than any caption has


def words_of(folder: Path, kind: str) -> Words:
    config = speaking(kind)
    path = write_vocabulary(folder, config)
    if not isinstance(config, Blip2LlmConfig):
        return load_words(path, "bert", config.decoder.vocab)
    return load_words(path, config.llm.family, config.llm.vocab)


def ids_of(words: Words, text: str) -> list[int]:
    """As a model reads a prompt, without padding."""
    ids, mask = words.prompts([text])
    return [int(i) for i in ids[0, mask[0] == 1]]


@pytest.mark.parametrize("kind", ["caption", "opt", "llama"])
def test_what_follows_the_prompt_is_learnt(tmp_path: Path, kind: str) -> None:
    words = words_of(tmp_path, kind)
    ids, mask, learnt = texts.told(words, CAPTIONS, "a photo of", newline=False, max_words=WORDS, max_length=60)
    before = len(ids_of(words, "a photo of"))
    for row, caption in enumerate(CAPTIONS):
        length = int(mask[row].sum())
        whole = ids_of(words, f"a photo of {caption.lower()}")
        ends = [] if kind == "opt" else [words.stop_ids[0]]
        assert ids[row, :length].tolist() == whole + ends
        assert learnt[row].tolist() == [0] * before + [1] * (length - before) + [0] * (ids.shape[1] - length)
    assert mask[0].sum() < mask[1].sum()  # the shorter one is padded


def test_a_line_ends_a_text_of_opt(tmp_path: Path) -> None:
    words = words_of(tmp_path, "opt")
    ids, mask, learnt = texts.told(words, CAPTIONS[:1], "", newline=True, max_words=WORDS, max_length=60)
    assert ids[0].tolist() == ids_of(words, "a red circle\n")
    assert mask.all()
    assert learnt.all()  # without a prompt


@pytest.mark.parametrize("kind", ["caption", "opt", "llama"])
def test_a_long_text_is_cut_and_still_ends(tmp_path: Path, kind: str) -> None:
    words = words_of(tmp_path, kind)
    whole, _, _ = texts.told(words, CAPTIONS[1:], "", newline=False, max_words=WORDS, max_length=60)
    ids, mask, _ = texts.told(words, CAPTIONS[1:], "", newline=False, max_words=WORDS, max_length=6)
    assert mask.shape == (1, 6)
    assert whole.shape[1] > 6
    kept = 6 if kind == "opt" else 5  # of which nothing says that it has ended but a line
    assert ids[0, :kept].tolist() == whole[0, :kept].tolist()
    assert ids[0, -1] == (whole[0, 5] if kind == "opt" else words.stop_ids[0])


def test_an_answer_of_t5_is_cut_and_still_ends(tmp_path: Path) -> None:
    words = words_of(tmp_path, "t5")
    ids, mask, answer, answer_mask = texts.answered(words, CAPTIONS, "a photo of", max_words=WORDS, max_length=6)
    for row in range(2):
        assert ids[row, mask[row] == 1].tolist() == ids_of(words, "a photo of")
    long = ids_of(words, CAPTIONS[1].lower())
    assert len(long) > 6
    assert answer[1].tolist() == [*long[:5], words.stop_ids[0]]
    assert long[-1] == words.stop_ids[0]
    assert answer_mask[1].all()


def test_captions_are_cleaned_and_cut_to_words(tmp_path: Path) -> None:
    words = words_of(tmp_path, "opt")
    ids, _, _ = texts.told(words, ["A  Red, circle; left."], "", newline=False, max_words=2, max_length=60)
    assert ids[0].tolist() == ids_of(words, "a red,")
