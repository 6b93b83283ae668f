"""Which pairs to re-rank: every picture's k most similar captions and every caption's k most similar pictures.

Works in blocks and never holds the N x M matrix. N pictures, M captions, E embedding, Q queries of BLIP-2, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from preprocess.tensors import Tensor
from runtime.outputs import I2T, T2I
from runtime.similarity import blocks

BLOCK_BYTES = 64 << 20  # of one block of similarities


@dataclass(frozen=True)
class Plan:
    """The union of both directions, each pair once, ordered by picture and then by caption."""

    image: np.ndarray  # (P,) int32
    text: np.ndarray  # (P,) int32
    direction: np.ndarray  # (P,) uint8, bits I2T and T2I
    sim: np.ndarray  # (P,) float32


def plan_pairs(image_embed: Tensor, text_embed: Tensor, k: int) -> Plan:
    """Choose the pairs as salesforce/BLIP train_retrieval.py and salesforce/LAVIS compute_sim_matrix do: topk of each row
    and of each column of the similarities; a k above a row's length takes the whole row.

    Args:
        image_embed: (N, E), or (N, Q, E) of BLIP-2; text_embed: (M, E); float32, of unit length.
        k: candidates per query, at least 1.
    """
    captions = len(text_embed)
    texts, i2t_sim = top_k(image_embed, text_embed, k)  # (N, k)
    images, t2i_sim = top_k(text_embed, image_embed, k)  # (M, k)
    # One number per pair, image-major, so that sorting the numbers orders the pairs by picture.
    i2t = (np.arange(len(texts))[:, None] * captions + texts).ravel()
    t2i = (images * captions + np.arange(captions)[:, None]).ravel()
    keys, first = np.unique(np.concatenate([i2t, t2i]), return_index=True)
    direction = np.zeros(len(keys), np.uint8)
    direction[np.searchsorted(keys, i2t)] |= I2T
    direction[np.searchsorted(keys, t2i)] |= T2I
    sim = np.concatenate([i2t_sim.ravel(), t2i_sim.ravel()])[first]
    return Plan((keys // captions).astype(np.int32), (keys % captions).astype(np.int32), direction, sim)


def top_k(queries: Tensor, keys: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (rows, k) int64, ascending, and similarities (rows, k) float32 of the k keys most similar to each query.

    Among equally similar keys at the edge of the list the first ones are taken.
    """
    k = min(k, len(keys))
    found = np.empty((len(queries), k), np.int64)
    sims = np.empty((len(queries), k), np.float32)
    for part, block in blocks(queries, keys, BLOCK_BYTES):  # (rows, K)
        chosen = _chosen(block, k)  # (rows, K) bool, k of them in each row
        found[part] = np.nonzero(chosen)[1].reshape(-1, k)
        sims[part] = block[chosen].reshape(-1, k)
    return found, sims


def _chosen(block: np.ndarray, k: int) -> np.ndarray:
    if k == block.shape[1]:
        return np.ones(block.shape, bool)
    edge = np.partition(block, block.shape[1] - k, axis=1)[:, -k, None]  # the k-th largest
    above = block >= edge
    (tied,) = np.nonzero(above.sum(axis=1) > k)
    for row in tied:
        surplus = above[row].sum() - k
        at_edge = np.flatnonzero(block[row] == edge[row])
        above[row, at_edge[len(at_edge) - surplus :]] = False
    return above
