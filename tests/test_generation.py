"""Whole texts over exported graphs in ONNX Runtime: word for word those of transformers, and of an independent search.

Random models whose texts vary; prompts of unequal length in one batch, two of them about one picture. Largest difference
measured, of logits up to 11: 1.5e-5 from transformers (T5, whose scores are not scaled: 6.2e-5), 8.5e-6 from the float64
Baichuan; of scores 1e-6 of the score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.blip2_llm import Blip2Llm
from models.errors import UserError
from models.fit import Generator
from runtime.decode import ORIGINAL, ORIGINAL_BLIP, TRANSFORMERS, Decoding, Generated, Steps, generate
from runtime.decoders import Decoder, open_decoder
from runtime.graphs import read_graphs
from tests import independent_llm
from tests.independent_decode import Found, Next, original
from tests.talkative import Batch, Truth, batch_for, first_word, talkative
from tests.their_texts import PAD, Asked, generated, image_token, their_model

LOGITS = 1e-4  # the bound of the product
SCORE = 1e-5  # of the score
KINDS = ("caption", "vqa", "opt", "llama", "t5")
FIRST = {"vqa": 30, "opt": 2, "llama": 1, "t5": 0}  # what counts before the new words under the original's rule
STOP = {"caption": 18, "vqa": 25, "opt": 247, "llama": 293, "t5": 137}  # words that texts come to sooner or later
BLIP = ("caption", "vqa")
THREE = ("q_proj", "k_proj", "v_proj")
ASKED = {
    "greedy": Asked(),
    "greedy, least and penalty": Asked(least=5, repetition=1.3),
    "beams 3": Asked(beams=3, number=3),
    "beams 3, least": Asked(beams=3, number=2, least=6, length=-0.5),
    "beams 5, penalty": Asked(beams=5, number=2, repetition=1.2, length=0.5),
    "beams 5, early": Asked(beams=5, number=5, early=True, length=0.0),
}


@dataclasses.dataclass(frozen=True)
class Speaker:
    """One kind of model: in PyTorch, as graphs, and in transformers."""

    kind: str
    model: Generator
    batch: Batch
    decoder: Decoder
    whole: Decoder  # without caches
    static: Decoder
    theirs: Any
    truth: Truth

    def begin(self, decoder: Decoder, batch: Batch | None = None) -> Steps:
        batch = batch or self.batch
        return decoder.begin(decoder.look(batch.pictures), batch.picture, batch.ids, batch.mask, self.kind == "vqa")

    def generate(self, asked: Asked, decoder: Decoder | None = None) -> list[list[Generated]]:
        """Under the rule of transformers, as many words as it was asked for."""
        counted = self.counted()
        begun = self.begin(decoder or self.decoder)
        return generate(begun, counted, (STOP[self.kind],), options_of(asked, counted.shape[1], TRANSFORMERS))

    def counted(self) -> np.ndarray:
        """What is in the input_ids of transformers, whose padding counts for a language model, but not for BLIP."""
        ids, mask = self.batch.ids, self.batch.mask
        if self.kind == "caption":
            return np.where(mask > 0, ids, -1)
        config = self.model.cfg
        if self.kind in ("opt", "llama"):
            queries = np.full((len(ids), config.qformer.queries), image_token(config))
            return np.concatenate([queries, np.where(mask > 0, ids, PAD)], axis=1)
        return np.full((len(ids), 1), first_word(self.model))


def options_of(asked: Asked, before: int, rule: str) -> Decoding:
    return Decoding(
        max_length=before + asked.new,
        min_length=before + asked.least if asked.least else 0,
        num_beams=asked.beams,
        num_return=asked.number,
        length_penalty=asked.length,
        early_stopping=asked.early,
        rule=rule,
        repetition_penalty=asked.repetition,
    )


@pytest.fixture(scope="module")
def speaker(generator_graphs: Callable[..., Path]) -> Callable[[str], Speaker]:
    @cache
    def of(kind: str) -> Speaker:
        model = talkative(kind)
        dynamic, static = (read_graphs(generator_graphs(kind, target)) for target in ("ort", "atc"))
        decoders = (open_decoder(dynamic, "cpu", 1), open_decoder(dynamic, "cpu", 1, False), open_decoder(static, "cpu", 1))
        batch = batch_for(model)
        truth = Truth(model, batch, attend_padding=kind == "vqa")
        return Speaker(kind, model, batch, *decoders, their_model(model, STOP[kind]), truth)

    return of


class Heard:
    """Steps whose logits are kept, by step and prompt."""

    def __init__(self, steps: Steps, count: int) -> None:
        self.steps, self.logits, self.count = steps, [], count

    def start(self) -> np.ndarray:
        found = self.steps.start()
        self.logits.append(found.copy())
        return found

    def step(self, ids: np.ndarray, parents: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        found = self.steps.step(ids, parents, prompts)
        whole = np.full((self.count, found.shape[2]), np.nan, np.float32)
        whole[prompts] = found[:, 0]
        self.logits.append(whole)
        return found


def words_of(texts: list[list[Generated]]) -> list[list[tuple[int, ...]]]:
    return [[text.ids for text in prompt] for prompt in texts]


def assert_worth_comparing(texts: list[list[tuple[int, ...]]], least: int = 5) -> None:
    """Several words, and texts that are not all of one length: otherwise equal texts would mean little."""
    all_texts = [text for prompt in texts for text in prompt]
    assert len({word for text in all_texts for word in text}) >= least
    assert len({len(text) for text in all_texts}) > 1


@pytest.mark.parametrize("named", ASKED)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers(speaker: Callable[[str], Speaker], kind: str, named: str) -> None:
    found, asked = speaker(kind), ASKED[named]
    wanted = generated(found.theirs, found.model, found.batch, STOP[kind], asked)
    assert_worth_comparing(wanted.texts)
    texts = found.generate(asked)
    assert words_of(texts) == wanted.texts
    if asked.beams > 1:
        np.testing.assert_allclose([[text.score for text in prompt] for prompt in texts], wanted.scores, rtol=SCORE)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_transformers(speaker: Callable[[str], Speaker], kind: str) -> None:
    found, asked = speaker(kind), Asked(new=10)
    wanted = generated(found.theirs, found.model, found.batch, STOP[kind], asked)
    counted = found.counted()
    heard = Heard(found.begin(found.decoder), len(counted))
    generate(heard, counted, (STOP[kind],), options_of(asked, counted.shape[1], TRANSFORMERS))
    assert len(heard.logits) == len(wanted.logits) > 5
    for ours, theirs in zip(heard.logits, wanted.logits, strict=True):
        going = ~np.isnan(ours).any(axis=1)
        assert going.any()
        np.testing.assert_allclose(ours[going], theirs[going], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("named", ["beams 3", "beams 3, least", "beams 5, penalty"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_original(speaker: Callable[[str], Speaker], kind: str, named: str) -> None:
    """An independent search over the PyTorch model without caches, each prompt by itself. Under this rule a captioner's prompt
    counts for the length, so prompts of unequal length are not written on together."""
    found, asked = speaker(kind), ASKED[named]
    rule, version = (ORIGINAL_BLIP, "4.15") if kind in BLIP else (ORIGINAL, "4.33")
    texts, wanted = [], []
    for batch, numbers in parts(found):
        counted = np.full((len(numbers), 1), FIRST[kind]) if kind != "caption" else batch.ids
        options = options_of(asked, counted.shape[1], rule)
        texts += generate(found.begin(found.decoder, batch), counted, (STOP[kind],), options)
        for number, before in zip(numbers, counted.tolist(), strict=True):
            wanted.append(searched(partial(found.truth.logits, number), before, STOP[kind], options, version))
    assert_worth_comparing([[tuple(text.ids) for text in prompt] for prompt in wanted])
    assert words_of(texts) == [[tuple(text.ids) for text in prompt] for prompt in wanted]
    scores = [[text.score for text in prompt] for prompt in texts]
    np.testing.assert_allclose(scores, [[text.score for text in prompt] for prompt in wanted], rtol=SCORE)


def parts(spoken: Speaker) -> list[tuple[Batch, list[int]]]:
    """The prompts that are written on together, and their numbers."""
    batch = spoken.batch
    if spoken.kind != "caption":
        return [(batch, list(range(len(batch.ids))))]
    found = []
    for n, mask in enumerate(batch.mask):
        kept = mask > 0
        found.append((Batch(batch.pictures, batch.picture[[n]], batch.ids[[n]][:, kept], batch.mask[[n]][:, kept]), [n]))
    return found


def searched(following: Next, counted: list[int], stop: int, options: Decoding, version: str) -> list[Found]:
    """The best texts of one prompt, as the original finds them."""
    return original(
        following,
        counted,
        [stop],
        options.num_beams,
        options.max_length,
        options.min_length,
        options.length_penalty,
        options.repetition_penalty,
        options.early_stopping,
        version,
    )[: options.num_return]


def test_baichuan(speaker: Callable[[str], Speaker]) -> None:
    """LLaMA's graph is Baichuan's: its published weights are packed, which loading takes apart."""
    found = speaker("llama")
    model = found.model
    assert isinstance(model, Blip2Llm)
    weights = packed({name: tensor.numpy() for name, tensor in model.llm_model.state_dict().items()})
    pictures = torch.from_numpy(found.batch.pictures[found.batch.picture])
    queries = model.llm_prompt(model.query_embed(model.image_feat(pictures))).numpy()  # (N, Q, E)
    ids = [row[kept > 0].tolist() for row, kept in zip(found.batch.ids, found.batch.mask, strict=True)]

    def following(number: int, new: list[int]) -> np.ndarray:
        return independent_llm.next_word(weights, queries[number], ids[number] + new, model.cfg.text.heads)

    heard = Heard(found.begin(found.decoder), len(ids))
    counted, asked = np.full((len(ids), 1), FIRST["llama"]), Asked(new=10)
    greedy = generate(heard, counted, (STOP["llama"],), options_of(asked, 1, ORIGINAL))
    assert_worth_comparing(words_of(greedy))
    for number, (text,) in enumerate(greedy):
        for step, logits in enumerate(heard.logits[: len(text.ids) + text.stopped]):
            wanted = following(number, list(text.ids[:step]))
            np.testing.assert_allclose(logits[number], wanted, rtol=0, atol=LOGITS)
            assert wanted.argmax() == (*text.ids, STOP["llama"])[step]
    options = options_of(Asked(new=8, beams=3, number=2, repetition=1.2), 1, ORIGINAL)
    texts = generate(found.begin(found.decoder), counted, (STOP["llama"],), options)
    for number in (0, 3):  # float64, one word at a time: slow
        wanted_texts = searched(partial(following, number), [FIRST["llama"]], STOP["llama"], options, "4.33")
        assert [text.ids for text in texts[number]] == [tuple(text.ids) for text in wanted_texts]


def packed(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As Baichuan is published: queries, keys and values of a layer in one matrix."""
    found = {name: array for name, array in weights.items() if not any(part in name for part in THREE)}
    for name in [name for name in weights if name.endswith("q_proj.weight")]:
        found[name.replace("q_proj", "W_pack")] = np.concatenate([weights[name.replace("q_proj", part)] for part in THREE])
    return found


@pytest.mark.parametrize("named", ["greedy", "beams 3"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_gives_the_same_texts(speaker: Callable[[str], Speaker], kind: str, named: str) -> None:
    """With caches and without, with caches of any size and with a buffer: whole texts, to the last word that the buffer holds."""
    found = speaker(kind)
    room = found.static.room(found.batch.ids.shape[1])
    assert room is not None
    asked = dataclasses.replace(ASKED[named], new=room, least=room)  # none ends before the buffer is full
    wanted = found.generate(asked)
    assert all(len(text.ids) == room for prompt in wanted for text in prompt)
    assert words_of(found.generate(asked, found.whole)) == words_of(wanted)
    assert words_of(found.generate(asked, found.static)) == words_of(wanted)
    with pytest.raises(UserError, match=r"buffer of \w+ is full: it was exported for \d+ words\. .* with more --slots"):
        found.generate(dataclasses.replace(asked, new=room + 1, least=room + 1), found.static)
