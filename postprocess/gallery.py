"""Which queries the report shows, what was ranked first for them, and their pictures as data: URIs.

The pictures are rows of the data set's `img` tensor, turned back into pixels: the report needs none of the source files
and shows what the model saw.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from models.errors import UserError
from models.manifest import Manifest
from postprocess.recall import Pairs
from preprocess.tensors import Tensor

HITS, MISSES = 8, 12  # shown per direction
TOP = 3  # candidates shown per query
PIXELS = 288  # longest side of a picture in the report
LOSSLESS = 128  # pictures up to this side are stored as PNG: small drawings


@dataclass(frozen=True)
class Candidate:
    """One entry of a query's ranked list. `rank` counts from 1."""

    item: int
    rank: int
    score: float
    right: bool


@dataclass(frozen=True)
class Card:
    """One query, its best candidates, and where the right answer came."""

    query: int
    top: list[Candidate]
    answer: Candidate | None  # the first right one; None when none was re-ranked
    candidates: int
    itc_rank: int  # of the right answer by similarity alone, from 1

    @property
    def hit(self) -> bool:
        return self.answer is not None and self.answer.rank == 1


@dataclass(frozen=True)
class Gallery:
    """Hits and misses of one direction, and how many there are altogether."""

    hits: list[Card]
    misses: list[Card]
    all_hits: int
    all_misses: int


def gallery(pairs: Pairs, rank: np.ndarray, itc_rank: np.ndarray) -> Gallery:
    """Queries evenly spaced over all hits and over all misses: the same run always shows the same ones."""
    hits, misses = np.flatnonzero(rank == 0), np.flatnonzero(rank > 0)
    return Gallery(
        [card(pairs, int(q), int(itc_rank[q])) for q in spread(hits, HITS)],
        [card(pairs, int(q), int(itc_rank[q])) for q in spread(misses, MISSES)],
        len(hits),
        len(misses),
    )


def card(pairs: Pairs, query: int, itc_rank: int) -> Card:
    """The ranked list of one query, in the order that `recall.ranks` counts by."""
    rows = np.flatnonzero(pairs.query == query)
    item, score = pairs.item[rows], pairs.score[rows]
    order = np.lexsort((item, score))[::-1]  # best first; among equals the higher index
    right = pairs.item_image[item] == pairs.query_image[query]
    listed = [Candidate(int(item[at]), rank, float(score[at]), bool(right[at])) for rank, at in enumerate(order, 1)]
    answer = next((candidate for candidate in listed if candidate.right), None)
    return Card(query, listed[:TOP], answer, len(listed), itc_rank + 1)


class Pictured(Protocol):
    """A data set of any task, as far as its pictures go."""

    @property
    def source(self) -> Manifest: ...

    @property
    def protocol(self) -> dict[str, Any]: ...

    @property
    def images(self) -> list[dict[str, Any]]: ...

    @property
    def img(self) -> Tensor: ...


class Pictures:
    """The pictures of a data set for the page: made when asked for, each once."""

    def __init__(self, data: Pictured) -> None:
        self.data, self.made = data, dict[int, dict[str, Any]]()
        where = data.source.folder
        try:
            self.mean = np.asarray(data.protocol["mean"], np.float32).reshape(3, 1, 1)
            self.std = np.asarray(data.protocol["std"], np.float32).reshape(3, 1, 1)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: the protocol lacks a usable mean and std ({error}). Write the folder again.") from error

    def __call__(self, index: int) -> dict[str, Any]:
        """`uri`, `name` as annotated, and `width` and `height` in pixels before resizing (the shape it is shown in)."""
        if index not in self.made:
            width, height = self.size(index)
            name = str(self.data.images[index].get("image", index))
            self.made[index] = {"uri": self.uri(index), "name": name, "width": width, "height": height}
        return self.made[index]

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels before resizing. Raises UserError when the manifest lacks them."""
        try:
            record = self.data.images[index]
            return max(1, int(record["width"])), max(1, int(record["height"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.data.source.folder}: picture {index} lacks {error}. Write the folder again.") from error

    def frame(self) -> tuple[int, int]:
        """Shape of the box that pictures are shown in: square when all of them are."""
        sizes = map(self.size, range(len(self.data.images)))
        return (1, 1) if all(width == height for width, height in sizes) else (4, 3)

    def uri(self, index: int) -> str:
        """The picture re-encoded."""
        values = np.asarray(self.data.img[index]) * self.std + self.mean  # (3, S, S), 0 .. 1
        pixels = np.nan_to_num(values * 255).round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)  # (S, S, 3)
        return encoded(Image.fromarray(pixels))


def encoded(image: Image.Image) -> str:
    """An RGB picture as a data: URI: PNG when small, else JPEG of at most PIXELS a side."""
    image, file = image.copy(), io.BytesIO()
    if max(image.size) <= LOSSLESS:
        image.save(file, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((PIXELS, PIXELS))
        image.save(file, "JPEG", quality=82, optimize=True)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def spread(indices: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the indices, evenly spaced: the first and the last are among them."""
    if len(indices) <= count:
        return indices
    return indices[np.linspace(0, len(indices) - 1, count).round().astype(np.int64)]
