"""What `blip-run classify` takes for labels, templates and a temperature, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from models.errors import Misuse, UserError
from runtime.labels import checked_labels, read_labels
from runtime.pipeline import pipeline
from tests import chain
from tests.classes import Work, assert_equal, data_for, with_temperature


@pytest.fixture
def blip(ort_graphs: Path, tmp_path: Path) -> Work:
    return Work("blip", ort_graphs, data_for(ort_graphs), tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--labels", ""), "Label 1 is blank"),
        (("--labels", "word1,,word2"), "Label 2 is blank"),
        (("--labels", "word1, word2 ,word2"), "Label 3 is 'word2', as 2 is"),
        (("--labels", "word1", "--labels-file", "x"), "Both --labels and --labels-file are given; choose one."),
        (("--template", "a picture"), "The template 'a picture' must hold one {}"),
        (("--template", "{} of {}"), "The template '{} of {}' must hold one {}"),
        (("--template", ""), "The template '' must hold one {}"),
        (("--query", "max"), "The query 'max' was asked for, but these graphs are of BLIP"),
        (("--query", "last"), "Invalid value for '--query'"),
        (("--protocol", "clip"), "Invalid value for '--protocol'"),
        (("--temperature", 0), "The temperature is 0.0; expected a number above 0."),
        (("--temperature", "nan"), "The temperature is nan; expected a number above 0."),
        (("--temperature", "inf"), "The temperature is inf; expected a number above 0."),
        (("--temperature", "cold"), "Invalid value for '--temperature'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_misuse(blip: Work, options: tuple[object, ...], said: str) -> None:
    assert said in chain.refusal(blip.call(*options), code=2)
    assert not blip.out.exists()
    assert not blip.part.exists()


def test_labels_that_are_the_same_to_the_model(blip: Work) -> None:
    """Words that the vocabulary does not know, and words that differ in case alone."""
    message = chain.refusal(blip.call("--labels", "word1,word2 zebra,word2,word2 gnu"))
    said = "The labels 'word2 zebra' and 'word2 gnu' are the same tokens to this model: it cannot tell them apart. "
    assert message.startswith(said)
    assert "'word1' and 'WORD1'" in chain.refusal(blip.call("--labels", "word1,WORD1"))
    assert not blip.out.exists()


@pytest.mark.parametrize("label", ["zebra", "Gnu zebra!", "\u200b"], ids=ascii)
@pytest.mark.parametrize("template", ["a picture of {}", "word9 {}", "{}"])
def test_a_label_that_the_vocabulary_does_not_know(blip: Work, label: str, template: str) -> None:
    """The template would be scored in its place, and might win; by the command and by the Python interface."""
    said = f"The vocabulary of these graphs knows nothing of the label {label!r}: all of it is [UNK]. Leave it out, or "
    assert chain.refusal(blip.call("--labels", f"{label},word1", "--template", template)).startswith(said)
    assert not blip.out.exists()
    classify = pipeline("zero_shot_image_classification", blip.graphs, temperature=0.07)
    with pytest.raises(UserError, match=re.escape(said)):
        classify([], ["word1", label], template)


def test_a_label_that_the_vocabulary_knows_in_part(blip: Work) -> None:
    assert blip.run("--labels", "zebra word2,word1").labels == ["zebra word2", "word1"]


def test_labels_longer_than_the_positions(blip: Work) -> None:
    """Dynamic graphs take as many tokens as there are positions, beyond the captions' length; nothing is cut."""
    whole = "word1 " * 34
    assert_equal(blip.run("--labels", f"word2,{whole}", "--template", "{}"), blip.expected(["word2", whole], templates=["{}"]))
    message = chain.refusal(blip.call("--labels", f"word2,{whole} word3", "--template", "{}"))
    assert message.endswith("is longer than 36 tokens, which the graph takes. Give a shorter label or template.")


def test_a_file_of_json_is_not_one_label(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('["cat", "dog"]', "utf-8")
    with pytest.raises(UserError, match="as JSON does; expected plain text, one label a line"):
        read_labels(tmp_path / "labels.json")


def test_labels_of_a_file(blip: Work, tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_bytes("\ufeffword1, word2\r\nword4\u2028\n word3 \n".encode())
    assert read_labels(file) == ["word1, word2", "word4", "word3"]
    assert blip.run("--labels-file", file).labels == ["word1, word2", "word4", "word3"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "{} is empty; give one label at least."),
        (b"word1\n\nword2\n", "{}, line 2 is blank; remove it, or fill it in."),
        (b"word1\n  \t\n", "{}, line 2 is blank; remove it, or fill it in."),
        (b"word1\nword2\n\n", "{}, line 3 is blank; remove it, or fill it in."),
        (b"word1\nword2\nword1 \n", "{}, line 3 is 'word1', as 1 is; each label is there once."),
        (b"word1\n\xff\n", "{} is not UTF-8: byte 6. Save it as UTF-8, one label a line."),
    ],
)
def test_a_wrong_file_of_labels(blip: Work, tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "labels.txt"
    file.write_bytes(content)
    assert chain.refusal(blip.call("--labels-file", file)) == said.format(file)
    assert "no such file" in chain.refusal(blip.call("--labels-file", tmp_path / "none.txt"))
    assert not blip.out.exists()


@pytest.mark.parametrize("labels", [[1], [None], ["\ud800"], [b"word"]], ids=repr)
def test_labels_that_are_no_text(labels: list[Any]) -> None:
    with pytest.raises(Misuse, match=re.escape(f"Label 1 is {labels[0]!r}; expected a text.")):
        checked_labels(labels)
    with pytest.raises(Misuse, match="The list of labels is empty"):
        checked_labels([])


@pytest.mark.parametrize("value", [0, -0.1, "0.07", [], float("nan")])
def test_a_garbled_temperature(blip: Work, tmp_path: Path, value: object) -> None:
    blip.graphs = with_temperature(blip.graphs, tmp_path / "graphs", value)
    message = chain.refusal(blip.call())
    assert message.startswith(f"{tmp_path / 'graphs'} has the temperature {value!r}; expected a number above 0. ")
