"""Draws the demo's captioned pictures: coloured shapes in two groups, five differently built captions each.

    python -m demo.shapes --split test --count 500 --seed 1 --out build/demo/pictures

Writes `<out>/<split>.json` in Karpathy's form and `<out>/<split>/0001.png`, ... The same arguments give the same bytes. With
--names also `<out>/<split>_with_names.json`, where pictures of one group have two short captions more, as labels are short.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageDraw

from demo.captions import captions
from demo.captions import names as short_captions
from demo.scenes import SPLITS, Scene, Things, scenes
from models import manifest
from models.errors import Command, Misuse

COLOURS = {
    "red": (214, 40, 40),
    "yellow": (250, 210, 35),
    "green": (30, 145, 65),
    "blue": (37, 84, 220),
    "purple": (150, 55, 200),
    "white": (252, 252, 252),
    "black": (24, 24, 28),
}
BACKGROUNDS = {
    "grey": (158, 163, 170),
    "pink": (250, 188, 204),
    "brown": (122, 86, 60),
    "teal": (88, 190, 186),
    "cream": (246, 232, 196),
}
RADIUS = {"small": 0.1, "large": 0.13}  # share of the picture's side
LOOSE = 0.015  # how far a thing may be off its place, as a share of the side
SIDE = 160  # pixels
FINER = 3  # drawn so many times larger, then scaled down: smooth edges
FORM = 1  # of what is drawn and written: with a new one the set is drawn again


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The picture (SIDE, SIDE). `rng` chooses the layout alone: the same one puts near-duplicates at the same places."""
    side = SIDE * FINER
    picture = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(picture)
    for things, middle in ((scene.first, 0.25), (scene.second, 0.75)):
        along = middle + rng.uniform(-LOOSE, LOOSE)  # the axis that parts the two groups
        across = 0.5 + rng.uniform(-LOOSE, LOOSE)
        loose, turns, scale = rng.uniform(-LOOSE, LOOSE, 3), rng.uniform(-0.1, 0.1, 3), rng.uniform(0.96, 1.04)
        for n in range(things.count):
            place = (along + loose[n], across + 0.29 * (n - (things.count - 1) / 2))
            x, y = reversed(place) if scene.vertical else place
            shape(canvas, things, (x * side, y * side), RADIUS[things.size] * scale * side, turns[n])
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def shape(canvas: ImageDraw.ImageDraw, things: Things, centre: tuple[float, float], radius: float, turn: float) -> None:
    """One shape with a thin darker rim, turned by `turn` radians about `centre` (pixels)."""
    fill = COLOURS[things.colour]
    rim = tuple(int(0.72 * c) for c in fill)
    (x, y), cos, sin = centre, math.cos(turn), math.sin(turn)
    for scale, colour in ((radius, rim), (0.9 * radius, fill)):
        if things.shape == "circle":
            canvas.ellipse((x - scale, y - scale, x + scale, y + scale), fill=colour)
        else:
            corners = [(x + scale * (u * cos - v * sin), y + scale * (u * sin + v * cos)) for u, v in OUTLINES[things.shape]]
            canvas.polygon(corners, fill=colour)


def _star() -> list[tuple[float, float]]:
    radii = [1.15 if n % 2 == 0 else 0.5 for n in range(10)]
    return [(r * math.sin(n * math.pi / 5), -r * math.cos(n * math.pi / 5)) for n, r in enumerate(radii)]


def _heart() -> list[tuple[float, float]]:
    ts = [2 * math.pi * n / 60 for n in range(60)]
    return [
        (1.1 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 14.5)
        for t in ts
    ]


ARM = 0.36  # half the width of a cross's arm
# Corners in units of the radius, y downwards. Areas are made to look alike.
OUTLINES = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -1.1), (1.08, 0.85), (-1.08, 0.85)],
    "star": _star(),
    "heart": _heart(),
    "cross": [
        (-ARM, -1.05), (ARM, -1.05), (ARM, -ARM), (1.05, -ARM), (1.05, ARM), (ARM, ARM),
        (ARM, 1.05), (-ARM, 1.05), (-ARM, ARM), (-1.05, ARM), (-1.05, -ARM), (-ARM, -ARM),
    ],
}  # fmt: skip


def write(out: Path, split: str, count: int, seed: int) -> bool:
    """Write the set; False when `out` already holds it, drawn with the same arguments.

    The pictures are drawn beside and renamed, and the annotations come last: their presence means that the set is whole.
    An earlier set is replaced. Raises Misuse for a count out of reach, and when what would be replaced was not drawn here.
    """
    if not 0 < count <= SPLITS[split]:
        raise Misuse(f"--count is {count:,}; the {split} split gives 1 to {SPLITS[split]:,} pictures of different scenes.")
    arguments = {"form": FORM, "split": split, "count": count, "seed": seed}
    annotations, pictures, made = out / f"{split}.json", out / split, out / f".{split}.made.json"
    whole = annotations.is_file() and pictures.is_dir()
    if whole and made.is_file() and made.read_text("utf-8") == json.dumps(arguments):
        return False
    for found in (annotations, pictures):
        if found.exists() and not made.is_file():
            raise Misuse(f"{found} was not drawn by demo.shapes, which would replace it. Choose another --out, or move it away.")
    part = out / f".{split}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        entries = []
        for number, (scene, layout, wording) in enumerate(scenes(split, count, seed), 1):
            draw(scene, np.random.default_rng(layout)).save(part / f"{number:04d}.png", optimize=False)
            texts = captions(scene, np.random.default_rng(wording))
            entries.append({"image": f"{split}/{number:04d}.png", "caption": texts, "image_id": number})
        annotations.unlink(missing_ok=True)
        manifest.write_text(made, json.dumps(arguments))  # from here on the pictures count as drawn here, whole or not
        shutil.rmtree(pictures, ignore_errors=True)
        part.rename(pictures)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    manifest.write_text(annotations, "[\n" + ",\n".join(json.dumps(e) for e in entries) + "\n]\n")
    return True


def write_names(out: Path, split: str, count: int, seed: int) -> Path:
    """Annotations of a set that was written, with the short captions; returns them."""
    entries = json.loads((out / f"{split}.json").read_text("utf-8"))
    for entry, (scene, _, _) in zip(entries, scenes(split, count, seed), strict=True):
        entry["caption"] += short_captions(scene) if scene.simple else []
    named = out / f"{split}_with_names.json"
    manifest.write_text(named, json.dumps(entries))
    return named


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), default="build/demo/pictures", help="Folder for the set.")
@click.option("--split", type=click.Choice(list(SPLITS)), default="test", help="Scenes to train on, or those held out.")
@click.option("--count", type=int, default=500, help="Pictures.")
@click.option("--seed", type=click.IntRange(min=0), default=1)
@click.option("--names", is_flag=True, help="Also annotations with short captions, for zero-shot classification.")
def main(out: Path, split: str, count: int, seed: int, names: bool) -> None:
    """Draw captioned pictures of coloured shapes, the same for the same arguments."""
    drawn = write(out, split, count, seed)
    click.echo(f"{out / split}.json: {count:,} pictures{'' if drawn else ', drawn before'}")
    if names:
        click.echo(f"{write_names(out, split, count, seed)}: the same, with short captions of simple pictures")


if __name__ == "__main__":
    main()
