"""Sessions of decoders, word by word: what they say is what the PyTorch model says, whatever is kept and wherever.

Over all kinds and ways the largest difference of logits is 2e-6 of the largest logit, of T5 5.5e-6.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime import OrtValue

from models.errors import Misuse, UserError
from models.generation_spec import BEAMS, CROSS, SLOTS
from models.spec import BATCH, LENGTH
from runtime.bound import Bound, Value
from runtime.decoders import Decoder, open_decoder
from runtime.decoding import Steps
from runtime.graphs import Graphs, all_sizes, read_graphs
from runtime.session import Session, open_session
from tests.talkative import Batch, Truth, batch_for, talkative, vocabulary
from tests.tiny import GENERATORS

KINDS = tuple(GENERATORS)
WAYS = ("dynamic", "whole", "static")
CLOSE = 2e-5  # of the largest logit
SEQUENCES = 3  # of a prompt; as many as the static graphs take
GOING = ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 2, 3, 4], [0, 2, 3, 4], [2, 4], [2, 4], [4])  # prompts at each step
LANGUAGE_MODELS = ("opt", "opt-350m", "llama")  # which look at nothing beside the words
WORDS = {"text_ids", "text_atten_mask", "positions", "past_mask", "beam_index"}
DECODERS = {"caption": "text_decoder", "vqa": "text_decoder", "t5": "t5_decoder"}  # of fixed size; the others' is llm_decode


@pytest.fixture(scope="module")
def folder(generator_graphs: Callable[[str, str], Path]) -> Callable[[str, str], Graphs]:
    return cache(lambda kind, target: read_graphs(generator_graphs(kind, target)))


@pytest.fixture(scope="module")
def decoder(folder: Callable[[str, str], Graphs]) -> Callable[[str, str], Decoder]:
    @cache
    def opened(kind: str, way: str) -> Decoder:
        graphs = folder(kind, "atc" if way == "static" else "ort")
        return open_decoder(graphs, "cpu", 1, use_past=way != "whole")

    return opened


@pytest.fixture(scope="module")
def truth() -> Callable[[str], tuple[Batch, Truth]]:
    @cache
    def of(kind: str) -> tuple[Batch, Truth]:
        model = talkative(kind)
        batch = batch_for(model)
        return batch, Truth(model, batch)

    return of


def begun(decoder: Decoder, batch: Batch, attend_padding: bool = False) -> Steps:
    """Nothing but the steps is left of what they were made from."""
    steps = decoder.begin(decoder.look(batch.pictures), batch.picture, batch.ids, batch.mask, attend_padding)
    gc.collect()
    return steps


class Walk:
    """Words drawn at random, each in a sequence that goes on from another one of its prompt, while prompts end."""

    def __init__(self, steps: Steps, vocab: int, seed: int = 2) -> None:
        self.steps, self.vocab, self.random = steps, vocab, np.random.default_rng(seed)
        self.texts: dict[int, list[list[int]]] = {}

    def start(self) -> np.ndarray:
        found = self.steps.start()
        self.texts = {prompt: [[]] for prompt in range(len(found))}
        return found[:, None]

    def step(self, going: list[int], sequences: int = SEQUENCES) -> np.ndarray:
        """Logits (B, M, V)."""
        before = list(self.texts)
        rows = len(self.texts[before[0]])
        chosen = self.random.integers(0, rows, (len(going), sequences))
        words = self.random.integers(1, self.vocab, chosen.shape)
        parents = np.array([[before.index(prompt)] for prompt in going]) * rows + chosen
        self.texts = {
            prompt: [[*self.texts[prompt][m], word] for m, word in zip(chosen[b], words[b].tolist(), strict=True)]
            for b, prompt in enumerate(going)
        }
        return self.steps.step(words, parents, np.array(going))

    def compare(self, found: np.ndarray, truth: Truth) -> float:
        """The largest difference, over the largest logit."""
        wanted = np.array([[truth.logits(prompt, text) for text in texts] for prompt, texts in self.texts.items()])
        assert found.shape == wanted.shape
        assert found.dtype == np.float32
        return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_word_by_word(
    decoder: Callable[[str, str], Decoder], truth: Callable[[str], tuple[Batch, Truth]], kind: str, way: str
) -> None:
    """Beams are sorted and prompts dropped as the search does it; the rows of the pictures are not in order."""
    batch, wanted = truth(kind)
    walk = Walk(begun(decoder(kind, way), batch), vocabulary(wanted.model))
    assert walk.compare(walk.start(), wanted) <= CLOSE
    for going in GOING:
        assert walk.compare(walk.step(going), wanted) <= CLOSE


def test_a_wrong_parent_is_seen(decoder: Callable[[str, str], Decoder], truth: Callable[[str], tuple[Batch, Truth]]) -> None:
    """The check can fail: a sequence that goes on from its neighbour says something else."""
    batch, wanted = truth("opt")
    walk = Walk(begun(decoder("opt", "dynamic"), batch), vocabulary(wanted.model))
    walk.start()
    walk.step(GOING[0])
    found = walk.step(GOING[0])
    walk.texts[0] = walk.texts[0][::-1]
    assert walk.compare(found, wanted) > 100 * CLOSE


def test_fewer_sequences_later(decoder: Callable[[str, str], Decoder], truth: Callable[[str], tuple[Batch, Truth]]) -> None:
    """Answers that are ranked end at unequal length: there are fewer rows from step to step."""
    batch, wanted = truth("vqa")
    for way in WAYS:
        walk = Walk(begun(decoder("vqa", way), batch), vocabulary(wanted.model))
        walk.start()
        for going, sequences in zip(GOING, (3, 3, 2, 2, 1, 1, 1), strict=True):
            assert walk.compare(walk.step(going, sequences), wanted) <= CLOSE


@pytest.mark.parametrize("way", WAYS)
def test_padding_of_questions(decoder: Callable[[str, str], Decoder], way: str) -> None:
    """As the original looks at it; that which a graph with fixed axes adds is not looked at."""
    model = talkative("vqa")
    batch = batch_for(model)
    looking, not_looking = Truth(model, batch, attend_padding=True), Truth(model, batch)
    walk = Walk(begun(decoder("vqa", way), batch, attend_padding=True), vocabulary(model))
    found = walk.start().copy()
    assert walk.compare(found, looking) <= CLOSE
    assert walk.compare(found, not_looking) > 100 * CLOSE
    assert walk.compare(walk.step(GOING[0]), looking) <= CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_words_crosses_over(
    decoder: Callable[[str, str], Decoder],
    truth: Callable[[str], tuple[Batch, Truth]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """What a run gives is what the next one is fed; what is looked at is fed again only when prompts end."""
    batch, wanted = truth(kind)
    walk = Walk(begun(decoder(kind, "dynamic"), batch), vocabulary(wanted.model))
    walk.start()
    fed: dict[str, Value] = {}
    gave: list[OrtValue] = []
    real_feed, real_run = Bound.feed, Bound.run

    def feed(self: Bound, feeds: dict[str, Value]) -> None:
        fed.update(feeds)
        real_feed(self, feeds)

    def run(self: Bound) -> list[OrtValue]:
        gave[:] = real_run(self)
        return gave

    monkeypatch.setattr(Bound, "feed", feed)
    monkeypatch.setattr(Bound, "run", run)
    for going, ended in zip(GOING, (False, False, True, False, True, False, True), strict=True):
        before = {id(value) for value in gave}
        fed.clear()
        walk.step(going)
        past = {name: value for name, value in fed.items() if name.startswith("past.")}
        assert before in (set(), {id(value) for value in past.values()})
        arrays = {name: value for name, value in fed.items() if isinstance(value, np.ndarray) and name != "llm_prompt"}
        assert {name for name in arrays if name not in ("cross_mask", "prompt_mask")} == WORDS
        assert all(array.dtype == np.int64 for array in arrays.values())
        assert all(len(array.reshape(-1)) == len(going) * SEQUENCES for array in (fed["text_ids"], fed["beam_index"]))
        assert any(name.startswith(("cross_", "prompt_")) for name in fed) == ended


@pytest.mark.parametrize("kind", KINDS)
def test_static_runs(
    folder: Callable[[str, str], Graphs],
    truth: Callable[[str], tuple[Batch, Truth]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """As many as hold the prompts that are still going, and no more."""
    graphs = folder(kind, "atc")
    batch, wanted = truth(kind)
    walk = Walk(begun(open_decoder(graphs, "cpu", 1), batch), vocabulary(wanted.model))
    walk.start()
    runs: list[str] = []
    real = Session.run

    def run(self: Session, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        runs.append(self.spec.name)
        return real(self, **feeds)

    monkeypatch.setattr(Session, "run", run)
    for going, wanted_runs in zip(GOING, (3, 3, 2, 2, 1, 1, 1), strict=True):
        runs.clear()
        walk.step(going)
        assert len(runs) == wanted_runs


@pytest.mark.parametrize("kind", KINDS)
def test_room(decoder: Callable[[str, str], Decoder], folder: Callable[[str, str], Graphs], kind: str) -> None:
    """As many new words as the buffer has slots for, but for the first word, which is read by nobody before it is said, and
    the last, which is not read at all. That a text can be as long, and not longer, is in test_generation."""
    static = decoder(kind, "static")
    slots = all_sizes(folder(kind, "atc"), DECODERS.get(kind, "llm_decode"))[SLOTS]
    taken = 1 if kind in ("vqa", "t5") else 5 + (6 if kind in LANGUAGE_MODELS else 0)
    assert static.room(5) == slots - taken + 2
    assert static.capacity == static.room(8)
    assert decoder(kind, "dynamic").capacity is None
    assert decoder(kind, "dynamic").room(5) is None


def test_all_sizes(folder: Callable[[str, str], Graphs]) -> None:
    sizes = all_sizes(folder("vqa", "atc"), "text_decoder")
    assert sizes == {BATCH: 2, BEAMS: 3, SLOTS: 31, CROSS: 8}
    assert all_sizes(folder("t5", "atc"), "t5_encoder") == {BATCH: 2, LENGTH: 8}
    assert all_sizes(folder("vqa", "ort"), "text_decoder") == {}


def test_padding_is_cut_from_sums_of_axes(folder: Callable[[str, str], Graphs]) -> None:
    """What T5 has read is as long as queries and text together."""
    batch = batch_for(talkative("t5"))
    found = []
    for target in ("ort", "atc"):
        session = open_session(folder("t5", target), "t5_encoder")
        feeds = {"text_ids": batch.ids[:1], "text_atten_mask": batch.mask[:1]}
        found.append(session.run(llm_prompt=np.ones((1, 6, 56), np.float32), **feeds))
    dynamic, static = np.stack(list(found[0].values()), axis=1), found[1]["cross_kv"]
    assert static.shape == (1, 4, 6, 6 + batch.ids.shape[1], 8)
    np.testing.assert_allclose(static, dynamic, rtol=0, atol=CLOSE * np.abs(dynamic).max())


@pytest.mark.parametrize("kind", ["opt", "vqa", "t5"])
def test_a_prompt_that_the_graphs_do_not_hold(decoder: Callable[[str, str], Decoder], kind: str) -> None:
    model = talkative(kind)
    batch = batch_for(model, longest=9)
    with pytest.raises(UserError) as error:
        begun(decoder(kind, "static"), batch).start()
    graph = {"opt": "llm_prefill", "vqa": "question_encoder", "t5": "t5_encoder"}[kind]
    assert error.value.message == (
        f"A prompt has 9 tokens, {graph} was exported for 8. Shorten it, or export the graphs with --length 9."
    )
    begun(decoder(kind, "dynamic"), batch).start()


@pytest.mark.parametrize("way", WAYS)
def test_prompts_without_a_token(decoder: Callable[[str, str], Decoder], way: str) -> None:
    """After the queries alone: all of them, or none. Padding at the end would be what the first word follows."""
    model = talkative("llama")
    batch = batch_for(model)
    mask = batch.mask * np.array([[1], [1], [0], [1], [1]])
    with pytest.raises(UserError, match=r"^A prompt has no token, and the decoder goes on from the last one\."):
        begun(decoder("llama", way), Batch(batch.pictures, batch.picture, batch.ids, mask))
    empty = Batch(batch.pictures, batch.picture, batch.ids[:, :0], batch.mask[:, :0])
    if way == "static":
        with pytest.raises(UserError, match="has no token"):
            begun(decoder("llama", way), empty)
        return
    walk, wanted = Walk(begun(decoder("llama", way), empty), vocabulary(model)), Truth(model, empty)
    assert walk.compare(walk.start(), wanted) <= CLOSE
    for going in GOING[:3]:
        assert walk.compare(walk.step(going), wanted) <= CLOSE


def test_a_prompt_beyond_the_buffer(decoder: Callable[[str, str], Decoder]) -> None:
    """A caption's prompt is read into the buffer, word by word."""
    model = talkative("caption")
    batch = batch_for(model, longest=40)  # 38 slots, and the word that is read
    with pytest.raises(UserError, match=r"buffer of text_decoder is full: it was exported for 38 words\..*--slots"):
        begun(decoder("caption", "static"), batch).start()
    shorter = Batch(batch.pictures, batch.picture, batch.ids[:, 1:], batch.mask[:, 1:])
    assert np.isfinite(begun(decoder("caption", "static"), shorter).start()).all()


