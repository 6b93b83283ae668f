"""Every picture and every caption through the encoders, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from models.errors import UserError
from models.spec import LENGTH
from preprocess.dataset import RetrievalData
from preprocess.tensors import Tensor, Writer
from runtime.batches import by_length, prefetched, slices, trimmed
from runtime.session import Session

ShardWork = Callable[[int, int, "tqdm[Any]"], None]


class Pictures(Protocol):
    """Data of any task."""

    @property
    def img(self) -> Tensor: ...  # (N, 3, S, S)


def image_work(data: Pictures, sessions: list[Session], batchsize: int, writers: dict[str, Writer]) -> ShardWork:
    """What one shard of pictures does: `sessions` one after the other, and of what they give that which has a writer."""
    size = picture_batch(sessions, batchsize)

    def work(start: int, stop: int, bar: tqdm[Any]) -> None:
        for part, pictures in prefetched(slices(start, stop, size), lambda part: np.ascontiguousarray(data.img[part])):
            found = look_at(sessions, pictures)
            for name, writer in writers.items():
                refuse_nan(name, found[name])
                writer.write(part.start, found[name].astype(writer.dtype, copy=False))
            bar.update(len(pictures))

    return work


def picture_batch(sessions: list[Session], batchsize: int) -> int:
    """How many pictures go through `sessions` at once: `batchsize`, or the smallest fixed batch."""
    return min(session.batch or batchsize for session in sessions)


def look_at(sessions: list[Session], pictures: np.ndarray) -> dict[str, np.ndarray]:
    """What `sessions` give of pictures (B, 3, S, S), by name. Each is fed the pictures, or what one before it gave."""
    found = {"input_image": pictures}
    for session in sessions:
        found |= session.run(**{tensor.name: found[tensor.name] for tensor in session.spec.inputs})
    return found


def text_work(data: RetrievalData, session: Session, batchsize: int, writer: Writer) -> ShardWork:
    """What one shard of captions does: batches of like length, written back in the order of the data."""

    def work(start: int, stop: int, bar: tqdm[Any]) -> None:
        writer.write(start, embed_captions(session, data.ids[start:stop], data.mask[start:stop], batchsize, bar))

    return work


def embed_captions(
    session: Session, ids: np.ndarray, mask: np.ndarray, batchsize: int, bar: tqdm[Any] | None = None
) -> np.ndarray:
    """ids and mask (C, L) to text_embed (C, E), in batches of like length."""
    (spec,) = session.spec.outputs
    found = np.empty((len(ids), *map(int, spec.sample_shape)), spec.dtype)
    for chosen, rows in text_batches(session, ids, mask, batchsize):
        found[chosen] = rows[spec.name]
        if bar is not None:
            bar.update(len(chosen))
    return found


def text_batches(
    session: Session,
    ids: np.ndarray,
    mask: np.ndarray,
    batchsize: int,
    beside: Callable[[np.ndarray], dict[str, np.ndarray]] = lambda chosen: {},
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Texts ids and mask (M, L) through `session` in batches of like length: which of the texts (B,), and all outputs for them.

    An output that has a row for each token is as long as the longest text of the batch, and zero where a text has ended.
    `beside` gives what else the graph takes for those texts. Raises UserError when the graph gave NaN.
    """
    for chosen in by_length(mask.sum(axis=1), session.batch or batchsize):
        short_ids, short_mask = trimmed(ids[chosen], mask[chosen])
        found = session.run(text_ids=short_ids, text_atten_mask=short_mask, **beside(chosen))
        for spec in session.spec.outputs:
            refuse_nan(spec.name, found[spec.name])
            if LENGTH in spec.shape:
                found[spec.name] = np.where(short_mask[:, :, None] > 0, found[spec.name], 0)  # (B, L, D)
        yield chosen, found


def refuse_nan(name: str, rows: np.ndarray) -> None:
    """Raise UserError when a graph gave NaN or infinity: such numbers would make a plausible but wrong report."""
    if not np.isfinite(rows).all():
        raise UserError(f"The graph gave NaN or infinity in {name}. Check the checkpoint, and the precision of the graphs.")
