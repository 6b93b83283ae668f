"""The Python interface raises UserError or Misuse, each with one message, and nothing else, whatever it is given."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.errors import Misuse, UserError
from runtime.pipeline import pipeline
from tests.bad_input.table import LONGEST

LABELS = ["word1", "word2 word3"]
Call = Callable[["Given"], object]


class Given:
    """What the calls below are made of: graphs of both models, and one good picture."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.graphs, self.blip, self.data = root / "graphs", root / "graphs of BLIP", root / "data"
        self.picture, self.folder = root / "images" / "0.png", folder
        self.files: list[Any] = []  # opened, to be closed after the test

    def classify(self, images: Any = (), labels: Any = LABELS, **options: Any) -> object:
        asked = {name: options.pop(name) for name in ("hypothesis_template", "top_k") if name in options}
        made = pipeline("zero_shot_image_classification", self.graphs, threads=1, **{"temperature": 0.07, **options})
        return made(images, labels, **asked)

    def rank(self, images: Any = (), texts: Any = ("word1",), **options: Any) -> object:
        return pipeline("image_text_retrieval", **{"graphs": self.graphs, "threads": 1, **options})(images, texts, match=False)

    def describe(self, *asked: Any, **named: Any) -> object:
        return pipeline("feature_extraction", self.graphs, threads=1)(*asked, **named)

    def broken(self) -> Path:
        """A JPEG that ends too early."""
        noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "JPEG")
        path = self.folder / "broken.jpg"
        path.write_bytes(file.getvalue()[:900])
        return path

    def opened(self, file: Any) -> Any:
        self.files.append(file)
        return file

    def pipe(self) -> Path:
        os.mkfifo(self.folder / "pipe.png")
        return self.folder / "pipe.png"


@pytest.fixture
def given(good2: Path, tmp_path: Path) -> Iterator[Given]:
    found = Given(good2, tmp_path)
    yield found
    for file in found.files:
        file.close()


