"""What a caption says of a drawn picture, attribute by attribute, and whether it is so.

Two groups with count, colour, shape and side, and the background: nine attributes. Read are the five forms of captions.py;
what is not one of them says nothing.

python -m demo.attributes --captions build/captions/captions.json
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from demo.captions import NUMBERS, PLURALS
from demo.scenes import BACKGROUNDS, COLOURS, SIZES, Scene, scenes
from models.errors import Command, UserError

PARTS = ("count", "colour", "shape", "side")
COUNTS = {"a": 1, **{word: number for number, word in enumerate(NUMBERS)}}
SINGULAR = {plural: shape for shape, plural in PLURALS.items()}
SIDES = {"left": "left", "right": "right", "top": "top", "bottom": "bottom", "above": "top", "over": "top", "below": "bottom"}
SIDES["under"] = "bottom"
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


def _any(words: object, name: str) -> str:
    return f"(?P<{name}>{'|'.join(words)})"  # type: ignore[arg-type]


def _named(n: int) -> str:
    return f"{_any(COUNTS, f'count{n}')} {_any(COLOURS, f'colour{n}')} {_any([*PLURALS, *SINGULAR], f'shape{n}')}"


_SHAPE = [*SINGULAR, *PLURALS]
_GROUND = _any(BACKGROUNDS, "background")
_AT = "(?:on|at) the "
FORMS = [
    re.compile(form)
    for form in (
        rf"{_named(1)} (?:to the )?{_any(SIDES, 'side1')}(?: of)? {_named(2)} on a {_GROUND} background",
        rf"the {_any(OPPOSITE, 'side1')} half of a {_GROUND} picture (?:shows|holds) {_named(1)} , "
        rf"the {_any(OPPOSITE, 'side2')} half {_named(2)}",
        rf"{_any(COUNTS, 'countA')} {_any(_SHAPE, 'shapeA')} and {_any(COUNTS, 'countB')} {_any(_SHAPE, 'shapeB')} , "
        rf"the {_any(_SHAPE, 'shape1')} (?:is|are) {_any(COLOURS, 'colour1')} and {_AT}{_any(OPPOSITE, 'side1')} , "
        rf"the {_any(_SHAPE, 'shape2')} (?:is|are) {_any(COLOURS, 'colour2')} , all before {_GROUND}",
        rf"{_any(COLOURS, 'colour1')} {_AT}{_any(OPPOSITE, 'side1')} and {_any(COLOURS, 'colour2')} {_AT}"
        rf"{_any(OPPOSITE, 'side2')} , namely {_any(COUNTS, 'count1')} {_any(_SHAPE, 'shape1')} and "
        rf"{_any(COUNTS, 'count2')} {_any(_SHAPE, 'shape2')} , with a {_GROUND} backdrop",
        rf"{_any(COUNTS, 'total')} shapes in front of {_GROUND} , {_any(COUNTS, 'count1')} (?:{'|'.join(SIZES)}) "
        rf"{_any(COLOURS, 'colour1')} {_any(_SHAPE, 'shape1')} {_AT}{_any(OPPOSITE, 'side1')} , the (?:other is a|others are) "
        rf"(?:{'|'.join(SIZES)}) {_any(COLOURS, 'colour2')} {_any(_SHAPE, 'shape2')}",
    )
]


@dataclass(frozen=True)
class Group:
    """What is said of one group; None where nothing is."""

    count: int | None = None
    colour: str | None = None
    shape: str | None = None
    side: str | None = None


@dataclass(frozen=True)
class Told:
    """What a caption says."""

    groups: tuple[Group, Group] = (Group(), Group())
    background: str | None = None


def read(caption: str) -> Told:
    """What `caption` says, as far as it is one of the five forms."""
    spaced = re.sub(r"\s*,\s*", " , ", caption.strip())  # decoding puts a comma to the word before it
    found = next((match for form in FORMS if (match := form.fullmatch(spaced))), None)
    if found is None:
        return Told()
    said = {name: text for name, text in found.groupdict().items() if text is not None}
    if "countA" in said:  # the counts stand with the shapes, before the colours
        counts = {_shape(said["shapeA"]): said["countA"], _shape(said["shapeB"]): said["countB"]}
        said |= {f"count{n}": counts.get(_shape(said[f"shape{n}"]), "no") for n in (1, 2)}
    first, second = (_group(said, n) for n in (1, 2))
    if "total" in said and first.count is not None:
        second = Group(COUNTS[said["total"]] - first.count, second.colour, second.shape, second.side)
    if first.side and not second.side:
        second = Group(second.count, second.colour, second.shape, OPPOSITE[first.side])
    return Told((first, second), said["background"])


def truth(scene: Scene) -> Told:
    """What is to be said of `scene`."""
    sides = ("top", "bottom") if scene.vertical else ("left", "right")
    first, second = (
        Group(things.count, things.colour, things.shape, side)
        for things, side in zip((scene.first, scene.second), sides, strict=True)
    )
    return Told((first, second), scene.background)


def right(told: Told, true: Told) -> dict[str, int]:
    """How many attributes of each kind are right: of two groups, told in either order, and of the background."""
    ways = []
    for order in itertools.permutations(told.groups):
        pairs = list(zip(order, true.groups, strict=True))
        ways.append({part: sum(getattr(a, part) == getattr(b, part) for a, b in pairs) for part in PARTS})
    best = max(ways, key=lambda way: sum(way.values()))
    return best | {"background": int(told.background == true.background)}


def score(captions: Mapping[int, str], true: list[Scene]) -> dict[str, float]:
    """Percent of the attributes of each kind that captions, by the number of their picture, say rightly; and of captions that
    say all nine rightly."""
    total: Counter[str] = Counter()
    for number, caption in captions.items():
        found = right(read(caption), truth(true[number]))
        total.update(found, all=int(sum(found.values()) == 2 * len(PARTS) + 1))
    each = dict.fromkeys(PARTS, 2) | {"background": 1, "all": 1}
    return {part: 100 * total[part] / (many * max(len(captions), 1)) for part, many in each.items()}


def _group(said: Mapping[str, str], n: int) -> Group:
    side = said.get(f"side{n}")
    count = said.get(f"count{n}")
    return Group(
        None if count is None else COUNTS[count],
        said[f"colour{n}"],
        _shape(said[f"shape{n}"]),
        SIDES[side] if side else None,
    )


def _shape(word: str) -> str:
    return SINGULAR.get(word, word)


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--captions", type=click.Path(path_type=Path), required=True, help="captions.json of `blip-run caption`.")
@click.option("--split", default="test", help="Which pictures of `python -m demo.shapes` they are of.")
@click.option("--seed", type=int, default=1, help="What those were drawn with.")
def main(captions: Path, split: str, seed: int) -> None:
    """Say how much of the captions of drawn pictures is so."""
    try:
        entries = json.loads(captions.read_text("utf-8"))
        said = {int(entry["image_id"]) - 1: str(entry["caption"]) for entry in entries}  # the first picture has id 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{captions} is not a list of image_id and caption ({error}). Give captions.json of blip-run.") from error
    if not said or min(said) < 0:
        raise UserError(f"{captions} holds no captions of drawn pictures, whose image_id begins with 1.")
    true = [scene for scene, _, _ in scenes(split, max(said) + 1, seed)]
    found = score(said, true)
    click.echo(f"Attributes told rightly, percent of {len(said):,} captions:")
    click.echo("  " + "  ".join(f"{part} {value:.1f}" for part, value in found.items() if part != "all"))
    click.echo(f"  all nine of a picture: {found['all']:.1f}")


if __name__ == "__main__":
    main()
