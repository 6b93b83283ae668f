"""Caption metrics: figures that pycocoevalcap 1.2 gave, a plain recomputation of random captions, and METEOR and SPICE with
stand-ins for their package."""

from __future__ import annotations

import math
import os
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import UserError
from postprocess import caption_metrics, java_metrics
from postprocess.bleu import bleu
from postprocess.caption_metrics import NAMES, judge
from postprocess.cider import cider
from postprocess.java_metrics import meteor, spice
from postprocess.references import read_caption_results, read_captions
from postprocess.rouge import common, rouge_l
from postprocess.scored import Absent, Scored

PLAIN = [name for name in NAMES if name not in caption_metrics.JAVA]

# Three pictures of COCO and made-up captions.
REFERENCES: dict[int | str, list[str]] = {
    42: [
        "A woman wearing a net on her head cutting a cake.",
        "A woman cutting a large white sheet cake.",
        "A woman wearing a hair net cutting a large sheet cake.",
        "there is a woman that is cutting a white cake",
        "A woman marking a cake with the back of a chef's knife.",
    ],
    73: [
        "Loads of old motorbikes, parked on the street!",
        "A motorcycle parked in a parking space next to another motorcycle.",
        "An old motorcycle parked beside other motorcycles with a brown leather seat.",
    ],
    74: [
        "A picture of a dog laying on the ground.",
        "Dog snoozing by a bike on the edge of a cobblestone street",
        "The white dog lays next to the bicycle on the sidewalk.",
    ],
}
CAPTIONS: dict[int | str, str] = {
    42: "a woman cutting a cake with a knife",
    73: "a motorcycle parked on the street",
    74: "a white dog laying next to a bike",
}
# Of pycocoevalcap 1.2 with Java 17; METEOR was 0.2997325956.
GOLDEN = {
    "Bleu_1": 0.8725252928,
    "Bleu_2": 0.7489714144,
    "Bleu_3": 0.5982676535,
    "Bleu_4": 0.4117539831,
    "ROUGE_L": 0.5581216151,
    "CIDEr": 1.9353178374,
}


def test_figures_of_pycocoevalcap() -> None:
    found = judge(REFERENCES, CAPTIONS, names=PLAIN)
    assert list(found.metrics) == PLAIN
    for name, figure in GOLDEN.items():
        assert found.corpus[name] == pytest.approx(figure, abs=1e-9), name
    assert (found.words, found.reference_words) == (22, 25)
    assert found.corpus["CIDEr-D"] == found.corpus["CIDEr"]
    assert (found.ids, found.captions) == ([42, 73, 74], list(CAPTIONS.values()))
    assert found.references == list(REFERENCES.values())


def test_another_word_is_seen() -> None:
    found = judge(REFERENCES, {**CAPTIONS, 73: "bicycles on a road"}, names=PLAIN)
    for name, figure in GOLDEN.items():
        assert found.corpus[name] != pytest.approx(figure, abs=1e-3), name


def test_each_caption_in_the_order_of_the_results() -> None:
    usual, turned = (judge(REFERENCES, dict(rows), names=PLAIN) for rows in (CAPTIONS.items(), reversed(CAPTIONS.items())))
    assert turned.ids == usual.ids[::-1]
    for name in PLAIN:
        one, other = usual.metrics[name], turned.metrics[name]
        assert isinstance(one, Scored)
        assert isinstance(other, Scored)
        np.testing.assert_array_equal(one.each, other.each[::-1])
        assert one.each.shape == (3,)
        assert other.corpus == pytest.approx(one.corpus, abs=1e-12)


def test_the_references_themselves() -> None:
    found = judge(REFERENCES, {picture: texts[0] for picture, texts in REFERENCES.items()}, names=PLAIN)
    assert found.corpus["Bleu_4"] == pytest.approx(1, abs=1e-8)
    assert found.corpus["ROUGE_L"] == 1
    alone = judge({p: texts[:1] for p, texts in REFERENCES.items()}, {p: t[0] for p, t in REFERENCES.items()}, names=PLAIN)
    assert alone.corpus["CIDEr"] == pytest.approx(10)


def test_a_single_picture_has_no_rare_words() -> None:
    assert judge({1: ["a dog"]}, {1: "a dog"}, names=["CIDEr"]).corpus == {"CIDEr": 0.0}


def test_captions_without_words() -> None:
    found = judge({1: ["a dog"], 2: ["."]}, {1: "", 2: "..."}, names=PLAIN)
    assert found.corpus["Bleu_1"] == pytest.approx(0, abs=1e-6)
    assert found.corpus["CIDEr"] == 0
    rouge = found.metrics["ROUGE_L"]
    assert isinstance(rouge, Scored)
    assert rouge.each.tolist() == [0, 1]  # the original compares two empty words


