"""blip-train: pictures and captions to a checkpoint."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from models import config
from models.errors import Group, Misuse, extra
from preprocess.workers import usable_cpus
from training.options import Files, Options

Function = TypeVar("Function", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path)
PRESET = "blip-demo"  # when neither --model nor --config says otherwise
DEFAULTS = {field.name: field.default for field in fields(Options)}
POSITIVE, NATURAL, SHARE = click.IntRange(min=1), click.IntRange(min=0), click.FloatRange(min=0, min_open=True)


@click.group(cls=Group)
def main() -> None:
    """Train BLIP."""


def option(name: str, kind: Any, text: str) -> Callable[[Function], Function]:
    """An option of `Options`, with its default."""
    return click.option(f"--{name.replace('_', '-')}", type=kind, default=DEFAULTS[name], help=text)


@main.command("pretrain", context_settings={"show_default": True})
@click.option("--model", "name", show_default=PRESET, help=f"Sizes: a preset, {', '.join(config.PRESETS)}.")
@click.option("--config", "config_file", type=FOLDER, help="Sizes: a JSON file, in place of a preset.")
@click.option("--tokenizer", type=FOLDER, default="demo/tokenizer", help="vocab.txt or tokenizer.json of BERT, or its folder.")
@click.option("--annotations", type=FOLDER, required=True, help="JSON: the Karpathy form of BLIP, or Karpathy's own file.")
@click.option("--images", type=FOLDER, required=True, help="Folder that the picture paths start from.")
@click.option("--held-out", type=FOLDER, help="Such JSON to measure recall on; its pictures lie below --images too.")
@click.option(
    "--out", type=FOLDER, default="build/train/weights.safetensors", help="Checkpoint to write; its log lies beside it."
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=lambda: min(usable_cpus(), 16),
    show_default="one per CPU, at most 16",
    help="Processes that decode.",
)
@option("steps", POSITIVE, "Batches to train on.")
@option("batchsize", POSITIVE, "Pictures in a batch.")
@option("together", POSITIVE, "So many pictures in a row stay in one batch: near-duplicates become hard negatives.")
@option("easy", NATURAL, "The first so many pictures are easy ones (0: none).")
@option("easy_steps", NATURAL, "Steps at the start that see only the easy ones.")
@option("itm_after", NATURAL, "Steps at the start without the matching loss.")
@option("lr", SHARE, "Learning rate after the warm-up.")
@option("warmup", NATURAL, "Steps of rising learning rate.")
@option("weight_decay", click.FloatRange(min=0), "Of the matrices.")
@option("clip", SHARE, "Largest norm of the gradient.")
@option("shift", NATURAL, "Pictures are moved by up to so many pixels.")
@option("seed", NATURAL, "Of the first weights, the order and the negatives.")
@option("validate_every", POSITIVE, "Steps between measurements on --held-out.")
@click.option("--bf16/--fp32", default=True, help="Precision of the matrix products.")
def pretrain_command(name: str | None, config_file: Path | None, workers: int, **values: Any) -> None:
    """Train from nothing with the losses ITC, ITM and LM. Of Karpathy's own file train is learnt and test held out."""
    if name is not None and config_file is not None:
        raise Misuse(f"--model {name} and --config {config_file} both give the sizes. Leave one out.")
    cfg = config.from_file(config_file) if config_file is not None else config.preset(PRESET if name is None else name)
    with extra("torch"):
        from training.run import run
    files = Files(**{field.name: values.pop(field.name) for field in fields(Files)})
    run(cfg, files, workers, Options(**values), shlex.join(["blip-train", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
