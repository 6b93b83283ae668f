"""Draws the demo's pictures for zero-shot classification: one coloured shape each, of 42 classes.

    python -m demo.labelled --out build/demo/labelled

Writes a folder of pictures per class, `<out>/red_star/001.png`, ... The same arguments give the same bytes. No picture
shows a scene that training has seen: the scene decides that (demo/scenes.py).
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

from demo.scenes import BACKGROUNDS, COLOURS, NOTHING, SHAPES, SIZES, Scene, Things, is_held_out
from demo.shapes import FORM, draw
from models.errors import Command, Misuse

MADE = ".made.json"  # in the folder: what it was drawn with
CLASSES = [f"{colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)]


def scenes(each: int, seed: int) -> Iterator[tuple[Scene, int]]:
    """`each` held-out scenes of every class with its number, and among them no two alike as far as there are enough."""
    for label, (colour, shape) in enumerate(itertools.product(COLOURS, SHAPES)):
        rng = np.random.default_rng([seed, label])
        places = [
            Scene(vertical, background, *((thing, NOTHING) if first else (NOTHING, thing)))
            for vertical, background, first, size in itertools.product((False, True), BACKGROUNDS, (False, True), SIZES)
            if (thing := Things(1, colour, shape, size))
        ]
        unseen = [scene for scene in places if is_held_out(scene)]
        order = rng.permutation(len(unseen))
        for number in range(each):
            yield unseen[order[number % len(unseen)]], label


def write(out: Path, each: int, seed: int) -> bool:
    """Write the set; False when `out` already holds it, drawn with the same arguments.

    Drawn beside and renamed. An earlier set is replaced. Raises Misuse when `out` is something that was not drawn here.
    """
    arguments = json.dumps({"form": FORM, "each": each, "seed": seed})
    out = out.resolve()
    made, part = out / MADE, out.with_name(f".{out.name}.part")
    if made.is_file() and made.read_text("utf-8") == arguments:
        return False
    if out.exists() and not made.is_file():
        raise Misuse(f"{out} was not drawn by demo.labelled, which would replace it. Choose another --out.")
    shutil.rmtree(part, ignore_errors=True)
    try:
        for number, (scene, label) in enumerate(scenes(each, seed)):
            folder = part / CLASSES[label].replace(" ", "_")
            folder.mkdir(parents=True, exist_ok=True)
            draw(scene, np.random.default_rng([seed, number])).save(folder / f"{number % each + 1:03d}.png", optimize=False)
        (part / MADE).write_text(arguments, "utf-8")
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return True


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), default="build/demo/labelled", help="Folder for the set.")
@click.option("--each", type=click.IntRange(min=1, max=100), default=10, help="Pictures of each class.")
@click.option("--seed", type=click.IntRange(min=0), default=1)
def main(out: Path, each: int, seed: int) -> None:
    """Draw labelled pictures of one coloured shape each, the same for the same arguments."""
    drawn = write(out, each, seed)
    click.echo(f"{out}: {len(CLASSES) * each:,} pictures of {len(CLASSES)} classes{'' if drawn else ', drawn before'}")


if __name__ == "__main__":
    main()