def test_only_results() -> None:
    with pytest.raises(UserError, match="1 of 3 pictures have no result: 74"):
        judge(REFERENCES, {42: "a cake", 73: "a street"}, names=PLAIN)
    found = judge(REFERENCES, {73: "a street", 42: "a cake"}, only_results=True, names=PLAIN)
    assert found.ids == [73, 42]
    part = {picture: REFERENCES[picture] for picture in (42, 73)}
    assert found.corpus["CIDEr"] == pytest.approx(judge(part, {73: "a street", 42: "a cake"}, names=PLAIN).corpus["CIDEr"])


def runs_of(words: list[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]


def plain_bleu(captions: list[list[str]], references: list[list[list[str]]], n: int) -> float:
    """BLEU by its definition, without guards against zero."""
    logs = 0.0
    for length in range(1, n + 1):
        right = total = 0
        for words, others in zip(captions, references, strict=True):
            runs = runs_of(words, length)
            total += len(runs)
            right += sum(min(runs.count(run), max(runs_of(o, length).count(run) for o in others)) for run in set(runs))
        logs += math.log(right / total) / n
    words_in_all = sum(map(len, captions))
    nearest = sum(min((abs(len(o) - len(c)), len(o)) for o in others)[1] for c, others in zip(captions, references, strict=True))
    return math.exp(logs + min(0, 1 - nearest / words_in_all))


def plain_common(one: Sequence[str], other: Sequence[str]) -> int:
    table = np.zeros((len(one) + 1, len(other) + 1), int)
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
    return int(table[-1, -1])


def plain_cider(captions: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """CIDEr-D by the formula of its paper."""
    values = []
    for words, others in zip(captions, references, strict=True):
        total = 0.0
        for length in range(1, 5):
            every = sorted({run for texts in references for text in [*texts, words] for run in runs_of(text, length)})
            df = np.array([sum(any(run in runs_of(t, length) for t in texts) for texts in references) for run in every])
            idf = np.log(len(references) / np.maximum(1, df))
            own = np.array([runs_of(words, length).count(run) for run in every]) * idf
            for other in others:
                its = np.array([runs_of(other, length).count(run) for run in every]) * idf
                norm = np.linalg.norm(own) * np.linalg.norm(its)
                if norm:
                    cosine = np.minimum(own, its) @ its / norm
                    total += cosine * math.exp(-((len(words) - len(other)) ** 2) / 72) / len(others)
        values.append(10 * total / 4)
    return values


@pytest.mark.parametrize("seed", range(3))
def test_a_plain_recomputation(seed: int) -> None:
    random = np.random.default_rng(seed)
    references = [
        [list(random.choice(list("abcdef"), random.integers(1, 9))) for _ in range(random.integers(1, 4))] for _ in range(7)
    ]
    captions = [list(random.choice(list("abcdefg"), random.integers(4, 9))) for _ in references]
    candidates, texts = [" ".join(words) for words in captions], [[" ".join(words) for words in own] for own in references]
    for n, found in enumerate(bleu(candidates, texts).scores[:2], 1):
        assert found.corpus == pytest.approx(plain_bleu(captions, references, n), rel=1e-6)
    np.testing.assert_allclose(cider(candidates, texts).each, plain_cider(captions, references), atol=1e-12)
    for words, others, value in zip(captions, references, rouge_l(candidates, texts).each, strict=True):
        precision = max(plain_common(words, other) / len(words) for other in others)
        recall = max(plain_common(words, other) / len(other) for other in others)
        wanted = 2.44 * precision * recall / (recall + 1.44 * precision) if precision else 0
        assert value == pytest.approx(wanted)


def test_the_longest_common_subsequence() -> None:
    assert common("abcd", "xacbd") == 3
    assert common([], ["a"]) == common(["a"], []) == 0
    random = np.random.default_rng(0)
    for _ in range(200):
        one, other = (list(random.choice(list("abc"), random.integers(1, 80))) for _ in range(2))
        assert common(one, other) == plain_common(one, other)


class Pipe:
    def __init__(self, text: bytes = b"") -> None:
        self.text, self.closed = text, False

    def read(self) -> bytes:
        return self.text

    def close(self) -> None:
        self.closed = True
        raise BrokenPipeError("nobody reads")


class Process:
    def __init__(self, said: bytes) -> None:
        self.stdin, self.stdout, self.stderr = Pipe(), Pipe(), Pipe(said)
        self.ended = 0

    def kill(self) -> None:
        self.ended += 1

    def wait(self) -> None:
        self.ended += 1


class Lock:
    def __init__(self) -> None:
        self.held = True

    def locked(self) -> bool:
        return self.held

    def release(self) -> None:
        self.held = False


Compute = Callable[[Any, Any], Any]


def install(monkeypatch: pytest.MonkeyPatch, name: str, compute: Compute, said: bytes = b"", file: str = "spice.py") -> list[Any]:
    """A stand-in for pycocoevalcap with a scorer of this name, and for Java. Returns the list of the scorers it made."""
    made: list[Any] = []

    class Scorer:
        def __init__(self) -> None:
            self.lock, self.meteor_p = Lock(), Process(said)
            made.append(self)

        def compute_score(self, references: Any, captions: Any) -> Any:
            return compute(references, captions)

    module = types.ModuleType(f"pycocoevalcap.{name.lower()}.{name.lower()}")
    setattr(module, name, Scorer)
    module.__file__ = file
    for part in ("pycocoevalcap", f"pycocoevalcap.{name.lower()}"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(shutil, "which", lambda program: f"/bin/{program}")
    return made


def test_meteor_by_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(references: Any, captions: Any) -> tuple[float, list[float]]:
        assert references == {0: ["a dog", "the  dog"], 1: ["a cat"]}  # three bars separate texts on their way to Java
        assert captions == {0: ["a dog"], 1: ["cat"]}
        return 0.5, [1.0, 0.25]

    made = install(monkeypatch, "Meteor", compute)
    found = meteor(["a dog", "cat"], [["a dog", "the ||| dog"], ["a cat"]])
    assert isinstance(found, Scored)
    assert (found.corpus, found.each.tolist()) == (0.5, [1.0, 0.25])
    [scorer] = made
    assert scorer.meteor_p.ended == 2
    assert not scorer.lock.held


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"", "METEOR was not computed: Java stopped, saying nothing."),
        (b"\nError: Could not find or load main class Meteor.\n\tat x", "Java stopped, saying: Error: Could not find or load"),
    ],
)
@pytest.mark.parametrize(
    "error", [BrokenPipeError("pipe"), ValueError("could not convert string to float: b''")], ids=["pipe", "value"]
)
def test_java_dies(monkeypatch: pytest.MonkeyPatch, said: bytes, reason: str, error: Exception) -> None:
    def compute(references: Any, captions: Any) -> Any:
        raise error

    made = install(monkeypatch, "Meteor", compute, said)
    found = meteor(["a dog"], [["a dog"]])
    assert isinstance(found, Absent)
    assert reason in found.reason
    assert made[0].meteor_p.ended == 3
    assert not made[0].lock.held, "the scorer's own end would wait for ever"


