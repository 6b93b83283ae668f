"""A model in PyTorch as a decoder that says words: what runtime.decode asks for, with keys and values that are kept.

P pictures, N prompts, B of them still going, M sequences of each, L words, R rows of the step before, P words before them in
their row, C places that all sequences of a prompt look at, Q queries, V words of the vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.bert import KeysValues
from models.blip2_llm import Blip2Llm
from models.caches import Before
from models.captioner import BlipCaptioner
from models.decoder import TextDecoder
from models.fit import Generator
from models.t5 import T5
from models.vqa import BlipVqa
from runtime.decoding import Steps


@torch.inference_mode()
def look(model: Generator, image: Tensor) -> Tensor:
    """What a model keeps of pictures (P, 3, S, S): their features (P, T, D), or what stands before words (P, Q, E)."""
    feat = model.image_feat(image)
    return model.llm_prompt(model.query_embed(feat)) if isinstance(model, Blip2Llm) else feat


@torch.inference_mode()
def begin(model: Generator, seen: Tensor, ids: np.ndarray, mask: np.ndarray, first: int) -> Steps:
    """N prompts, ready to go on.

    Args:
        seen: of the picture of each prompt, a row of what `look` gives.
        ids, mask: (N, L) int64. What the decoder goes on from, padded on the left: BLIP's captions, and language models but
            T5. What is read first, padded on the right: BLIP's questions and T5's prompts.
        first: the word that an answer begins with, where the prompt is read first.
    """
    words, kept = (torch.from_numpy(array).to(seen.device) for array in (ids, mask))
    if isinstance(model, BlipCaptioner):
        return Looking(model.text_decoder, words, kept, model.cross_kv(seen), None)
    answers = words.new_full((len(words), 1), first)
    begun = answers, torch.ones_like(answers)
    if isinstance(model, BlipVqa):
        return Looking(model.text_decoder, *begun, model.cross_kv(model.question_states(words, kept, seen)), kept)
    if isinstance(model.llm_model, T5):
        cross = model.llm_model.cross_kv(model.encode(seen, words, kept))
        return Looking(model.llm_model, *begun, cross, F.pad(kept, (seen.shape[1], 0), value=1))
    return Led(model, words, kept, seen)


class Looking:
    """`runtime.decoding.Steps` of a decoder that looks at a picture, or at what was read."""

    def __init__(
        self, decoder: TextDecoder | T5, ids: Tensor, mask: Tensor, cross: list[KeysValues], cross_mask: Tensor | None
    ) -> None:
        """ids, mask (N, L) int64; `cross` (N, H, C, K) of every layer, of which cross_mask (N, C) hides some."""
        self._decoder, self._ids, self._mask = decoder, ids, mask
        self._cross, self._cross_mask = cross, cross_mask
        self._going = np.arange(len(ids))  # (B,)
        self._past = [(k[:, :, :0], v[:, :, :0]) for k, v in cross]  # (R, H, P, K), no word yet
        self._seen = mask[:, :0]  # (R, P)

    @torch.inference_mode()
    def start(self) -> np.ndarray:
        rows = torch.arange(len(self._ids), device=self._ids.device)[:, None]
        return self._run(self._ids[:, None], self._mask[:, None], rows)[:, 0]

    @torch.inference_mode()
    def step(self, ids: np.ndarray, parents: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        kept = rows_left(self._going, prompts, self._ids.device)
        if kept is not None:
            self._cross, self._going = rows_of(self._cross, kept), prompts
            self._cross_mask = None if self._cross_mask is None else self._cross_mask[kept]
        words, rows = (torch.from_numpy(array).to(self._ids.device) for array in (ids, parents))
        return self._run(words[..., None], torch.ones_like(words)[..., None], rows)

    def _run(self, ids: Tensor, mask: Tensor, parents: Tensor) -> np.ndarray:
        """ids, mask (B, M, L) after the rows `parents` (B, M) to float32 logits (B, M, V)."""
        past, seen = rows_of(self._past, parents.flatten()), self._seen[parents]  # seen (B, M, P)
        positions = seen.sum(dim=2, keepdim=True) + mask.cumsum(dim=2) - mask
        logits, present = self._decoder.next_words(ids, positions, mask, past, seen, self._cross, self._cross_mask)
        self._past = [kept.all for kept in present]
        self._seen = torch.cat([seen, mask], dim=2).flatten(0, 1)
        return logits.float().cpu().numpy()


class Led:
    """`runtime.decoding.Steps` of OPT and those built like LLaMA, which queries lead. The sequences of a prompt share it."""

    def __init__(self, model: Blip2Llm, ids: Tensor, mask: Tensor, llm_prompt: Tensor) -> None:
        """ids, mask (N, L) int64, `llm_prompt` (N, Q, E)."""
        self._model, self._ids, self._mask, self._llm_prompt = model, ids, mask, llm_prompt
        self._going = np.arange(len(ids))  # (B,)
        self._prompt: list[KeysValues] = []  # (B, H, C, K) of every layer
        self._prompt_mask = F.pad(mask, (llm_prompt.shape[1], 0), value=1)  # (B, C)
        self._past: list[KeysValues] = []  # (R, H, P, K) of every layer, once there is a word; none is padding

    @torch.inference_mode()
    def start(self) -> np.ndarray:
        positions = self._llm_prompt.shape[1] + self._mask.cumsum(dim=1) - self._mask  # (N, L)
        logits, present = self._model.next_words(self._llm_prompt, self._ids, self._mask, positions, None, None)
        self._prompt = [kept.all for kept in present]
        return logits.float().cpu().numpy()

    @torch.inference_mode()
    def step(self, ids: np.ndarray, parents: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        device = self._ids.device
        kept = rows_left(self._going, prompts, device)
        if kept is not None:
            self._prompt, self._prompt_mask = rows_of(self._prompt, kept), self._prompt_mask[kept]
            self._going = prompts
        words, rows = (torch.from_numpy(array.reshape(-1)).to(device) for array in (ids, parents))  # (B * M,)
        own = rows_of(self._past, rows)
        before = own[0][0].shape[2] if own else 0
        past = [Before(own[n] if own else None, shared) for n, shared in enumerate(self._prompt)]
        positions = (self._prompt_mask.sum(dim=1) + before).repeat_interleave(ids.shape[1])[:, None]  # (B * M, 1)
        seen = torch.ones(len(words), before, dtype=torch.int64, device=device)
        logits, present = self._model.next_words(None, words[:, None], None, positions, past, seen, self._prompt_mask)
        self._past = [kept.all for kept in present]
        return logits.reshape(*ids.shape, -1).float().cpu().numpy()


def rows_of(layers: list[KeysValues], rows: Tensor) -> list[KeysValues]:
    """These rows (n,) of the keys and values of every layer."""
    return [(k[rows], v[rows]) for k, v in layers]


def rows_left(going: np.ndarray, prompts: np.ndarray, device: torch.device) -> Tensor | None:
    """Which of the prompts `going` (B,) go on, of which `prompts` are left; None when all do."""
    if len(prompts) == len(going):
        return None
    return torch.from_numpy(np.searchsorted(going, prompts)).to(device)
