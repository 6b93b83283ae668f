"""Both forms of a decoder say the same, step by step: the one that takes what came before, and the one with a buffer.

Both are fed the same: prompts of unequal length, then words that are drawn, each in a sequence that goes on from another one.
The buffer is kept here as a run would keep it: new keys and values into the next slot, rows in the order of their parents. It
goes on until the last slot is filled, and one word further, when the buffer is full.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from models import manifest
from models.generation_spec import PROMPT_KV, PROMPT_MASK, layer_names
from tests.generators import VOCABULARIES

Arrays = dict[str, np.ndarray]

PROMPTS, BEAMS, LENGTH = 2, 3, 8  # as tests.generators.STATIC
ROWS = PROMPTS * BEAMS
LEFT = (np.arange(LENGTH) >= np.array([[0], [3]])).astype(np.int64)  # the mask of prompts padded on the left
RIGHT = LEFT[:, ::-1].copy()  # of texts that an encoder reads
# Of the largest value. Over all steps the logits, keys and values of both forms differ by 3e-6 at most; those of T5, whose scores
# are not scaled and multiply what is rounded, by 2.4e-5. In float64 T5's differ by 4e-15.
CLOSE, CLOSE_OF_T5 = 1e-5, 1e-4


class Folder:
    """The graphs of one kind in one form."""

    def __init__(self, path: Path) -> None:
        self.path, self.content = path, manifest.read(path, "graphs").content
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}

    def run(self, name: str, feeds: Arrays) -> Arrays:
        """Takes of `feeds` what the graph wants."""
        if name not in self.sessions:
            file = str(self.path / f"{name}.onnx")
            self.sessions[name] = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        session = self.sessions[name]
        outputs = [value.name for value in session.get_outputs()]
        found = session.run(outputs, {value.name: feeds[value.name] for value in session.get_inputs()})
        return dict(zip(outputs, found, strict=True))

    def shape(self, graph: str, name: str) -> list[int]:
        """Of an input."""
        (found,) = (t["shape"] for t in self.content["graphs"][graph]["inputs"] if t["name"] == name)
        return list(found)


class Buffer:
    """(N, 2 * layers, H, S, K). What is not filled yet is no zero: nothing may depend on it."""

    def __init__(self, shape: list[int]) -> None:
        self.kept = 5 * np.random.default_rng(5).normal(size=shape).astype(np.float32)
        self.mask, self.filled = np.zeros((shape[0], shape[3]), np.int64), 0

    def write(self, new: np.ndarray, seen: np.ndarray) -> None:
        """Keys and values (N, 2 * layers, H, L, K) of L places, of which `seen` (N, L) is no padding."""
        places = slice(self.filled, self.filled + new.shape[3])
        self.kept[:, :, :, places], self.mask[:, places] = new, seen
        self.filled += new.shape[3]

    def reorder(self, parents: np.ndarray) -> None:
        self.kept, self.mask = self.kept[parents], self.mask[parents]


class Both:
    """A decoder in both forms."""

    def __init__(self, kind: str, dynamic: Folder, static: Folder) -> None:
        self.kind, self.dynamic, self.static, self.worst = kind, dynamic, static, 0.0
        self.looks = kind not in ("opt", "opt-350m", "llama")  # at what was read; else the picture stands before the words
        self.names = ("llm", "llm_decode") if not self.looks else ("t5_decoder" if kind == "t5" else "text_decoder",) * 2
        self.buffer = Buffer(static.shape(self.names[1], "past"))
        random = np.random.default_rng(1)
        self.pictures = random.normal(size=(PROMPTS, 3, 32, 32)).astype(np.float32)
        self.ids = random.integers(1, VOCABULARIES.get(kind, 32), (PROMPTS, LENGTH))
        self.seen = (self.look(dynamic), self.look(static))
        if self.looks:
            self.compare(self.seen[1]["cross_kv"], stacked(self.seen[0], "cross_kv"))

    def look(self, folder: Folder) -> Arrays:
        """What the decoder looks at: the picture, the question beside it, or what T5 has read."""
        found = folder.run("image_feat", {"input_image": self.pictures})
        if self.kind == "caption":
            return found | folder.run("image_kv", found)
        text = {"text_ids": self.ids * RIGHT, "text_atten_mask": RIGHT}
        if self.kind == "vqa":
            return folder.run("question_encoder", found | text) | {"cross_mask": RIGHT}
        found = folder.run("qformer", found)
        if self.kind != "t5":
            return found
        queries = np.ones(found["llm_prompt"].shape[:2], np.int64)
        return folder.run("t5_encoder", found | text) | {"cross_mask": np.concatenate([queries, RIGHT], axis=1)}

    def begin(self) -> None:
        """Read the prompt: at once, and word by word or, where there is a graph for it, at once too. T5's is never padded."""
        mask = np.ones_like(LEFT) if self.kind == "t5" else LEFT
        ids, places = self.ids * mask, np.maximum(mask.cumsum(1) - 1, 0)
        queries = self.seen[0]["llm_prompt"].shape[1] if not self.looks else 0
        text = {"text_ids": ids, "text_atten_mask": mask, "positions": places + queries}
        past = self.nothing("past", 1)
        one = {name: value[:, None] for name, value in text.items()}
        if not self.looks:
            one |= {"llm_prompt": self.seen[0]["llm_prompt"][:, None], PROMPT_MASK: np.zeros((PROMPTS, 0), np.int64)}
            one |= self.nothing(PROMPT_KV, PROMPTS)
        nothing = {"past_mask": one["text_ids"][..., :0], "beam_index": np.zeros(one["text_ids"].shape[:-1], np.int64)}
        found = self.dynamic.run(self.names[0], self.seen[0] | one | nothing | past)
        self.past, self.mask = found, np.concatenate([np.ones((PROMPTS, queries), np.int64), mask], axis=1)
        self.shared: Arrays = {}
        if not self.looks:  # what was kept of the prompt is shared, and rows of the past begin after it
            kept = {name.replace("present", PROMPT_KV): value for name, value in found.items() if name != "logits"}
            none = np.zeros((PROMPTS, BEAMS, 0, self.dynamic.shape(self.names[0], "llm_prompt")[-1]), np.float32)
            self.shared = kept | {PROMPT_MASK: self.mask, "llm_prompt": none}
            self.past = {name.replace("past", "present"): value for name, value in self.nothing("past", PROMPTS).items()}
        logits = found["logits"].reshape(PROMPTS, -1)
        if not self.looks:
            first = self.static.run("llm_prefill", self.seen[1] | text)
            self.compare(first["logits"], logits)
            counts = self.mask[:, None, None, :, None]
            self.compare(first["present"] * counts, stacked(found, "present") * counts)
            self.buffer.write(first["present"].repeat(BEAMS, axis=0), self.mask.repeat(BEAMS, axis=0))
            return
        for n in range(LENGTH):
            word = {"text_ids": ids[:, n], "positions": places[:, n]}
            said = self.say({name: value.repeat(BEAMS) for name, value in word.items()}, mask[:, n].repeat(BEAMS))
        self.compare(said, logits.repeat(BEAMS, axis=0))
        counts = self.buffer.mask[:, None, None, :LENGTH, None]
        wanted = stacked(found, "present").repeat(BEAMS, axis=0)
        self.compare(self.buffer.kept[:, :, :, :LENGTH] * counts, wanted * counts)

    def step(self, ids: np.ndarray, parents: np.ndarray) -> None:
        """Words (N,), each after row `parents` (N,) of the call before."""
        places = self.mask[parents].sum(axis=1)
        word = {"text_ids": ids, "positions": places}
        shared = 0 if self.looks else self.shared[PROMPT_MASK].shape[1]
        rows = {"beam_index": parents, "past_mask": self.mask[parents, shared:], "text_atten_mask": np.ones((ROWS, 1), np.int64)}
        rows |= {name: value[:, None] for name, value in word.items()}
        rows = {name: value.reshape(PROMPTS, BEAMS, *value.shape[1:]) for name, value in rows.items()}
        past = {f"past{name.removeprefix('present')}": value for name, value in self.past.items() if name != "logits"}
        found = self.dynamic.run(self.names[0], self.seen[0] | rows | past | self.shared)
        self.past, self.mask = found, np.concatenate([self.mask[parents], np.ones((ROWS, 1), np.int64)], axis=1)
        if len(set(parents)) > PROMPTS:  # in the first step the buffer has the rows already
            self.buffer.reorder(parents)
        self.compare(self.say(word, np.ones(ROWS, np.int64)), found["logits"].reshape(ROWS, -1))
        self.compare(self.new, stacked(found, "present")[:, :, :, -1:])

    def nothing(self, prefix: str, rows: int) -> Arrays:
        """Keys and values of no words."""
        names = layer_names(prefix, self.buffer.kept.shape[1] // 2)
        shapes = [self.dynamic.shape(self.names[0], name) for name in names]
        return {n: np.zeros((rows, shape[1], 0, shape[3]), np.float32) for n, shape in zip(names, shapes, strict=True)}

    def say(self, word: Arrays, seen: np.ndarray) -> np.ndarray:
        """A word in every row of the static form, kept in the buffer if there is room: logits (N, V)."""
        lead = (PROMPTS, BEAMS) if self.looks else (ROWS,)
        rows = {name: value.reshape(*lead, 1) for name, value in word.items()}
        rows |= {"past_mask": self.buffer.mask.reshape(*lead, -1), "past": self.buffer.kept}
        found = self.static.run(self.names[1], self.seen[1] | rows)
        self.new = found["present"]
        if self.buffer.filled < self.buffer.mask.shape[1]:
            self.buffer.write(self.new, seen[:, None])
        return found["logits"].reshape(ROWS, -1)

    def compare(self, found: np.ndarray, wanted: np.ndarray) -> None:
        assert found.shape == wanted.shape
        difference = float(np.abs(found - wanted).max() / np.abs(wanted).max())
        self.worst = max(self.worst, difference)
        assert difference <= (CLOSE_OF_T5 if self.kind == "t5" else CLOSE)


def stacked(tensors: Arrays, prefix: str) -> np.ndarray:
    """The tensors of all layers in one: (N, 2 * layers, H, L, K)."""
    layers = sum(name.startswith(f"{prefix}.") for name in tensors) // 2
    return np.stack([tensors[name] for name in layer_names(prefix, layers)], axis=1)


def parents(random: np.random.Generator) -> np.ndarray:
    """A row of the same prompt for each sequence, some of them twice (N,)."""
    return (random.integers(0, BEAMS, (PROMPTS, BEAMS)) + BEAMS * np.arange(PROMPTS)[:, None]).ravel()


def until_full(both: Both) -> int:
    """Read the prompt, say drawn words until every slot is filled, and one more; returns how many."""
    both.begin()
    random, steps, slots = np.random.default_rng(2), 0, both.buffer.mask.shape[1]
    while both.buffer.filled < slots:
        before = parents(random) if steps else np.arange(PROMPTS).repeat(BEAMS)
        both.step(random.integers(1, 32, ROWS), before)
        steps += 1
    assert both.buffer.filled == slots
    both.step(random.integers(1, 32, ROWS), parents(random))
    return steps + 1


@pytest.mark.parametrize("kind", ["caption", "vqa", "opt", "llama", "t5"])
def test_both_forms_agree(generator_graphs: Callable[[str, str], Path], kind: str) -> None:
    both = Both(kind, Folder(generator_graphs(kind, "ort")), Folder(generator_graphs(kind, "atc")))
    assert until_full(both) > 20


def not_reordered(buffer: Buffer, parents: np.ndarray) -> None:
    """What came before stays where it was."""


def not_masked(buffer: Buffer, parents: np.ndarray) -> None:
    buffer.kept, buffer.mask = buffer.kept[parents], np.ones_like(buffer.mask)


@pytest.mark.parametrize("wrong", [not_reordered, not_masked])
def test_a_wrong_buffer_is_seen(
    generator_graphs: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Buffer, np.ndarray], None]
) -> None:
    both = Both("caption", Folder(generator_graphs("caption", "ort")), Folder(generator_graphs("caption", "atc")))
    monkeypatch.setattr(Buffer, "reorder", wrong)
    with pytest.raises(AssertionError):
        until_full(both)
    assert both.worst > 100 * CLOSE
