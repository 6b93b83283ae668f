"""training/decoder.py: the words of transformers and of an independent search, from the same weights.

Prompts of unequal length in one batch, two of them about one picture; texts vary, and end at different steps.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch

from models.blip2_llm import Blip2Llm
from models.fit import Generator
from models.stored import compute_in_float32
from runtime.decode import ORIGINAL, ORIGINAL_BLIP, TRANSFORMERS, Generated, Steps, generate
from tests import independent_llm
from tests.talkative import Batch, Truth, batch_for, first_word, talkative
from tests.test_generation import ASKED, FIRST, KINDS, STOP, Heard, assert_worth_comparing, options_of, packed, searched, words_of
from tests.their_texts import PAD, Asked, generated, image_token, their_model
from training.decoder import begin, look

LOGITS = 1e-4  # of logits up to 11; measured: up to 9e-6
CASES = {name: ASKED[name] for name in ("greedy", "beams 3", "beams 5, penalty")}


@cache
def spoken(kind: str) -> tuple[Generator, Batch]:
    model = talkative(kind)
    return model, batch_for(model)


def begun(model: Generator, batch: Batch) -> Steps:
    seen = look(model, torch.from_numpy(batch.pictures))[torch.from_numpy(batch.picture)]
    return begin(model, seen, batch.ids, batch.mask, first_word(model))


def counted(kind: str, model: Generator, batch: Batch) -> np.ndarray:
    """What is in the input_ids of transformers, whose padding counts for a language model, but not for BLIP."""
    if kind == "caption":
        return np.where(batch.mask > 0, batch.ids, -1)
    if kind in ("opt", "llama"):
        queries = np.full((len(batch.ids), model.cfg.qformer.queries), image_token(model.cfg))
        return np.concatenate([queries, np.where(batch.mask > 0, batch.ids, PAD)], axis=1)
    return np.full((len(batch.ids), 1), first_word(model))


def without_padding(kind: str, batch: Batch) -> list[Batch]:
    """transformers looks at the padding of questions, which is not looked at here: they are asked by themselves."""
    if kind != "vqa":
        return [batch]
    rows = ((slice(n, n + 1), kept > 0) for n, kept in enumerate(batch.mask))
    return [Batch(batch.pictures, batch.picture[n], batch.ids[n][:, kept], batch.mask[n][:, kept]) for n, kept in rows]


def said(kind: str, asked: Asked, steps: Any = begun) -> list[list[Generated]]:
    model, batch = spoken(kind)
    before = counted(kind, model, batch)
    return generate(steps(model, batch), before, (STOP[kind],), options_of(asked, before.shape[1], TRANSFORMERS))


@pytest.mark.parametrize("named", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers(kind: str, named: str) -> None:
    (model, batch), asked = spoken(kind), CASES[named]
    theirs = their_model(model, STOP[kind])
    wanted = [text for part in without_padding(kind, batch) for text in generated(theirs, model, part, STOP[kind], asked).texts]
    assert_worth_comparing(wanted)
    assert words_of(said(kind, asked)) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_the_original(kind: str) -> None:
    """An independent beam search over the model without caches, each prompt by itself; the penalties of LAVIS."""
    (model, batch), asked = spoken(kind), Asked(beams=3, number=2, least=6, length=-0.5, repetition=1.15)
    truth = Truth(model, batch)
    rule, version = (ORIGINAL_BLIP, "4.15") if kind in ("caption", "vqa") else (ORIGINAL, "4.33")
    before = np.where(batch.mask > 0, batch.ids, -1) if kind == "caption" else np.full((len(batch.ids), 1), FIRST[kind])
    for n in range(len(batch.ids)) if kind == "caption" else [None]:  # a captioner's prompt counts for the length
        rows, kept = (slice(None), slice(None)) if n is None else (slice(n, n + 1), batch.mask[n] > 0)
        part = Batch(batch.pictures, batch.picture[rows], batch.ids[rows][:, kept], batch.mask[rows][:, kept])
        own = before[rows] if n is None else part.ids
        options = options_of(asked, own.shape[1], rule)
        texts = generate(begun(model, part), own, (STOP[kind],), options)
        numbers = range(len(batch.ids)) if n is None else [n]
        for number, found, ids in zip(numbers, texts, own.tolist(), strict=True):
            wanted = searched(partial(truth.logits, number), ids, STOP[kind], options, version)
            assert [text.ids for text in found] == [tuple(text.ids) for text in wanted]


@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind: str) -> None:
    """Of every step, those of the model without caches."""
    model, batch = spoken(kind)
    truth = Truth(model, batch)
    before = counted(kind, model, batch)
    heard = Heard(begun(model, batch), len(batch.ids))
    texts = generate(heard, before, (STOP[kind],), options_of(Asked(new=10), before.shape[1], TRANSFORMERS))
    assert len({len(text.ids) for (text,) in texts}) > 1
    for number, (text,) in enumerate(texts):
        for step, logits in enumerate(heard.logits[: len(text.ids) + text.stopped]):
            wanted = truth.logits(number, text.ids[:step])
            np.testing.assert_allclose(logits[number], wanted, rtol=0, atol=LOGITS)


def test_baichuan() -> None:
    """LLaMA's model is Baichuan's, written a second time in float64."""
    model, batch = spoken("llama")
    assert isinstance(model, Blip2Llm)
    weights = packed({name: tensor.numpy() for name, tensor in model.llm_model.state_dict().items()})
    queries = look(model, torch.from_numpy(batch.pictures))[torch.from_numpy(batch.picture)].numpy()  # (N, Q, E)
    for number, (text,) in enumerate(said("llama", Asked(new=6))):
        ids, new = batch.ids[number][batch.mask[number] > 0].tolist(), (*text.ids, STOP["llama"])[:6]
        for step, word in enumerate(new):
            logits = independent_llm.next_word(weights, queries[number], [*ids, *new[:step]], model.cfg.text.heads)
            assert logits.argmax() == word


class Mistaken:
    """Steps that go on from each prompt's first row, or from the first prompts, whatever is asked."""

    def __init__(self, steps: Steps, rows: bool) -> None:
        self._steps, self._rows, self.start = steps, rows, steps.start
        self._count = 1  # rows of a prompt in the call before

    def step(self, ids: np.ndarray, parents: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        if self._rows:
            parents = parents // self._count * self._count
        self._count = ids.shape[1]
        return self._steps.step(ids, parents, prompts if self._rows else np.arange(len(prompts)))


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "prompts"])
@pytest.mark.parametrize("kind", ["caption", "opt", "t5"])
def test_what_rows_go_on_from_is_seen(kind: str, rows: bool) -> None:
    """The checks above would notice beams that are not sorted, and prompts that ended and are not left out."""
    asked = CASES["beams 3" if rows else "greedy"]
    wrong = said(kind, asked, lambda model, batch: Mistaken(begun(model, batch), rows))
    assert words_of(wrong) != words_of(said(kind, asked))


