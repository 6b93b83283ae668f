"""Inputs of a graph that a real run could meet, for measuring it.

Keys and values are what the model makes of random pictures and words. Texts are of unequal length, rows go on from other rows
than those in their own place, and what a buffer was not filled with yet is garbage. Axes as in models/generation_spec.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from export.generation_graphs import listed, stacked
from export.random_past import Seen, positions_of, random_past, random_seen
from export.random_scene import Model, Scene
from models.bert import KeysValues
from models.blip2 import Retrieval
from models.generation_spec import BEAMS, CROSS, PAST, PROMPT_KV, PROMPT_MASK, QUERIES, ROWS, SLOTS, layer_names
from models.spec import BATCH, LENGTH, GraphSpec, graph_specs

DECODERS = ("text_decoder", "llm", "llm_decode", "t5_decoder")
LEFT_PADDED = ("llm_prefill",)
GARBAGE = 9.0  # how large what stands in slots that are not filled yet can be; keys and values are about 1


@torch.no_grad()
def random_inputs(name: str, model: Model, batch: int, length: int, seed: int, **others: int) -> dict[str, Tensor]:
    """Inputs of graph `name`. `others` are the sizes of its other axes, by their letters; where S is among them the graph has
    its static form, and its buffer is full when `seed` is odd, and filled in part when it is even."""
    spec = graph_specs(model.cfg, static=SLOTS in others)[name].bind(batch, length, **others)
    scene, sizes = Scene(model, seed), {BATCH: batch, LENGTH: length, BEAMS: 1, **others}
    found = (_deciding if name in DECODERS else _reading)(spec, scene, sizes)
    return {t.name: found[t.name].reshape([int(size) for size in t.shape]) for t in spec.inputs}


def _reading(spec: GraphSpec, scene: Scene, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Of a graph that looks at a picture, reads a text, or both."""
    found = {}
    for tensor in spec.inputs:
        rows = int(tensor.shape[0])
        if tensor.name == "text_ids":
            vocab, left = scene.model.cfg.text.vocab, spec.name in LEFT_PADDED
            found["text_ids"], found["text_atten_mask"] = scene.words(rows, sizes[LENGTH], vocab, left)
        elif tensor.name == "positions":
            found["positions"] = found["llm_prompt"].shape[1] + positions_of(found["text_atten_mask"])
        elif tensor.name == "input_image":
            found["input_image"] = scene.pictures(rows)
        elif tensor.name == "image_feat":
            found["image_feat"] = scene.features(rows)
        elif tensor.name == "llm_prompt":
            found["llm_prompt"] = scene.llm_prompt(rows)
        elif tensor.name == "cross_kv":
            found["cross_kv"] = cast(Retrieval, scene.model).image_kv(scene.features(rows))
    return found


def _deciding(spec: GraphSpec, scene: Scene, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Of a graph that says the next word of each of N rows, which are B, or B * M."""
    batch, static, alone = sizes[BATCH], SLOTS in sizes, spec.name == "llm_decode"
    seen = None if alone else random_seen(scene, batch, sizes.get(CROSS, 0))
    owners = torch.arange(batch).repeat_interleave(1 if alone else sizes[BEAMS])  # (N,) the prompt of each row
    found, mask = (_buffer if static else _rows)(scene, sizes, owners, seen)  # mask: (N, P)
    begun = mask.shape[1] > 0
    if spec.name == "llm":
        assert seen is not None
        assert seen.mask is not None
        prompt = scene.llm_prompt(batch)[owners, : sizes[QUERIES]]  # (N, Q, E)
        begun = begun or seen.mask.shape[1] > 0
        found |= {"llm_prompt": prompt, PROMPT_MASK: seen.mask} | _kept(PROMPT_KV, seen.kept, static)
        mask = torch.cat([seen.mask[owners], mask, mask.new_ones(prompt.shape[:2])], dim=1)  # (N, C + P + Q)
    elif seen is not None:
        found |= _kept("cross_kv", seen.kept, static) | ({} if seen.mask is None else {"cross_mask": seen.mask})
    ids, words = scene.words(len(owners), 1 if static else sizes[LENGTH], int(spec.output("logits").shape[-1]), left=True)
    if begun:  # padding stands before the first word of all
        ids, words = ids.clamp_min(1), torch.ones_like(words)
    found |= {"text_ids": ids, "text_atten_mask": words}  # (N, L)
    if spec.name == "t5_decoder":
        return found | {"positions": (mask.shape[1] + torch.arange(words.shape[1])).expand_as(words)}
    return found | {"positions": mask.sum(1, keepdim=True) + positions_of(words)}


def _rows(scene: Scene, sizes: Mapping[str, int], owners: Tensor, seen: Seen | None) -> tuple[dict[str, Tensor], Tensor]:
    """R rows of the past, the N that are gone on from, and the mask of these (N, P)."""
    theirs = torch.arange(sizes[ROWS]) % sizes[BATCH]  # (R,) the prompt of each row of the past
    past = random_past(scene, sizes[PAST], theirs, seen)
    fitting = (theirs == owners[:, None]).float()  # (N, R)
    fitting[fitting.sum(1) == 0] = 1.0  # fewer rows than prompts: any will do
    index = fitting.multinomial(1, generator=scene.draw)[:, 0]  # (N,)
    mask = past.mask[index]
    return {"beam_index": index, "past_mask": mask} | _kept("past", past.kept, static=False), mask


def _buffer(scene: Scene, sizes: Mapping[str, int], owners: Tensor, seen: Seen | None) -> tuple[dict[str, Tensor], Tensor]:
    """A buffer of S slots for each of N rows, and the mask of those filled (N, P)."""
    slots = sizes[SLOTS]
    filled = slots if scene.seed % 2 or slots == 1 else int(torch.randint(1, slots, (), generator=scene.draw))
    past = random_past(scene, filled, owners, seen)
    kept = stacked(past.kept)  # (N, 2 * layers, H, P, K)
    garbage = GARBAGE * torch.randn(*kept.shape[:3], slots - filled, kept.shape[4], generator=scene.draw)
    return {"past": torch.cat([kept, garbage], dim=3), "past_mask": F.pad(past.mask, (0, slots - filled))}, past.mask


def _kept(prefix: str, pairs: Sequence[KeysValues], static: bool) -> dict[str, Tensor]:
    """Keys and values by the names of the graph's inputs."""
    return {prefix: stacked(pairs)} if static else dict(zip(layer_names(prefix, len(pairs)), listed(pairs), strict=True))
