"""transformers in the place of our decoders: it writes what our PyTorch models say, which read every text from its first word."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bench.their_words import TheirBlip, TheirLlm, TheirWords, fill
from bench.words import Asked, random_asked, write_words
from models.config import Blip2LlmConfig, BlipCaptionConfig, BlipVqaConfig, GenerationConfig
from models.errors import UserError
from models.fit import Generator
from models.llm_config import words_width
from runtime.graphs import read_graphs
from tests.generators import speaking
from tests.talkative import talkative
from tests.text_graphs import CONFIGS, TorchDecoder, write_graphs
from tests.tiny import random_generator

NEW = 6


def square_vqa() -> BlipVqaConfig:
    """transformers has one configuration for both texts, and they look at something as wide as a picture."""
    config = speaking("vqa")
    assert isinstance(config, BlipVqaConfig)
    both = dataclasses.replace(config.decoder, width=config.vision.width, heads=4)
    return dataclasses.replace(config, text=both, decoder=both)


def model_of(kind: str) -> Generator:
    if kind == "vqa":
        return random_generator(square_vqa())
    return talkative(kind) if kind in ("caption", "opt", "opt-350m", "llama", "t5") else random_generator(CONFIGS[kind])


def theirs_of(model: Generator, asked: Asked) -> TheirWords:
    config: GenerationConfig = model.cfg
    state = model.state_dict()
    if isinstance(config, Blip2LlmConfig):
        inner = {name.removeprefix("llm_model."): t for name, t in state.items() if name.startswith("llm_model.")}
        return TheirLlm(config.llm, inner, asked)
    return TheirBlip(config, state, asked)


def given_to(model: Generator, asked: Asked) -> np.ndarray:
    """Pictures, or what stands for them before the words."""
    if not isinstance(model.cfg, Blip2LlmConfig):
        return asked.pictures
    shape = (len(asked.ids), model.cfg.qformer.queries, words_width(model.cfg.llm))
    return np.random.default_rng(3).standard_normal(shape, np.float32)


def our_words(model: Generator, given: np.ndarray, asked: Asked, beams: int) -> np.ndarray:
    decoder = TorchDecoder(model.cfg)
    decoder.model = model
    with torch.inference_mode():
        seen = torch.from_numpy(given) if isinstance(model.cfg, Blip2LlmConfig) else decoder.look(given)
        return write_words(decoder.begin(seen, asked.picture, asked.ids, asked.mask), asked, beams, NEW)


@pytest.mark.parametrize("kind", ["caption", "vqa", "opt", "opt-350m", "llama", "baichuan", "t5"])
def test_the_words_are_ours(tmp_path: Path, kind: str) -> None:
    asked = random_asked(read_graphs(write_graphs(tmp_path, kind if kind in CONFIGS else "opt")), 2, 4)
    model = model_of(kind)
    given, theirs = given_to(model, asked), theirs_of(model, asked)
    for beams in (1, 3):
        found = theirs.write(given, asked.ids, beams, NEW)
        assert found.shape == (2, NEW)
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, our_words(model, given, asked, beams))


def test_other_weights_write_other_words(tmp_path: Path) -> None:
    """The check can fail."""
    asked = random_asked(read_graphs(write_graphs(tmp_path, "opt")), 2, 4)
    model = model_of("opt")
    given, theirs = given_to(model, asked), theirs_of(random_generator(model.cfg, seed=5), asked)
    assert (theirs.write(given, asked.ids, 1, NEW) != our_words(model, given, asked, 1)).any()


def test_nothing_ends_a_text(tmp_path: Path) -> None:
    """However likely the stop word is."""
    asked = random_asked(read_graphs(write_graphs(tmp_path, "llama")), 2, 4)
    model = model_of("llama")
    for stop in asked.stop_ids:
        model.state_dict()["llm_model.lm_head.weight"][stop] *= 50
    given, theirs = given_to(model, asked), theirs_of(model, asked)
    for beams in (1, 2):
        found = our_words(model, given, asked, beams)
        assert found.shape == (2, NEW)
        assert not np.isin(found, asked.stop_ids).any()
        np.testing.assert_array_equal(found, theirs.write(given, asked.ids, beams, NEW))


def test_what_they_are_called(tmp_path: Path) -> None:
    asked = random_asked(read_graphs(write_graphs(tmp_path, "caption")), 1, 3)
    theirs = theirs_of(model_of("caption"), asked)
    assert theirs.name == "BlipForConditionalGeneration.generate"
    assert theirs.describe() == f"transformers {transformers.__version__}, BlipForConditionalGeneration, eager attention, float32"


def test_a_captioner_begins_with_its_first_word(tmp_path: Path) -> None:
    """transformers puts [DEC] in the first place, whatever stands there: a prompt that began otherwise would be another one."""
    graphs = read_graphs(write_graphs(tmp_path, "caption"))
    asked = random_asked(graphs, 3, 4)
    assert (asked.ids[:, 0] == asked.start_id).all()
    assert isinstance(graphs.config, BlipCaptionConfig)
    assert asked.ids.max() < graphs.config.decoder.vocab


def test_tensors_that_do_not_fit_are_refused() -> None:
    linear = torch.nn.Linear(2, 3)
    with pytest.raises(UserError, match="'bias' does not fit"):
        fill(linear, {"weight": torch.zeros(3, 2)})
    with pytest.raises(UserError, match="'more' does not fit"):
        fill(linear, {**torch.nn.Linear(2, 3).state_dict(), "more": torch.zeros(1)})


def test_weights_in_half_precision_are_widened() -> None:
    state = {name: tensor.bfloat16() for name, tensor in torch.nn.Linear(2, 3).state_dict().items()}
    linear = torch.nn.Linear(2, 3)
    fill(linear, state)
    assert linear.weight.dtype == torch.float32
    assert torch.equal(linear.weight, state["weight"].float())
