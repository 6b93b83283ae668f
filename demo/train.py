"""Trains the demo's weights again: the recipe that made demo/weights.safetensors.

python -m demo.train --out build/demo/training
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from demo import shapes
from models.blip import BlipPretrain
from models.errors import Command
from models.presets import BLIP_DEMO
from preprocess.workers import usable_cpus
from training.initial import initialise
from training.options import Files, Options
from training.pretrain import losses_of
from training.run import run

PICTURES = {"train": 30_000, "test": 500}  # of each split
DRAWN_WITH = 1  # the pictures' seed; the held-out ones are those of `make demo`
TOKENIZER = Path(__file__).parent / "tokenizer"
# A third of the training pictures are simple, and 1,500 steps see only them. Matching begins when the decoder knows how to look.
RECIPE = Options(steps=10_000, batchsize=40, together=5, easy=10_000, easy_steps=1_500, itm_after=4_000, lr=1e-3)


@click.command(cls=Command, context_settings={"show_default": True})
@click.option(
    "--out", type=click.Path(path_type=Path), default="build/demo/training", help="Folder for pictures, weights and log."
)
@click.option("--seed", type=click.IntRange(min=0), default=RECIPE.seed, help="Of the training; the pictures stay the same.")
@click.option("--steps", type=click.IntRange(min=1), default=RECIPE.steps, help="Fewer than the recipe's give a worse model.")
def main(out: Path, seed: int, steps: int) -> None:
    """Draw the pictures and train the demo's model on them, from nothing."""
    pictures = draw_pictures(out)
    files = Files(TOKENIZER, pictures / "train.json", pictures, pictures / "test.json", out / "weights.safetensors")
    command = f"python -m demo.train --seed {seed} --steps {steps}"
    model = BlipPretrain(BLIP_DEMO)
    initialise(model, seed)
    run(model, losses_of, files, min(usable_cpus(), 16), replace(RECIPE, seed=seed, steps=steps), command)


def draw_pictures(out: Path) -> Path:
    """Draw both splits; returns their folder."""
    for split, count in PICTURES.items():
        click.echo(f"drawing {count:,} pictures: {split}")
        shapes.write(out / "pictures", split, count, DRAWN_WITH)
    return out / "pictures"


if __name__ == "__main__":
    main()
