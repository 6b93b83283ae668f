"""Random models whose texts vary, and what each says next, computed without caches: what decoding is held against.

tests.tiny.random_generator says one word over and over: what it adds to a word is smaller than what is the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.bert import KeysValues
from models.blip2_llm import Blip2Llm
from models.captioner import BlipCaptioner
from models.config import BlipVqaConfig
from models.decoder import TextDecoder
from models.fit import Generator
from models.t5 import T5
from models.vqa import BlipVqa
from tests.generators import speaking
from tests.tiny import random_generator

PROMPTS, LONGEST = 5, 6  # prompts of a batch, and words of the longest
# Parts of a decoder by their names, and what they are multiplied by: words and places count for more, all else for less.
SCALES = {"word_embeddings": 2.0, "position_embeddings": 4.0, "embed_positions": 4.0, "crossattention.output.dense": 0.2}
BIASES = 0.3


def talkative(kind: str) -> Generator:
    """A model of tests.generators.speaking(kind)."""
    model = random_generator(speaking(kind))
    for name, parameter in model.named_parameters():
        if name.startswith(("text_decoder", "llm_model")):
            parameter *= next((scale for part, scale in SCALES.items() if part in name), 1.0)
            if name.startswith("text_decoder") and name.endswith("bias"):
                parameter *= BIASES
    return model


@dataclass(frozen=True)
class Batch:
    """Prompts of unequal length and their pictures; more prompts than pictures."""

    pictures: np.ndarray  # (P, 3, S, S)
    picture: np.ndarray  # (N,) which of them each prompt goes with
    ids: np.ndarray  # (N, L)
    mask: np.ndarray  # (N, L)


def batch_for(model: Generator, longest: int = LONGEST) -> Batch:
    """Padded on the left, but for what is read before the decoder begins, which is padded on the right."""
    random, size = np.random.default_rng(1), model.cfg.vision.image_size
    pictures = random.normal(size=(3, 3, size, size)).astype(np.float32)
    lengths = np.array([longest, 1, 3, 2, 4])[:, None]  # (N, 1)
    places = np.arange(longest)
    mask = (places < lengths) if reads(model) else (places >= longest - lengths)
    ids = random.integers(5, vocabulary(model) - 2, mask.shape)
    if isinstance(model, BlipCaptioner):
        ids[np.arange(PROMPTS), mask.argmax(axis=1)] = first_word(model)
    return Batch(pictures, np.array([0, 2, 1, 1, 0]), ids * mask, mask.astype(np.int64))


def reads(model: Generator) -> bool:
    """Whether the prompt is read before the decoder begins."""
    return isinstance(model, BlipVqa) or (isinstance(model, Blip2Llm) and isinstance(model.llm_model, T5))


def vocabulary(model: Generator) -> int:
    config = model.cfg
    return config.decoder.vocab if isinstance(config, BlipVqaConfig) else config.text.vocab


def first_word(model: Generator) -> int:
    """What an answer, or a caption's prompt, begins with: T5's <pad>, BLIP's [DEC], which is the last but one."""
    return 0 if isinstance(model, Blip2Llm) else vocabulary(model) - 2


class Truth:
    """What a model says after any words, in PyTorch, each prompt by itself and without its padding."""

    def __init__(self, model: Generator, batch: Batch, attend_padding: bool = False) -> None:
        """`attend_padding`: look at the states of a question's padding, too."""
        self.model, self.first, feat = model, first_word(model), model.image_feat(torch.from_numpy(batch.pictures))
        self.prompts: list[tuple[Tensor, list[KeysValues] | Tensor]] = []
        self.said: dict[tuple[int, ...], np.ndarray] = {}
        for row, mask, seen in zip(torch.from_numpy(batch.ids), torch.from_numpy(batch.mask), feat[batch.picture], strict=True):
            kept = torch.ones_like(mask) if attend_padding else mask
            self.prompts.append(self._read(row[None, kept > 0], mask[None, kept > 0], seen[None]))

    def logits(self, prompt: int, new: Sequence[int]) -> np.ndarray:
        """(V,) of the word after prompt number `prompt` and the words `new`; what was asked before is not computed again."""
        asked = (prompt, *new)
        if asked not in self.said:
            self.said[asked] = self._logits(prompt, new)
        return self.said[asked]

    def _logits(self, prompt: int, new: Sequence[int]) -> np.ndarray:
        words, looked_at = self.prompts[prompt]
        ids = torch.cat([words, torch.tensor(new, dtype=torch.int64)[None]], dim=1)
        if isinstance(looked_at, list):
            decoder = self.model.llm_model if isinstance(self.model, Blip2Llm) else self.model.text_decoder
            assert isinstance(decoder, TextDecoder | T5)
            return decoded(decoder, ids, looked_at).flatten().numpy()
        assert isinstance(self.model, Blip2Llm)
        positions = looked_at.shape[1] + torch.arange(ids.shape[1])[None]
        return self.model.next_words(looked_at, ids, torch.ones_like(ids), positions, None, None)[0].flatten().numpy()

    def _read(self, words: Tensor, mask: Tensor, feat: Tensor) -> tuple[Tensor, list[KeysValues] | Tensor]:
        """The words (1, L) that the decoder begins with, and what it looks at or, of a language model, what stands before."""
        model, begun = self.model, torch.tensor([[self.first]])
        if isinstance(model, BlipCaptioner):
            return words, model.cross_kv(feat)
        if isinstance(model, BlipVqa):
            return begun, model.cross_kv(model.question_states(words, mask, feat))
        prompt = model.llm_prompt(model.query_embed(feat))
        if isinstance(model.llm_model, T5):
            return begun, model.llm_model.cross_kv(model.encode(prompt, words, mask))
        return words, prompt


def decoded(decoder: TextDecoder | T5, ids: Tensor, cross: list[KeysValues]) -> Tensor:
    """Logits (1, 1, V) of the word after ids (1, L), all of them read at once, all of `cross` looked at."""
    keys = cross[0][0]  # (1, H, C, K)
    nothing = keys[:, :, :0]
    words = ids[:, None]  # (1, 1, L)
    ones = torch.ones_like(words)
    looked = torch.ones(1, keys.shape[2], dtype=torch.int64)
    past = [(nothing, nothing)] * len(cross)
    return decoder.next_words(words, ones.cumsum(2) - 1, ones, past, ones[:, :, :0], cross, looked)[0]
