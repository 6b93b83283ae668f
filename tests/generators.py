"""Graphs of tiny random models that write words, in complete graphs/ folders. Shared by several test files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from safetensors.torch import save_file

import export.__main__
from models.config import Blip2LlmConfig, BlipVqaConfig, GenerationConfig
from models.config_file import to_dict
from models.fit import Generator
from tests import chain, vocabularies
from tests.tiny import GENERATORS, random_generator

# Sizes of the graphs for ATC that tests share: 2 prompts of up to 8 tokens, 3 sequences of each.
STATIC = ("--batchsize", 2, "--beams", 3, "--length", 8)
VOCABULARIES = {"bert": vocabularies.WORDPIECE_BLIP, "opt": vocabularies.BPE_SIZE, "t5": vocabularies.T5, "llama": 320}


def speaking(kind: str) -> GenerationConfig:
    """The sizes of tests.tiny.GENERATORS[kind] with as many words as the tiny vocabulary of its family has, and fewer layers
    that look at pictures: each takes the exporter a second."""
    config = GENERATORS[kind]
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, depth=1))
    if isinstance(config, Blip2LlmConfig):
        llm = dataclasses.replace(config.llm, vocab=VOCABULARIES[config.llm.family])
        return dataclasses.replace(config, llm=llm, qformer=dataclasses.replace(config.qformer, depth=2))
    decoder = dataclasses.replace(config.decoder, vocab=VOCABULARIES["bert"])
    if isinstance(config, BlipVqaConfig):
        return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab=VOCABULARIES["bert"]), decoder=decoder)
    return dataclasses.replace(config, decoder=decoder)


def write_vocabulary(folder: Path, config: GenerationConfig) -> Path:
    """The tiny vocabulary of the model's family; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(config, Blip2LlmConfig):
        return vocabularies.write_wordpiece(folder)
    if config.llm.family == "opt":
        return vocabularies.write_bpe(folder)
    return vocabularies.write_sentencepiece(folder, config.llm.family)


def write_generator(folder: Path, model: Generator) -> list[object]:
    """Write what blip-export reads; returns the options that name it."""
    words = write_vocabulary(folder, model.cfg)
    (folder / "config.json").write_text(json.dumps(to_dict(model.cfg)), "utf-8")
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    return ["--config", folder / "config.json", "--checkpoint", folder / "model.safetensors", "--tokenizer", words]


def export_generator(folder: Path, kind: str, target: str = "ort", *options: object, model: Generator | None = None) -> Path:
    """blip-export of a random model (seed 0) of `kind`, one of tests.tiny.GENERATORS, to folder/graphs. Its words are those of
    tests.vocabularies. It takes the exporter long: tests that only read share those of the fixture `generator_graphs`."""
    named = write_generator(folder / "model", model or random_generator(speaking(kind)))
    chain.done(chain.call(export.__main__.main, *named, "--out", folder / "graphs", "--target", target, *options))
    return folder / "graphs"