def test_more_sequences_than_the_graph_takes(
    decoder: Callable[[str, str], Decoder], truth: Callable[[str], tuple[Batch, Truth]]
) -> None:
    walk = Walk(begun(decoder("caption", "static"), truth("caption")[0]), 20)
    walk.start()
    with pytest.raises(UserError, match=r"text_decoder was exported for 3 sequences of a prompt, asked were 4\. .*--beams 4"):
        walk.step(GOING[0], 4)
    # A language model's are rows of its batch: any number.
    model = talkative("opt")
    batch = batch_for(model)
    walk = Walk(begun(decoder("opt", "static"), batch), vocabulary(model))
    walk.start()
    for _ in range(2):
        assert walk.compare(walk.step(GOING[0], 4), Truth(model, batch)) <= CLOSE


def test_what_cannot_be_opened(folder: Callable[[str, str], Graphs], ort_graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(Misuse, match=r"fixed buffers, which need the past\. Leave --use-past false out\.$"):
        open_decoder(folder("opt", "atc"), "cpu", 1, use_past=False)
    with pytest.raises(UserError, match=r"which writes no words\. Export a captioner"):
        open_decoder(read_graphs(ort_graphs), "cpu", 1)
    graphs = changed(folder("opt", "ort"), tmp_path, lambda content: content["graphs"].pop("llm"))
    with pytest.raises(UserError, match=r"has no graph 'llm'\. Export it: blip-export --graphs image_feat,qformer,llm \.\.\.$"):
        open_decoder(read_graphs(graphs), "cpu", 1)


def changed(graphs: Graphs, tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a folder whose manifest was changed."""
    copy = tmp_path / "graphs"
    shutil.copytree(graphs.source.folder, copy)
    content = json.loads((copy / "manifest.json").read_text("utf-8"))
    change(content)
    (copy / "manifest.json").write_text(json.dumps(content), "utf-8")
    return copy


@pytest.mark.parametrize(
    ("graph", "side", "name", "axis", "size"),
    [
        ("text_decoder", "inputs", "past", 0, 7),  # B * M
        ("text_decoder", "inputs", "past", 3, 30),  # S, which past_mask has too
        ("text_decoder", "inputs", "cross_mask", 1, 9),  # C
        ("text_decoder", "outputs", "present", 0, 5),
        ("text_decoder", "outputs", "present", 3, 2),
        ("text_decoder", "inputs", "text_ids", 1, 2),  # M
    ],
)
def test_sizes_that_contradict_each_other(
    folder: Callable[[str, str], Graphs], tmp_path: Path, graph: str, side: str, name: str, axis: int, size: int
) -> None:
    def change(content: dict[str, Any]) -> None:
        (tensor,) = (tensor for tensor in content["graphs"][graph][side] if tensor["name"] == name)
        assert tensor["shape"][axis] != size
        tensor["shape"][axis] = size

    with pytest.raises(UserError, match=rf"The graph '{graph}' in .* has other inputs or outputs than this release expects"):
        read_graphs(changed(folder("vqa", "atc"), tmp_path, change))


@pytest.mark.parametrize(("kind", "target"), [("vqa", "ort"), ("vqa", "atc"), ("t5", "ort")])
def test_the_other_target(folder: Callable[[str, str], Graphs], tmp_path: Path, kind: str, target: str) -> None:
    """A manifest that says the other form of the graphs."""
    other = {"ort": "atc", "atc": "ort"}[target]
    with pytest.raises(UserError, match=r"has other inputs or outputs than this release expects"):
        read_graphs(changed(folder(kind, target), tmp_path, lambda content: content.update(target=other)))


def test_a_vocabulary_in_several_files(folder: Callable[[str, str], Graphs], tmp_path: Path) -> None:
    graphs = folder("opt", "ort")
    assert graphs.tokenizer == graphs.source.folder / "tokenizer" / "vocab.json"
    without = changed(graphs, tmp_path, lambda content: content["files"].pop("tokenizer/merges.txt"))
    with pytest.raises(UserError, match=r"does not list its own file 'tokenizer/merges.txt'"):
        read_graphs(without)


@pytest.mark.parametrize(("kind", "graph"), [("caption", "text_decoder"), ("llama", "llm"), ("t5", "t5_encoder")])
def test_what_the_engine_does_not_take(decoder: Callable[[str, str], Decoder], kind: str, graph: str) -> None:
    """A word outside of the vocabulary, and words of another dtype: one sentence of the engine's."""
    batch = batch_for(talkative(kind))
    for ids in (np.where(batch.mask > 0, 10**6, 0), batch.ids.astype(np.float32)):
        with pytest.raises(UserError, match=rf"^{graph} failed in ONNX Runtime: .*\.$") as error:
            begun(decoder(kind, "dynamic"), Batch(batch.pictures, batch.picture, ids, batch.mask)).start()
        assert "\n" not in error.value.message
