"""Five captions for a scene. Each says all that singles the scene out, and each is built in another way.

One compares the two groups, one goes through the halves of the picture, one names the shapes before their colours, one
the colours before the shapes (in the same order), one counts everything and leaves the last count to be worked out.
"""

from __future__ import annotations

import numpy as np

from demo.scenes import Scene, Things

PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "heart": "hearts",
    "cross": "crosses",
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Five captions; `rng` chooses which group comes first in each, and between ways to say it."""
    if scene.simple:
        return simple(scene, rng)
    return [form(scene, rng) for form in (compared, by_halves, shapes_first, colours_first, counted)]


def compared(scene: Scene, rng: np.random.Generator) -> str:
    """One group stands in relation to the other: left of, above."""
    swap = bool(rng.integers(2))
    p, q = _order(scene, swap)
    ways = (
        (("above", "over"), ("below", "under"))
        if scene.vertical
        else (("left of", "to the left of"), ("right of", "to the right of"))
    )
    return f"{_named(p)} {_pick(rng, ways[swap])} {_named(q)} on a {scene.background} background"


def by_halves(scene: Scene, rng: np.random.Generator) -> str:
    """One half of the picture after the other."""
    swap = bool(rng.integers(2))
    p, q = _order(scene, swap)
    here, there = _sides(scene, swap)
    verb = _pick(rng, ("shows", "holds"))
    return f"the {here} half of a {scene.background} picture {verb} {_named(p)} , the {there} half {_named(q)}"


def shapes_first(scene: Scene, rng: np.random.Generator) -> str:
    """Both shapes, then their colours and where one of them is."""
    p, q = _order(scene, bool(rng.integers(2)))
    swap = bool(rng.integers(2))
    r, s = _order(scene, swap)
    where = _at(scene, swap)
    start = f"{_article(p)} {_noun(p)} and {_article(q)} {_noun(q)}"
    colours = f"the {_noun(r)} {_be(r)} {r.colour} and {where} , the {_noun(s)} {_be(s)} {s.colour}"
    return f"{start} , {colours} , all before {scene.background}"


def colours_first(scene: Scene, rng: np.random.Generator) -> str:
    """Both colours and where they are, then the shapes in the same order."""
    swap = bool(rng.integers(2))
    p, q = _order(scene, swap)
    places = f"{p.colour} {_at(scene, swap)} and {q.colour} {_at(scene, not swap)}"
    return (
        f"{places} , namely {NUMBERS[p.count]} {_noun(p)} and {NUMBERS[q.count]} {_noun(q)} , with a {scene.background} backdrop"
    )


def counted(scene: Scene, rng: np.random.Generator) -> str:
    """The number of all shapes, then one group; how many the other has is left to be worked out."""
    swap = bool(rng.integers(2))
    p, q = _order(scene, swap)
    total = NUMBERS[p.count + q.count]
    some = f"{NUMBERS[p.count]} {p.size} {p.colour} {_noun(p)} {_at(scene, swap)}"
    rest = f"the other is a {q.size} {q.colour} {q.shape}" if q.count == 1 else f"the others are {q.size} {q.colour} {_noun(q)}"
    return f"{total} shapes in front of {scene.background} , {some} , {rest}"


def simple(scene: Scene, rng: np.random.Generator) -> list[str]:
    """The same five forms for a scene that holds one group only."""
    swap = scene.first.count == 0
    things, at = (scene.second if swap else scene.first), _at(scene, swap)
    here, there = _sides(scene, swap)
    verb, number = _pick(rng, ("shows", "holds")), NUMBERS[things.count]
    shapes = "shape" if things.count == 1 else "shapes"
    background, noun = scene.background, _noun(things)
    return [
        f"{_named(things)} {at} on a {background} background",
        f"the {here} half of a {background} picture {verb} {_named(things)} , the {there} half nothing",
        f"{_article(things)} {noun} , the {noun} {_be(things)} {things.colour} and {at} , all before {background}",
        f"{things.colour} {at} , namely {number} {noun} , with a {background} backdrop",
        f"{number} {shapes} in front of {background} , {number} {things.size} {things.colour} {noun} {at}",
    ]


def names(scene: Scene) -> list[str]:
    """Two short captions of a simple scene, which say what is there and leave out where and before what."""
    things = scene.second if scene.first.count == 0 else scene.first
    return [_named(things), f"a picture of {_named(things)}"]


def _order(scene: Scene, swap: bool) -> tuple[Things, Things]:
    return (scene.second, scene.first) if swap else (scene.first, scene.second)


def _sides(scene: Scene, swap: bool) -> tuple[str, str]:
    here, there = ("top", "bottom") if scene.vertical else ("left", "right")
    return (there, here) if swap else (here, there)


def _at(scene: Scene, swap: bool) -> str:
    return f"{'at' if scene.vertical else 'on'} the {_sides(scene, swap)[0]}"


def _noun(things: Things) -> str:
    return things.shape if things.count == 1 else PLURALS[things.shape]


def _article(things: Things) -> str:
    return "a" if things.count == 1 else NUMBERS[things.count]


def _named(things: Things) -> str:
    return f"{_article(things)} {things.colour} {_noun(things)}"


def _be(things: Things) -> str:
    return "is" if things.count == 1 else "are"


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]
