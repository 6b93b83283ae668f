"""What a decoder has kept of words that came before, as a run would have left it. Axes as in models/generation_spec.py."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from export.generation_graphs import decoder_of
from export.random_scene import Scene
from models.bert import KeysValues
from models.blip2_llm import Blip2Llm
from models.caches import Before
from models.captioner import BlipCaptioner
from models.fit import Generator
from models.t5 import T5
from models.vqa import BlipVqa


class Past(NamedTuple):
    """P words, or places of the picture and words, of each of R rows."""

    kept: list[KeysValues]  # of every layer, (R, H, P, K) each
    mask: Tensor  # (R, P) int64


class Seen(NamedTuple):
    """What the decoder looks at for each of B prompts."""

    kept: list[KeysValues]  # of every layer, (B, H, C, K) each
    mask: Tensor | None  # (B, C) int64; None when it is a picture


def positions_of(mask: Tensor) -> Tensor:
    """Numbers, from 0, of the words that `mask` does not hide (..., L)."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def random_seen(scene: Scene, batch: int, length: int) -> Seen:
    """The picture; or of a question, of what T5 reads, or of a language model's prompt, `length` places."""
    model = scene.model
    if isinstance(model, Blip2Llm) and not isinstance(model.llm_model, T5):
        return Seen(*_after_picture(scene, model, length, torch.arange(batch)))
    if isinstance(model, BlipCaptioner):
        return Seen(model.cross_kv(scene.features(batch)), None)
    if isinstance(model, BlipVqa):
        ids, mask = scene.words(batch, length, model.cfg.text.vocab)
        return Seen(model.cross_kv(model.question_states(ids, mask, scene.features(batch))), mask)
    assert isinstance(model, Blip2Llm)
    assert isinstance(model.llm_model, T5)
    prompt = scene.llm_prompt(batch)[:, :length]  # (B, Q, D)
    ids, mask = scene.words(batch, length - prompt.shape[1], model.cfg.llm.vocab)
    states = model.encode(prompt, ids, mask)
    return Seen(model.llm_model.cross_kv(states), F.pad(mask, (prompt.shape[1], 0), value=1))


def random_past(scene: Scene, length: int, owners: Tensor, seen: Seen | None) -> Past:
    """What is kept of `length` words of each of R rows, which belong to the prompts `owners` (R,)."""
    rows, model = len(owners), cast(Generator, scene.model)
    if seen is None:
        return _after_picture(scene, cast(Blip2Llm, model), length, owners)
    if isinstance(model, Blip2Llm) and not isinstance(model.llm_model, T5):
        return _after_prompt(scene, model, length, owners, seen)
    decoder = decoder_of(model)
    ids, mask = scene.words(rows, length, decoder.cfg.vocab, left=True)
    places = torch.arange(length).expand(rows, -1) if isinstance(decoder, T5) else positions_of(mask)  # (R, P)
    cross = [(k[owners], v[owners]) for k, v in seen.kept]
    cross_mask = None if seen.mask is None else seen.mask[owners]
    nothing = [(k[:, :, :0], v[:, :, :0]) for k, v in cross]
    ids, places, one = ids[:, None], places[:, None], mask[:, None]  # (R, 1, P)
    if length == 0:
        return Past(nothing, mask)
    _, present = decoder.next_words(ids, places, one, nothing, one[:, :, :0], cross, cross_mask)
    return Past([layer.all for layer in present], mask)


def _after_picture(scene: Scene, model: Blip2Llm, length: int, owners: Tensor) -> Past:
    """The places of the picture come first, where there is room for more than them."""
    llm, rows = model.cfg.llm, len(owners)
    count = model.cfg.qformer.queries if length > model.cfg.qformer.queries else 0
    ids, mask = scene.words(rows, length - count, llm.vocab, left=True)
    mask = F.pad(mask, (count, 0), value=1)  # (R, P)
    if length == 0:
        return Past(_nothing(model, rows), mask)
    prompt = scene.llm_prompt(int(owners.max()) + 1)[owners] if count else None
    _, present = model.next_words(prompt, ids, mask[:, count:], positions_of(mask)[:, count:], None, None)
    return Past([layer.all for layer in present], mask)


def _after_prompt(scene: Scene, model: Blip2Llm, length: int, owners: Tensor, prompt: Seen) -> Past:
    """Words alone, which look at the prompt that they share."""
    assert prompt.mask is not None
    rows = len(owners)
    ids, mask = scene.words(rows, length, model.cfg.llm.vocab, left=True)
    if length == 0:
        return Past(_nothing(model, rows), mask)
    past = [Before(shared=(k[owners], v[owners])) for k, v in prompt.kept]
    shared = prompt.mask[owners]  # (R, C)
    places = shared.sum(1, keepdim=True) + positions_of(mask)
    _, present = model.next_words(None, ids, mask, places, past, None, shared)
    return Past([layer.all for layer in present], mask)


def _nothing(model: Blip2Llm, rows: int) -> list[KeysValues]:
    llm = model.cfg.llm
    nothing = torch.zeros(rows, llm.heads, 0, llm.width // llm.heads)
    return [(nothing, nothing)] * llm.depth