@pytest.mark.parametrize("each", [[1.0], [1.0, math.nan], [1.0, 1.0, 1.0]])
def test_numbers_that_are_none(monkeypatch: pytest.MonkeyPatch, each: list[float]) -> None:
    install(monkeypatch, "Meteor", lambda references, captions: (1.0, each))
    assert meteor(["a", "b"], [["a"], ["b"]]) == Absent(
        "METEOR was not computed: Java did not give a number for each of 2 captions."
    )


def test_spice_needs_files_that_it_would_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def compute(references: Any, captions: Any) -> Any:
        return 0.5, [{"All": {"f": 0.5}, "Color": {"f": math.nan}} for _ in captions]

    made = install(monkeypatch, "Spice", compute, file=str(tmp_path / "spice.py"))
    found = spice(["a"], [["a"]])
    assert isinstance(found, Absent)
    assert "stanford-corenlp-3.6.0.jar and stanford-corenlp-3.6.0-models.jar" in found.reason
    assert not made, "making the scorer downloads"
    (tmp_path / "lib").mkdir()
    for name in java_metrics.CORENLP:
        (tmp_path / "lib" / name).touch()
    found = spice(["a", "b"], [["a"], ["b"]])
    assert isinstance(found, Scored)
    assert found.each.tolist() == [0.5, 0.5]


def test_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    monkeypatch.setattr(shutil, "which", lambda program: f"/bin/{program}")
    found = judge(REFERENCES, CAPTIONS)
    assert list(found.metrics) == list(NAMES)
    assert found.corpus["METEOR"] is found.corpus["SPICE"] is None
    for name in ("METEOR", "SPICE"):
        metric = found.metrics[name]
        assert isinstance(metric, Absent)
        assert metric.reason == f"{name} needs pycocoevalcap, which is not installed. Install it with: pip install pycocoevalcap"
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert meteor(["a"], [["a"]]) == Absent("METEOR needs Java, and there is no java on the PATH.")


@pytest.mark.real_data
def test_fakecap() -> None:
    """The 1,000 results of coco-caption: the table of its notebook, and the digits in pycocoevalcap 1.2's README."""
    folder = Path(os.environ["BLIP_REAL_DATA"]) / "caption_eval/fakecap"
    references = read_captions(folder / "captions_val2014_refs1000.json")
    results = read_caption_results(folder / "captions_val2014_fakecap_results.json")
    found = judge(references, results, names=PLAIN).corpus
    digits = {
        "Bleu_1": 0.5793995754573356,
        "Bleu_2": 0.40439129741018104,
        "Bleu_3": 0.2785363856619147,
        "Bleu_4": 0.1908290437674253,
        "ROUGE_L": 0.39625269357570847,
        "CIDEr": 0.5997905185184199,
    }
    table = {"Bleu_1": "0.579", "Bleu_2": "0.404", "Bleu_3": "0.279", "Bleu_4": "0.191", "ROUGE_L": "0.396", "CIDEr": "0.600"}
    for name, figure in digits.items():
        assert found[name] == pytest.approx(figure, abs=1e-12), name  # measured: equal
        assert f"{found[name]:.3f}" == table[name]
