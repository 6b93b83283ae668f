"""Small models that write words, without their graphs: the manifest and the vocabulary of a graphs/ folder, and PyTorch in the
place of ONNX Runtime, which reads every text again from its first word.

So what a run makes of the words can be tested in a moment, and what the graphs say be compared with something.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from torch import Tensor
from torch.nn import functional as F

import preprocess.__main__
import runtime.__main__
from models import manifest
from models.blip2_llm import Blip2Llm
from models.captioner import BlipCaptioner
from models.config import Blip2LlmConfig, BlipCaptionConfig, BlipVqaConfig, GenerationConfig
from models.config_file import to_dict
from models.llm_config import BAICHUAN, VICUNA
from models.spec import graph_specs, spec_to_dict
from models.t5 import T5
from models.vqa import BlipVqa
from preprocess.words import load_words
from tests import chain, vocabularies
from tests.generators import speaking, write_vocabulary
from tests.tiny import random_generator

_LLAMA = speaking("llama")
assert isinstance(_LLAMA, Blip2LlmConfig)
# Every family of words, with as many words as its tiny vocabulary has.
CONFIGS: dict[str, GenerationConfig] = {
    **{kind: speaking(kind) for kind in ("caption", "vqa", "opt", "llama", "t5")},
    **{
        family: dataclasses.replace(_LLAMA, llm=dataclasses.replace(_LLAMA.llm, vocab=vocab, family=family))
        for family, vocab in ((VICUNA, vocabularies.VICUNA), (BAICHUAN, vocabularies.SENTENCEPIECE["baichuan"]))
    },
}


def write_graphs(folder: Path, kind: str, static: bool = False) -> Path:
    """folder/graphs of the model `kind`, whose graph files are empty."""
    config, graphs = CONFIGS[kind], folder / "graphs"
    family = config.llm.family if isinstance(config, Blip2LlmConfig) else "bert"
    if family == VICUNA:
        (graphs / "tokenizer").mkdir(parents=True)
        vocabularies.write_sentencepiece(graphs / "tokenizer", "llama")
    else:
        write_vocabulary(graphs / "tokenizer", config)
    words = load_words(graphs / "tokenizer", family)
    written = {}
    for name, spec in graph_specs(config, static).items():
        (graphs / f"{name}.onnx").write_bytes(b"")
        written[name] = {**spec_to_dict(spec), "file": f"{name}.onnx", "nodes": 0}
    content = {
        "model": kind,
        "config": to_dict(config),
        "checkpoint": {"file": "none", "sha256": "0" * 64, "layout": "none"},
        "target": "ort",
        "opset": 18,
        "precision": "float32",
        "graphs": written,
        "tokenizer": {"file": f"tokenizer/{words.file.name}", "sha256": words.sha256, "size": words.size},
        "parity": [],
    }
    manifest.write(graphs, "graphs", content)
    return graphs


def call_run(task: str, graphs: Path, out: Path, *options: object) -> Result:
    """`blip-run caption` or `vqa`."""
    return chain.call(runtime.__main__.main, task, "--graphs", graphs, "--out", out, "--threads", 1, *options)


def caption_data(folder: Path, graphs: Path, *options: object, pictures: int = 7) -> Path:
    """folder/data of random pictures, which lie in folder/images."""
    return _prepared(folder, graphs, "caption", *options, pictures=pictures)


QUESTIONS = ("What color is the car?", "two?", "is it a dog on the red ball", "a", "What color is the cat on a ball?")
ANSWERS = ("red dog", "a dog", "cat", "two", "a", "red", "the ball", "a picture of a dog", "color ball", "isn't", "1", "a cat")


def vqa_data(folder: Path, graphs: Path, *options: object, pictures: int = 4, questions: int = 9) -> Path:
    """folder/data of random pictures and QUESTIONS, which are asked about one after another, again and again."""
    entries = [
        {"image": f"{5 * n % pictures}.png", "question": QUESTIONS[n % len(QUESTIONS)], "question_id": 100 + n}
        for n in range(questions)
    ]
    (folder / "questions.json").write_text(json.dumps(entries), "utf-8")
    (folder / "answers.json").write_text(json.dumps(ANSWERS), "utf-8")
    return _prepared(folder, graphs, "vqa", "--questions", folder / "questions.json", *options, pictures=pictures)


def _prepared(folder: Path, graphs: Path, task: str, *options: object, pictures: int) -> Path:
    if not (folder / "images").exists():
        chain.write_pictures(folder, own=(1,) * pictures)
    named = ("--images", folder / "images", "--graphs", graphs, "--out", folder / "data", "--workers", 1)
    chain.done(chain.call(preprocess.__main__.main, task, *named, *options))
    return folder / "data"


def chain_of(folder: Path, kind: str, base: Path) -> Path:
    """`folder` with graphs, images and data of the model `kind`, copied from what is made once below `base`."""
    made = base / f"chain of {kind}"
    if not made.exists():
        data = vqa_data if kind == "vqa" else caption_data
        data(made, write_graphs(made, kind))
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return folder


class Rereading:
    """runtime.decoding.Steps over N prompts: `read` makes logits (R, V) of prompts (R,) and their new words (R, L)."""

    def __init__(self, count: int, read: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        self.read, self.owner, self.texts = read, np.arange(count), np.zeros((count, 0), np.int64)

    def start(self) -> np.ndarray:
        return self.read(self.owner, self.texts)

    def step(self, ids: np.ndarray, parents: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        assert (self.owner[parents] == prompts[:, None]).all()
        self.owner = np.repeat(prompts, ids.shape[1])
        self.texts = np.concatenate([self.texts[parents.ravel()], ids.reshape(-1, 1)], axis=1)
        return self.read(self.owner, self.texts).reshape(*ids.shape, -1)


class TorchDecoder:
    """runtime.decoders.Decoder of a random model. `looked` counts the pictures of each look."""

    capacity = None

    def __init__(self, config: GenerationConfig, seed: int = 0, std: float = 0.2) -> None:
        self.model: Any = random_generator(config, seed, std)
        self.looked: list[int] = []

    def room(self, words: int) -> None:
        return None

    def look(self, pictures: np.ndarray) -> Tensor:
        self.looked.append(len(pictures))
        feat = self.model.image_feat(torch.from_numpy(pictures))
        if isinstance(self.model, Blip2Llm):
            return self.model.llm_prompt(self.model.query_embed(feat))
        assert isinstance(feat, Tensor)
        return feat

    def begin(
        self, seen: Tensor, picture: np.ndarray, ids: np.ndarray, mask: np.ndarray, attend_padding: bool = False
    ) -> Rereading:
        assert ids.shape == mask.shape == (len(picture), ids.shape[1])
        read = {BlipCaptioner: self._caption, BlipVqa: self._answer}.get(type(self.model), self._go_on)
        rows, ids_read, mask_read = seen[picture], torch.tensor(ids.copy()), torch.tensor(mask.copy())
        return Rereading(
            len(ids),
            lambda prompts, texts: read(
                rows[prompts], ids_read[prompts], mask_read[prompts], torch.from_numpy(texts), attend_padding
            ).numpy(),
        )

    def _caption(self, feat: Tensor, ids: Tensor, mask: Tensor, new: Tensor, attend: bool) -> Tensor:
        assert bool((mask == 1).all()), "prompts of a captioner are of one length"
        words = torch.cat([ids, new], dim=1)
        logits: Tensor = self.model.text_decoder(words, torch.ones_like(words), self.model.cross_kv(feat))
        return logits[:, -1]

    def _answer(self, feat: Tensor, ids: Tensor, mask: Tensor, new: Tensor, attend: bool) -> Tensor:
        states = self.model.question_states(ids, mask, feat)
        words = F.pad(new, (1, 0), value=vocabularies.WORDPIECE)[:, None]  # [DEC] first
        rows, length = len(words), words.shape[2]
        empty = torch.zeros(rows, self.model.cfg.decoder.heads, 0, self.model.cfg.decoder.width // self.model.cfg.decoder.heads)
        places = torch.arange(length).expand(rows, 1, length)
        past = [(empty, empty)] * self.model.cfg.decoder.depth
        none = torch.zeros(rows, 1, 0, dtype=torch.int64)
        cross_mask = torch.ones_like(mask) if attend else mask
        logits: Tensor = self.model.text_decoder.next_words(
            words, places, torch.ones_like(words), past, none, self.model.cross_kv(states), cross_mask
        )[0]
        return logits[:, 0]

    def _go_on(self, prompt: Tensor, ids: Tensor, mask: Tensor, new: Tensor, attend: bool) -> Tensor:
        if isinstance(self.model.llm_model, T5):
            return self._t5(prompt, ids, mask, new)
        words, seen = torch.cat([ids, new], dim=1), torch.cat([mask, torch.ones_like(new)], dim=1)
        places = (seen.cumsum(1) - seen) + prompt.shape[1]
        logits: Tensor = self.model.next_words(prompt, words, seen, places, None, None)[0]
        return logits

    def _t5(self, prompt: Tensor, ids: Tensor, mask: Tensor, new: Tensor) -> Tensor:
        assert bool((mask.diff(dim=1) <= 0).all()), "T5 reads its prompt padded on the right"
        t5, llm = self.model.llm_model, self.model.cfg.llm
        cross = t5.cross_kv(self.model.encode(prompt, ids, mask))
        words = F.pad(new, (1, 0))[:, None]
        empty = torch.zeros(len(ids), llm.heads, 0, llm.head_width)
        places = torch.arange(words.shape[2]).expand(len(ids), 1, -1)
        none = torch.zeros(len(ids), 1, 0, dtype=torch.int64)
        seen = F.pad(mask, (prompt.shape[1], 0), value=1)
        logits: Tensor = t5.next_words(words, places, torch.ones_like(words), [(empty, empty)] * llm.depth, none, cross, seen)[0]
        return logits[:, 0]


def stand_in(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> list[TorchDecoder]:
    """Let runs open PyTorch models in the place of graphs; collects those that are opened."""
    opened: list[TorchDecoder] = []

    def open_decoder(graphs: Any, provider: str, threads: int | None, use_past: bool = True) -> TorchDecoder:
        assert isinstance(graphs.config, BlipCaptionConfig | BlipVqaConfig | Blip2LlmConfig)
        opened.append(TorchDecoder(graphs.config, seed))
        return opened[-1]

    monkeypatch.setattr("runtime.generator.open_decoder", open_decoder)
    return opened
