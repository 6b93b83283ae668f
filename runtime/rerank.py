"""Scoring the planned pairs, picture by picture: the heavy part.

The original scores caption by caption and computes the keys and values of the picture again for every pair. Here they
are computed once per picture, its captions go through the text layers in batches of like length, and a pair that both
directions want is scored once. The numbers are the same to float rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from preprocess.dataset import RetrievalData
from preprocess.tensors import Tensor, Writer
from preprocess.text import with_first
from runtime.batches import by_length, prefetched, trimmed
from runtime.embed import ShardWork, refuse_nan
from runtime.plan import Plan
from runtime.session import Session


def pair_work(
    data: RetrievalData, feats: Tensor, plan: Plan, sessions: list[Session], batchsize: int, writer: Writer
) -> ShardWork:
    """What one shard of pairs does. `sessions` are `image_kv` and `itm_cached`, or `itm` alone."""
    ids, mask = itm_ids(data), np.asarray(data.mask[:])

    def read(span: tuple[int, int]) -> np.ndarray:
        return np.asarray(feats[int(plan.image[span[0]])][None], np.float32)  # (1, T, D)

    def work(start: int, stop: int, bar: tqdm[Any]) -> None:
        for (first, last), feat in prefetched(_pictures(plan, start, stop), read):
            texts = plan.text[first:last]
            logits = score_picture(sessions, feat, ids[texts], mask[texts], batchsize, bar)
            refuse_nan("itm_logits", logits)
            writer.write(first, logits)

    return work


def score_picture(
    sessions: list[Session], feat: np.ndarray, ids: np.ndarray, mask: np.ndarray, batchsize: int, bar: tqdm[Any] | None = None
) -> np.ndarray:
    """The captions of one picture: feat (1, T, D), ids and mask (C, L) to itm_logits (C, 2)."""
    itm = sessions[-1]
    cached = len(sessions) == 2
    kv = sessions[0].run(image_feat=feat)["cross_kv"] if cached else None
    (spec,) = itm.spec.outputs
    found = np.empty((len(ids), *map(int, spec.sample_shape)), spec.dtype)
    for chosen in by_length(mask.sum(axis=1), itm.batch or batchsize):
        short_ids, short_mask = trimmed(ids[chosen], mask[chosen])
        picture = {"cross_kv": kv} if kv is not None else {"image_feat": np.repeat(feat, len(chosen), axis=0)}
        found[chosen] = itm.run(text_ids=short_ids, text_atten_mask=short_mask, **picture)[spec.name]
        if bar is not None:
            bar.update(len(chosen))
    return found


def itm_ids(data: RetrievalData) -> np.ndarray:
    """(M, L) int64: the captions with [ENC] in the first place, as salesforce/BLIP train_retrieval.py sets it."""
    return with_first(data.ids[:], data.encode_id)


def pair_shards(plan: Plan, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of shards of at least `size` pairs that never cut a picture in two."""
    ends = np.append(np.flatnonzero(np.diff(plan.image)) + 1, len(plan.image))
    start = 0
    for end in ends:
        if end - start >= size or end == len(plan.image):
            yield start, int(end)
            start = int(end)


def _pictures(plan: Plan, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(first, last) of the pairs of each picture between `start` and `stop`."""
    cuts = start + 1 + np.flatnonzero(np.diff(plan.image[start:stop]))
    edges = [start, *cuts.tolist(), stop]
    yield from itertools.pairwise(edges)
