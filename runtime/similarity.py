"""How alike pictures and captions are, by their embeddings alone, and that of all pairs in blocks.

N pictures, M captions, E embedding, Q queries that BLIP-2 reads a picture by. Seen from one direction: I items.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from preprocess.tensors import Tensor
from runtime.batches import slices


def similarities(image_embed: np.ndarray, text_embed: np.ndarray) -> np.ndarray:
    """(N, M): the product of the two vectors. BLIP-2 has one vector per query of a picture, and the largest of their
    products counts, without a temperature (salesforce/LAVIS models/blip2_models/blip2.py, compute_sim_matrix).

    Args:
        image_embed: (N, E), or (N, Q, E) of BLIP-2; text_embed: (M, E); all of unit length, float32.
    """
    if image_embed.ndim == 2:
        product: np.ndarray = image_embed @ text_embed.T  # (N, M)
        return product
    best: np.ndarray = image_embed[:, 0] @ text_embed.T  # (N, M)
    for query in range(1, image_embed.shape[1]):  # one at a time: never the (N, Q, M) products of all
        np.maximum(best, image_embed[:, query] @ text_embed.T, out=best)
    return best


def blocks(asking: Tensor, items: Tensor, block_bytes: int) -> Iterator[tuple[slice, np.ndarray]]:
    """The similarities of all that asks with all items, some rows at a time: a slice of `asking`, and (rows, I).

    A block has at most `block_bytes`, or one row when that is more. Either side may be the pictures; those of BLIP-2 are
    known by their three axes.
    """
    table = np.ascontiguousarray(items[:])
    rows = max(1, block_bytes // (4 * len(table)))
    for part in slices(0, len(asking), rows):
        block = np.asarray(asking[part])
        yield part, np.ascontiguousarray(similarities(table, block).T) if table.ndim == 3 else similarities(block, table)
