"""What the demo's pictures show: two groups of coloured shapes, and which scenes are never trained on.

A scene says how many of which shape in which colour, on which side, before which background. Scenes come in families
of five near-duplicates: all differ from the first in just one thing (colours, sides or counts swapped; one colour, shape
or count, the direction or the background changed). So words or colours alone, without what belongs to what, do not find
a picture. The scene itself says whether it is held out, so pictures of the two splits never show the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

COLOURS = ("red", "yellow", "green", "blue", "purple", "white", "black")
BACKGROUNDS = ("grey", "pink", "brown", "teal", "cream")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
SIZES = ("small", "large")
MOST = 3  # things in one group
TOGETHER = 5  # near-duplicates in one family
SIMPLE = 3  # in training one family of so many is of simple scenes; they come first
HELD_OUT = 0.2  # share of the scenes that is never trained on
SPLITS = {"train": 40_000, "test": 5_000}  # pictures that can be asked for: about half of the scenes there are


@dataclass(frozen=True)
class Things:
    """One group of equal shapes."""

    count: int
    colour: str
    shape: str
    size: str


NOTHING = Things(0, "", "", "")


@dataclass(frozen=True)
class Scene:
    """`first` is on the left of `second`, or above it when `vertical`. Their colours differ, and so do their shapes.

    In a simple scene, which only training uses, one of them is NOTHING: it teaches the words one by one.
    """

    vertical: bool
    background: str
    first: Things
    second: Things

    @property
    def key(self) -> str:
        """What must be told apart. Sizes and layout are not part: a held-out scene is unseen at every size."""
        parts = [f"{t.count} {t.colour} {t.shape}".strip() for t in (self.first, self.second)]
        return f"{(' | ', ' / ')[self.vertical].join(parts)} on {self.background}"

    @property
    def simple(self) -> bool:
        """Only one group is there."""
        return NOTHING in (self.first, self.second)

    @property
    def sound(self) -> bool:
        """Colours and shapes differ, so that each group can be named by either."""
        return self.first.colour != self.second.colour and self.first.shape != self.second.shape


def is_held_out(scene: Scene) -> bool:
    """Decided by the scene alone, whatever the seed and the count: a held-out scene is never trained on."""
    return hashlib.sha256(scene.key.encode()).digest()[0] < 256 * HELD_OUT


def random_scene(rng: np.random.Generator, simple: bool = False) -> Scene:
    """Any scene, of either split; of one group only when `simple`."""
    colours, shapes = rng.choice(COLOURS, 2, replace=False), rng.choice(SHAPES, 2, replace=False)
    sizes, counts = rng.choice(SIZES, 2), rng.integers(1, MOST + 1, 2)
    first, second = (Things(int(counts[n]), str(colours[n]), str(shapes[n]), str(sizes[n])) for n in (0, 1))
    scene = Scene(bool(rng.integers(2)), str(rng.choice(BACKGROUNDS)), first, second)
    if simple:
        return replace(scene, first=NOTHING) if rng.integers(2) else replace(scene, second=NOTHING)
    return scene


def near_duplicates(scene: Scene) -> list[list[Scene]]:
    """Scenes that differ from `scene` in one thing, a list for each kind of thing."""
    a, b = scene.first, scene.second

    def each(name: str, options: tuple[Any, ...]) -> list[Scene]:
        firsts = [replace(scene, first=replace(a, **{name: v})) for v in options if a.count and v != getattr(a, name)]
        seconds = [replace(scene, second=replace(b, **{name: v})) for v in options if b.count and v != getattr(b, name)]
        return [s for s in firsts + seconds if s.sound]

    swaps = []
    if not scene.simple:
        swaps.append([replace(scene, first=replace(a, colour=b.colour), second=replace(b, colour=a.colour))])
        if a.count != b.count:
            swaps.append([replace(scene, first=replace(a, count=b.count), second=replace(b, count=a.count))])
    return [
        *swaps,
        [replace(scene, first=b, second=a)],
        [replace(scene, vertical=not scene.vertical)],
        each("count", tuple(range(1, MOST + 1))),
        each("shape", SHAPES),
        each("colour", COLOURS),
        [replace(scene, background=name) for name in BACKGROUNDS if name != scene.background],
    ]


def family(rng: np.random.Generator, held_out: bool, simple: bool, used: set[str]) -> list[Scene]:
    """A scene and near-duplicates of it, TOGETHER in all: of one split, and none of them in `used`."""
    while True:
        scene = random_scene(rng, simple)
        members = [scene]
        kinds = near_duplicates(scene)
        for kind in rng.permutation(len(kinds)):
            fit = [s for s in kinds[kind] if is_held_out(s) == held_out and s.key not in used]
            if fit and len(members) < TOGETHER:
                members.append(fit[rng.integers(len(fit))])
        if len(members) == TOGETHER and is_held_out(scene) == held_out and scene.key not in used:
            return members


def scenes(split: str, count: int, seed: int) -> Iterator[tuple[Scene, int, int]]:
    """`count` different scenes of the split, each with two seeds: of its group's layout, and of its own captions."""
    used: set[str] = set()
    families = -(-count // TOGETHER)
    for group in range(families):
        start = [seed, list(SPLITS).index(split), group]
        simple = split == "train" and group < families // SIMPLE
        for member, scene in enumerate(family(np.random.default_rng(start), split == "test", simple, used)):
            # There are too few simple scenes for all to differ.
            if not simple:
                used.add(scene.key)
            if group * TOGETHER + member < count:
                layout, wording = np.random.SeedSequence(start).generate_state(2)
                yield scene, int(layout), int(wording) + member