def _pixels(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.zeros(shape, dtype)


PICTURES: list[tuple[Call, str]] = [
    (lambda g: "https://example.org/a.jpg", "is an address, and nothing here reads the network"),
    (lambda g: "FILE:///a.jpg", "is an address"),
    (lambda g: "data:image/png;base64,iVBORw0KGgo=", "does not exist"),
    (lambda g: "nowhere.png", "nowhere.png does not exist"),
    (lambda g: [g.picture, "nowhere.png"], "nowhere.png does not exist"),
    (lambda g: "", "is not a file"),
    (lambda g: "a\0.png", "cannot be read"),
    (lambda g: Path("a\0.png"), "cannot be read"),
    (lambda g: "\ud800.png", "cannot be read"),
    (lambda g: "a" * 300, "file name too long"),
    (lambda g: g.folder, "is not a file"),
    (lambda g: g.pipe(), "is not a file"),
    (lambda g: g.data / "manifest.json", "is not a picture"),
    (lambda g: g.broken(), "broken.jpg cannot be decoded: "),
    (lambda g: g.opened(Image.open(g.broken())), "Picture 0 cannot be decoded: "),
    (lambda g: [g.picture, Image.new("RGB", (0, 4))], "Picture 1 has no pixels: its size is 0 x 4"),
    (lambda g: None, "Picture 0 is of type NoneType"),
    (lambda g: 7, "Picture 0 is of type int"),
    (lambda g: os.fsencode(g.picture), "Picture 0 is of type bytes"),
    (lambda g: g.opened(g.picture.open("rb")), "Picture 0 is of type BufferedReader"),
    (lambda g: {"image": g.picture}, "Picture 0 is of type dict"),
    (lambda g: [[g.picture]], "Picture 0 is of type list"),
    (lambda g: (path for path in [g.picture]), "Picture 0 is of type generator"),
    (lambda g: torch.zeros(3, 4, 4), "Picture 0 is of type Tensor"),
    (lambda g: np.array([str(g.picture)]), "Picture 0 is an array <U"),
    (lambda g: _pixels(4, 4, 3, dtype=np.float32), "array float32 (4, 4, 3); expected uint8"),
    (lambda g: _pixels(4, 4, 3, dtype=object), "array object (4, 4, 3)"),
    (lambda g: _pixels(2, 4, 4, 3), "array uint8 (2, 4, 4, 3)"),
    (lambda g: _pixels(3, 4, 5), "array uint8 (3, 4, 5)"),
    (lambda g: _pixels(7), "array uint8 (7,)"),
    (lambda g: _pixels(0, 4, 3), "Picture 0 has no pixels"),
]
MISUSE: list[tuple[Call, str]] = [
    (lambda g: pipeline("zero_shot", g.graphs), "There is no task 'zero_shot'; known tasks: zero_shot_image_classification"),
    (lambda g: pipeline("", g.graphs), "There is no task ''"),
    (lambda g: pipeline(None, g.graphs), "There is no task None"),
    (lambda g: pipeline(["image_text_retrieval"], g.graphs), "There is no task ['image_text_retrieval']"),
    (lambda g: g.rank(graphs=None), "graphs is None"),
    (lambda g: g.rank(graphs=7), "graphs is 7"),
    (lambda g: g.rank(provider="tpu"), "There is no provider 'tpu'; known providers: cpu"),
    (lambda g: g.rank(provider=None), "There is no provider None"),
    (lambda g: g.rank(threads=0), "threads is 0; expected a whole number above 0"),
    (lambda g: g.rank(threads="2"), "threads is '2'"),
    (lambda g: g.rank(threads=2.5), "threads is 2.5"),
    (lambda g: g.rank(batchsize=0), "batchsize is 0"),
    (lambda g: g.rank(batchsize=None), "batchsize is None"),
    (lambda g: g.rank(batchsize=float("nan")), "batchsize is nan"),
    (lambda g: g.rank((), None), "Text 0 is None, of type NoneType; expected a str"),
    (lambda g: g.rank((), 7), "Text 0 is 7"),
    (lambda g: g.rank((), ["word1", b"word2"]), "Text 1 is b'word2', of type bytes"),
    (lambda g: g.rank((), {"word1": 1}), "of type dict"),
    (lambda g: g.rank((), ["\ud800"]), "Text 0 is '\\ud800'"),
    (lambda g: g.rank((), "..."), "Text 0 is '...', which has no words"),
    (lambda g: g.classify((), None), "candidate_labels is None"),
    (lambda g: g.classify((), 7), "candidate_labels is 7"),
    (lambda g: g.classify((), []), "The list of labels is empty"),
    (lambda g: g.classify((), np.array([])), "The list of labels is empty"),
    (lambda g: g.classify((), ""), "Label 1 is blank"),
    (lambda g: g.classify((), [None]), "Label 1 is None; expected a text"),
    (lambda g: g.classify((), b"word1"), "Label 1 is 119; expected a text"),
    (lambda g: g.classify((), [["word1"]]), "Label 1 is ['word1']"),
    (lambda g: g.classify((), ["\ud800"]), "Label 1 is '\\ud800'"),
    (lambda g: g.classify((), ["word1", "word1 "]), "Label 2 is 'word1', as 1 is"),
    (lambda g: g.classify((), True), "candidate_labels is True"),
    (lambda g: g.classify(hypothesis_template="a picture"), "The template 'a picture' must hold one {}"),
    (lambda g: g.classify(hypothesis_template="{0.__class__}"), "The template '{0.__class__}' must hold one {}"),
    (lambda g: g.classify(hypothesis_template="{} {}"), "The template '{} {}' must hold one {}"),
    (lambda g: g.classify(hypothesis_template=7), "The template 7 must hold one {}"),
    (lambda g: g.classify(hypothesis_template=[]), "There is no template"),
    (lambda g: g.classify(hypothesis_template=["{}", None]), "The template None must hold one {}"),
    (lambda g: g.classify(top_k=0), "top_k is 0"),
    (lambda g: g.classify(top_k="3"), "top_k is '3'"),
    (lambda g: g.classify(top_k=2.5), "top_k is 2.5"),
    (lambda g: g.classify(temperature=0), "The temperature is 0"),
    (lambda g: g.classify(temperature=float("nan")), "The temperature is nan"),
    (lambda g: g.classify(temperature="hot"), "The temperature is 'hot'"),
    (lambda g: g.classify(temperature=[]), "The temperature is []"),
    (lambda g: g.classify(temperature=10**400), "The temperature is 1000"),
    (lambda g: g.classify(query="mean"), "There is no query 'mean'; expected 'first' or 'max'"),
    (lambda g: g.classify(query=7), "There is no query 7"),
    (lambda g: g.describe(mode="video"), "There is no mode 'video'; known modes: image, text, multimodal"),
    (lambda g: g.describe(mode=None), "There is no mode None"),
    (lambda g: g.describe(mode=[]), "There is no mode []"),
    (lambda g: g.describe(), "needs images and texts"),
    (lambda g: g.describe(texts="word1", mode="image"), "needs images"),
    (lambda g: g.describe(images=g.picture, mode="text"), "needs texts"),
    (lambda g: g.describe([g.picture, g.picture], ["word1"]), "2 pictures and 1 texts"),
    (lambda g: g.describe(texts=[None], mode="text"), "Text 0 is None"),
]
FAILED: list[tuple[Call, str]] = [
    (lambda g: g.rank(graphs="nowhere"), "There is no folder nowhere. blip-export writes it"),
    (lambda g: g.rank(graphs=""), "holds no manifest.json"),
    (lambda g: g.rank(graphs="a\0b"), "There is no folder a\0b"),
    (lambda g: g.rank(graphs=g.picture), "There is no folder"),
    (lambda g: g.rank(graphs=g.data), "is a 'data' folder, expected 'graphs'"),
    (lambda g: g.rank(provider="cuda"), "CUDAExecutionProvider"),
    (lambda g: pipeline("feature_extraction", g.blip), "graphs of BLIP"),
    (lambda g: pipeline("image_text_retrieval", g.graphs)(g.picture, ["word1"]), "has no graph 'image_kv'. Export it"),
    (lambda g: g.classify((), ["zebra"]), "knows nothing of the label 'zebra'"),
    (lambda g: g.classify((), ["word1", "WORD1"]), "the same tokens to this model"),
    (lambda g: g.classify((), ["word1 " * 99]), "longer than 35 tokens"),
    (lambda g: g.describe([None], ["word1"]), "Picture 0 is of type NoneType"),
]


def message(call: Call, given: Given, kind: type[UserError]) -> str:
    """What `call` says. Whatever else it raises is raised here."""
    with pytest.raises(UserError) as caught:
        call(given)
    assert type(caught.value) is kind, caught.value.message
    assert caught.value.message.endswith((".", "?")), caught.value.message
    assert len(caught.value.message) <= LONGEST
    return caught.value.message


@pytest.mark.parametrize(("picture", "said"), PICTURES, ids=[said for _, said in PICTURES])
def test_pictures(given: Given, picture: Call, said: str) -> None:
    assert said in message(lambda g: g.classify(picture(g)), given, UserError)


@pytest.mark.parametrize(("call", "said"), MISUSE, ids=[said for _, said in MISUSE])
def test_misuse(given: Given, call: Call, said: str) -> None:
    assert said in message(call, given, Misuse)


@pytest.mark.parametrize(("call", "said"), FAILED, ids=[said for _, said in FAILED])
def test_failures(given: Given, call: Call, said: str) -> None:
    assert said in message(call, given, UserError)


def test_nothing_to_do(given: Given) -> None:
    """Empty lists are answered by empty ones."""
    assert given.classify([]) == []
    assert given.rank([]) == []
    assert given.rank(given.picture, []) == []
    assert {name: len(rows) for name, rows in given.describe([], []).items()} == {"multimodal_embeds": 0}


def test_a_query_for_blip(given: Given) -> None:
    given.graphs = given.blip
    assert "these graphs are of BLIP" in message(lambda g: g.classify(query="max"), given, Misuse)
