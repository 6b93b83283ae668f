"""Questions: the original's cleaning."""

from __future__ import annotations

import pytest

from preprocess.questions import pre_question
from preprocess.text import pre_caption

GOLDEN = '"Hello";  World!!  (test)#1: a~b*c'  # through the original: `hello  world  test1 abc`


@pytest.mark.parametrize(
    ("question", "cleaned"),
    [
        (GOLDEN, "hello  world  test1 abc"),
        ("What is this?", "what is this?"),  # the question mark stays
        ("Is it Tom's, well-known?", "is it tom's, well-known?"),
        ("  two blanks first ", "  two blanks first"),
        ("a line\n", "a line\n"),  # only blanks are taken from the end
        ("end. ", "end"),
        ("...", ""),
        ("", ""),
        ("word " * 60, " ".join(["word"] * 50)),
        ("a  b " * 60, " ".join(["a", "", "b"] * 16 + ["a", ""])),  # an empty word counts
    ],
)
def test_pre_question(question: str, cleaned: str) -> None:
    assert pre_question(question) == cleaned


def test_fewer_words() -> None:
    assert pre_question("one two three", 2) == "one two"


def test_a_caption_is_cleaned_otherwise() -> None:
    assert pre_caption(GOLDEN, 50) == "hello world test 1 a b c"
