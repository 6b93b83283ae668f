"""Batches of pictures and texts, made ahead by other processes, and the same whatever their number.

B samples in a batch of this process, S side of a picture, L tokens. A plan says what is in each batch; it comes from samples in
files (`planned`) or from shards (training/shards.py), and `load` decodes it. Imports no torch, so that the processes that
decode start fast and stay small.
"""

from __future__ import annotations

import io
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from models.errors import Misuse, UserError
from preprocess.images import FORMATS, open_rgb
from preprocess.text import CaptionTokenizer, pre_caption
from preprocess.workers import AHEAD, in_order
from training.order import CAPTION, PICTURE, START, Order, Position, randomness
from training.sources import Answers, Samples
from training.transforms import Transform

T = TypeVar("T")


@dataclass(frozen=True)
class Encoded:
    """A picture that stands in memory as its file's bytes."""

    name: str  # for errors: where it comes from
    data: bytes


@dataclass(frozen=True)
class Draw:
    """One sample as one batch wants it."""

    file: Path | Encoded
    transform: Transform
    key: tuple[int, int, int]  # seed, epoch, draw: what its crop is made of
    picture: int  # equal for two captions of one picture
    text: str  # a caption or a question, as annotated
    answers: Answers | None = None  # to the question


@dataclass(frozen=True)
class Planned:
    """One batch before its pictures are decoded."""

    position: Position
    draws: tuple[Draw, ...]  # B


@dataclass(frozen=True)
class Loaded:
    """One batch."""

    position: Position
    pixels: np.ndarray  # (B, 3, S, S) uint8, or in their place features that are kept: (B, T, D) float32
    picture: np.ndarray  # (B,) int64: equal where two samples are of the same picture
    texts: tuple[str, ...]  # B, as annotated
    answers: tuple[Answers, ...] | None = None  # B, None where texts are captions


def planned(
    samples: Samples,
    order: Order,
    transforms: Sequence[Transform],
    start: Position = START,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Planned]:
    """Endless batches of `samples` from `start` on: of each batch what process `rank` of `ranks` gets.

    Args:
        transforms: one for each part of `samples`.

    Raises Misuse as `Order.batches`, and when there are not as many transforms as parts.
    """
    if len(transforms) != len(samples.parts):
        raise Misuse(f"There are {len(transforms)} transforms for {len(samples.parts)} sources; expected one each.")
    ends = np.cumsum([part.count for part in samples.parts])
    for position, draws in order.batches(start, rank, ranks):
        found = []
        for draw in draws.tolist():
            number = draw % order.count
            texts, key = samples.texts[number], (order.seed, position.epoch, draw)
            found.append(
                Draw(
                    samples.pictures[samples.picture[number]],
                    transforms[int(np.searchsorted(ends, number, side="right"))],
                    key,
                    int(samples.picture[number]),
                    texts[0] if len(texts) == 1 else texts[int(randomness(CAPTION, *key).integers(len(texts)))],
                    None if samples.answers is None else samples.answers[number],
                )
            )
        yield Planned(position, tuple(found))


def load(plan: Iterator[Planned], workers: int = 0, prefetch: int = 2) -> Generator[Loaded, None, None]:
    """The batches of a plan, in its order.

    Args:
        workers: processes that decode; 0 and 1 decode in this process, when a batch is asked for.
        prefetch: batches that each of them makes ahead, at most 4.

    Close it (`contextlib.closing`) to stop the workers at once. Raises UserError, naming the file and the reason, for a picture
    that is missing or broken, and when a worker dies.
    """
    with closing(in_order(_decoded, _Stream(_pieces(plan, prefetch)), workers)) as pieces:
        pixels: list[np.ndarray] = []
        draws: list[Draw] = []
        for piece, decoded in pieces:
            pixels.append(decoded)
            draws.extend(piece.draws)
            if piece.last:
                yield _loaded(piece.position, np.concatenate(pixels), draws)
                pixels, draws = [], []


def load_features(plan: Iterator[Planned], features: np.ndarray, prefetch: int = 2) -> Generator[Loaded, None, None]:
    """The batches of a plan with features (P, T, D) in the place of pixels: no picture is opened. A thread reads `prefetch`
    batches ahead. Close it to end the thread."""

    def read(batch: Planned) -> Loaded:
        rows = features.take([draw.picture for draw in batch.draws], axis=0)  # (B, T, D)
        return _loaded(batch.position, rows, batch.draws)

    ahead: deque[Future[Loaded]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for batch in plan:
            ahead.append(pool.submit(read, batch))
            if len(ahead) > prefetch:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def open_encoded(picture: Encoded) -> Image.Image:
    """The picture converted to RGB, as preprocess.images opens a file. Raises UserError, naming it, when it is broken."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in preprocess.images
            with Image.open(io.BytesIO(picture.data), formats=FORMATS) as image:
                return image.convert("RGB")
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{picture.name} is not a picture in a format that Pillow decodes by itself.") from error
    except Exception as error:  # what a decoder raises on a broken file is open
        raise UserError(f"{picture.name} cannot be decoded: {str(error).strip().rstrip('.') or type(error).__name__}.") from error


def tokenised(
    texts: Sequence[str], tokenizer: CaptionTokenizer, max_words: int, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask (B, L) of captions, cleaned as the original cleans them and padded to the longest of them only."""
    ids, mask = tokenizer.encode([pre_caption(text, max_words) for text in texts], max_length)  # (B, max_length)
    length = int(mask.sum(1).max())
    return ids[:, :length], mask[:, :length]


@dataclass(frozen=True)
class _Piece:
    """So much of a batch as one worker does at a time."""

    position: Position
    draws: tuple[Draw, ...]
    last: bool  # of its batch


def _pieces(plan: Iterator[Planned], prefetch: int) -> Iterator[_Piece]:
    """Each worker has AHEAD pieces at a time: this many batches when a piece is this part of one."""
    for batch in plan:
        count = len(batch.draws)
        size = min(count, max(1, -(-count * prefetch // AHEAD)))
        for start in range(0, count, size):
            yield _Piece(batch.position, batch.draws[start : start + size], start + size >= count)


def _decoded(piece: _Piece) -> tuple[_Piece, np.ndarray]:
    """The piece, and its pictures (b, 3, S, S). Runs in a worker, which does not hand back the bytes that it was given."""
    pixels = np.stack([_picture(draw) for draw in piece.draws])
    draws = tuple(replace(d, file=Encoded(d.file.name, b"")) if isinstance(d.file, Encoded) else d for d in piece.draws)
    return replace(piece, draws=draws), pixels


def _picture(draw: Draw) -> np.ndarray:
    image = open_encoded(draw.file) if isinstance(draw.file, Encoded) else open_rgb(draw.file)
    return draw.transform(image, randomness(PICTURE, *draw.key))  # (3, S, S)


def _loaded(position: Position, pixels: np.ndarray, draws: Sequence[Draw]) -> Loaded:
    answers = tuple(draw.answers for draw in draws if draw.answers is not None)
    pictures = np.array([draw.picture for draw in draws], np.int64)  # (B,)
    return Loaded(position, pixels, pictures, tuple(draw.text for draw in draws), answers or None)


class _Stream(Sequence[T]):
    """Items without an end, for `in_order`, which asks how many there are so as to do few in this process."""

    def __init__(self, items: Iterator[T]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[T]:
        return self.items

    def __len__(self) -> int:
        return 1 << 32

    def __getitem__(self, number: Any) -> Any:
        raise TypeError("a stream is read in order")
