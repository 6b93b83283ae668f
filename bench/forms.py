"""The sizes that each graph is timed in. Axes as in models/generation_spec.py.

A decoder is timed twice and more: on a prompt with nothing before it, and on one word in the middle of a text, for each number
of beams. Graphs with fixed axes have one form, their own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from models.generation_spec import BEAMS, CROSS, PAST, PROMPT_MASK, QUERIES, ROWS
from models.spec import BATCH, LENGTH, Dim, GraphSpec
from runtime.decoders import parts_of
from runtime.graphs import Graphs, all_sizes

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Load:
    """What is asked of each graph."""

    batchsize: int
    length: int  # tokens of a caption, or of a prompt
    loops: int | None  # None: as many as fit into some seconds
    warmup: int
    threads: int
    provider: str


@dataclass(frozen=True)
class Writing:
    """What is asked of a model that writes words."""

    num_beams: tuple[int, ...]
    new_tokens: int  # of each text, neither fewer nor more
    use_past: tuple[bool, ...]  # with caches, without them, or both


@dataclass(frozen=True)
class Form:
    """The sizes of one graph."""

    sizes: dict[str, int]  # of every axis that is a letter
    part: str = ""  # what it is timed at, where that is not all it does

    @property
    def rows(self) -> int:
        """Sequences, pictures or texts of one run."""
        return self.sizes[BATCH] * self.sizes.get(BEAMS, 1)


@dataclass(frozen=True)
class Places:
    """Where words stand in the decoder."""

    queries: int  # read of the picture before the words
    first: int  # words of the first step
    seen: int  # places that all sequences of a prompt look at, where that is not a picture
    shared: bool = False  # whether these are what the first step gives

    @property
    def before(self) -> int:
        """What stands before the first new word."""
        return self.queries + self.first


def forms(graphs: Graphs, name: str, load: Load, writing: Writing | None) -> list[Form]:
    """The forms that graph `name` is timed in."""
    fixed = all_sizes(graphs, name)
    usual = {BATCH: load.batchsize, LENGTH: load.length}
    letters = {dim for tensor in graphs.symbolic[name].inputs for dim in tensor.shape}
    if writing is None or PAST not in letters:
        return [Form(_of(usual | fixed, letters))]
    places = places_of(graphs, load.length)
    first = {**usual, LENGTH: places.first, BEAMS: 1, ROWS: load.batchsize, PAST: 0, QUERIES: places.queries}
    words = [decode_sizes(places, load.batchsize, beams, writing.new_tokens // 2) for beams in writing.num_beams]
    return [
        Form(_of(first | {CROSS: 0 if places.shared else places.seen}, letters), PREFILL),
        *(Form(_of(sizes, letters), DECODE) for sizes in words),
    ]


def places_of(graphs: Graphs, prompt: int) -> Places:
    """Where words stand after a prompt of so many tokens."""
    parts = parts_of(graphs)
    seen = parts.queries + prompt
    if parts.read:
        return Places(0, 1, seen)
    shared = any(tensor.name == PROMPT_MASK for tensor in graphs.symbolic[parts.write[-1]].inputs)
    return Places(parts.queries, prompt, seen, shared)


def decode_sizes(places: Places, batch: int, beams: int, words: int) -> dict[str, int]:
    """Of a dynamic decoder that reads one word of each sequence after `words` new ones."""
    rows, own = batch * beams, 0 if places.shared else places.before  # words of a row that are not shared
    return {BATCH: batch, BEAMS: beams, LENGTH: 1, ROWS: rows, PAST: own + words, QUERIES: 0, CROSS: places.seen}


def _of(sizes: Mapping[str, int], letters: Collection[Dim]) -> dict[str, int]:
    """Those of the axes that a graph has."""
    return {letter: size for letter, size in sizes.items() if letter in letters}


def bind(spec: GraphSpec, sizes: Mapping[str, int]) -> GraphSpec:
    """The graph with all its axes numbers."""
    return spec.bind(sizes.get(BATCH, 1), sizes.get(LENGTH, 1), **sizes)