def test_prompts_without_a_word() -> None:
    """A language model then goes on from the queries."""
    model, batch = spoken("opt")
    nothing = Batch(batch.pictures, batch.picture, batch.ids[:, :0], batch.mask[:, :0])
    before = np.full((len(batch.ids), 1), FIRST["opt"])
    texts = generate(begun(model, nothing), before, (STOP["opt"],), options_of(Asked(new=5), 1, ORIGINAL))
    truth = Truth(model, nothing)
    for number, (text,) in enumerate(texts):
        for step, word in enumerate(text.ids):
            assert truth.logits(number, text.ids[:step]).argmax() == word


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind: str) -> None:
    """Logits stay float32 and near, and caches are bfloat16. Measured: up to 0.07 of the largest logit (T5)."""
    model, batch = spoken(kind)
    before = counted(kind, model, batch)
    options = options_of(Asked(new=3, least=3), before.shape[1], TRANSFORMERS)
    exact = Heard(begun(model, batch), len(batch.ids))
    generate(exact, before, (STOP[kind],), options)
    with torch.autocast("cpu", torch.bfloat16):
        steps = begun(model, batch)
        near = Heard(steps, len(batch.ids))
        generate(near, before, (STOP[kind],), options)
    assert all(logits.dtype == np.float32 for logits in near.logits)
    assert torch.bfloat16 in {values.dtype for _, values in steps._past}  # type: ignore[attr-defined]
    assert 0 < np.abs(near.logits[0] - exact.logits[0]).max() < 0.2 * np.abs(exact.logits[0]).max()


def test_a_language_model_in_half_precision() -> None:
    """It is widened while it runs: the words are those of the model that was widened beforehand."""
    model, batch = talkative("opt"), spoken("opt")[1]
    model.llm_model.half()
    with compute_in_float32(model.llm_model):
        found = generate(begun(model, batch), counted("opt", model, batch), (STOP["opt"],), options_of(Asked(), 12, TRANSFORMERS))
    model.llm_model.float()
    wanted = generate(begun(model, batch), counted("opt", model, batch), (STOP["opt"],), options_of(Asked(), 12, TRANSFORMERS))
    assert words_of(found) == words_of(wanted)
