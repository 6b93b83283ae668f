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
BLIP, BLIP2 = "blip-demo", "blip2-demo"  # when neither --model nor --config says otherwise
DEFAULTS = {field.name: field.default for field in fields(Options)}
POSITIVE, NATURAL, SHARE = click.IntRange(min=1), click.IntRange(min=0), click.FloatRange(min=0, min_open=True)


@click.group(cls=Group)
def main() -> None:
    """Train BLIP, or BLIP-2's first stage."""


def option(name: str, kind: Any, text: str) -> Callable[[Function], Function]:
    """An option of `Options`, with its default."""
    return click.option(f"--{name.replace('_', '-')}", type=kind, default=DEFAULTS[name], help=text)


def sources(function: Function) -> Function:
    """The options that say what is trained on, and where the result goes."""
    for decorate in reversed(
        (
            click.option(
                "--annotations", type=FOLDER, required=True, help="JSON: the Karpathy form of BLIP, or Karpathy's own file."
            ),
            click.option("--images", type=FOLDER, required=True, help="Folder that the picture paths start from."),
            click.option("--held-out", type=FOLDER, help="Such JSON to measure recall on; its pictures lie below --images too."),
            click.option(
                "--out",
                type=FOLDER,
                default="build/train/weights.safetensors",
                help="Checkpoint to write; its log lies beside it.",
            ),
            click.option(
                "--workers",
                type=click.IntRange(1, 256),
                default=lambda: min(usable_cpus(), 16),
                show_default="one per CPU, at most 16",
                help="Processes that decode.",
            ),
            option("steps", POSITIVE, "Batches to train on."),
            option("batchsize", POSITIVE, "Pictures in a batch."),
            option("together", POSITIVE, "So many pictures in a row stay in one batch: near-duplicates become hard negatives."),
            option("easy", NATURAL, "The first so many pictures are easy ones (0: none)."),
            option("easy_steps", NATURAL, "Steps at the start that see only the easy ones."),
            option("itm_after", NATURAL, "Steps at the start without the matching loss."),
            option("lr", SHARE, "Learning rate after the warm-up."),
            option("warmup", NATURAL, "Steps of rising learning rate."),
            option("weight_decay", click.FloatRange(min=0), "Of the matrices."),
            option("clip", SHARE, "Largest norm of the gradient."),
            option("shift", NATURAL, "Pictures are moved by up to so many pixels."),
            option("seed", NATURAL, "Of the first weights, the order and the negatives."),
            option("validate_every", POSITIVE, "Steps between measurements on --held-out."),
            click.option("--bf16/--fp32", default=True, help="Precision of the matrix products."),
        )
    ):
        function = decorate(function)
    return function


def sizes(preset: str) -> Callable[[Function], Function]:
    """The options that say what is trained: `preset` when nothing else is said."""

    def decorate(function: Function) -> Function:
        for option in (
            click.option(
                "--tokenizer", type=FOLDER, default="demo/tokenizer", help="vocab.txt or tokenizer.json of BERT, or its folder."
            ),
            click.option("--config", "config_file", type=FOLDER, help="Sizes: a JSON file, in place of a preset."),
            click.option("--model", "name", show_default=preset, help=f"Sizes: a preset, {', '.join(config.PRESETS)}."),
        ):
            function = option(function)
        return function

    return decorate


@main.command("pretrain", context_settings={"show_default": True})
@sizes(BLIP)
@sources
def pretrain_command(name: str | None, config_file: Path | None, workers: int, **values: Any) -> None:
    """Train BLIP from nothing with the losses ITC, ITM and LM. Of Karpathy's own file train is learnt and test held out."""
    cfg = read_sizes(name, config_file, BLIP)
    if not isinstance(cfg, config.BlipConfig):
        raise Misuse("These are the sizes of BLIP-2. Its first stage is trained with blip-train stage1.")
    with extra("torch"):
        from models.blip import BlipPretrain
        from training.initial import initialise
        from training.pretrain import losses_of
        from training.run import run
    files = Files(**{field.name: values.pop(field.name) for field in fields(Files)})
    options = Options(**values)
    model = BlipPretrain(cfg)
    initialise(model, options.seed)
    run(model, losses_of, files, workers, options, typed())


@main.command("stage1", context_settings={"show_default": True})
@sizes(BLIP2)
@click.option("--vit-checkpoint", type=FOLDER, help="Image encoder to start from; it stays as it is.  [default: trained too]")
@sources
def stage1_command(name: str | None, config_file: Path | None, vit_checkpoint: Path | None, workers: int, **values: Any) -> None:
    """Train BLIP-2's first stage, the Q-Former, with the losses ITC, ITM and LM, upon an image encoder that is frozen."""
    cfg = read_sizes(name, config_file, BLIP2)
    if not isinstance(cfg, config.Blip2Config):
        raise Misuse("These are the sizes of BLIP. It is trained with blip-train pretrain.")
    with extra("torch"):
        from models.blip2 import Blip2Stage1
        from models.checkpoint import load_image_encoder
        from training.initial import initialise
        from training.run import run
        from training.stage1 import freeze_image_encoder, losses_of
    files = Files(**{field.name: values.pop(field.name) for field in fields(Files)})
    options = Options(**values)
    model = Blip2Stage1(cfg)
    initialise(model, options.seed)
    if vit_checkpoint is not None:
        load_image_encoder(model, vit_checkpoint)
        freeze_image_encoder(model)
    run(model, losses_of, files, workers, options, typed())


@main.command("probe", context_settings={"show_default": True})
@sizes("blip2-stage1-vit-g")
@click.option(
    "--checkpoint", type=FOLDER, required=True, help="A stage-1 checkpoint with its language head (not Hugging Face's)."
)
@click.option("--vit-checkpoint", type=FOLDER, help="The image encoder, when the checkpoint has none: eva_vit_g.pth.")
@click.option("--image", "images", type=FOLDER, required=True, multiple=True, help="A picture; may be given several times.")
@click.option("--text", "texts", required=True, multiple=True, help="Its caption; as many as pictures, in the same order.")
@option("seed", NATURAL, "Of the wrong pairs that ITM draws.")
def probe_command(
    name: str | None,
    config_file: Path | None,
    tokenizer: Path,
    checkpoint: Path,
    vit_checkpoint: Path | None,
    images: tuple[Path, ...],
    texts: tuple[str, ...],
    seed: int,
) -> None:
    """Print the losses of a stage-1 model on pictures with captions: overall, ITC, ITM, LM. One pair will do."""
    cfg = read_sizes(name, config_file, "blip2-stage1-vit-g")
    if not isinstance(cfg, config.Blip2Config):
        raise Misuse("These are the sizes of BLIP; the losses of BLIP-2's first stage need those of BLIP-2.")
    with extra("torch"):
        from models.checkpoint import load_stage1
        from training.data import open_tokenizer
        from training.probe import probe
    words = open_tokenizer(tokenizer, cfg)
    model, report = load_stage1(cfg, checkpoint, vit_checkpoint)
    click.echo("\n".join(report.lines()))
    found = probe(model, words, images, texts, seed)
    click.echo(f"overall {found.total:.6f}  itc {found.itc:.6f}  itm {found.itm:.6f}  lm {found.lm:.6f}")


def read_sizes(name: str | None, config_file: Path | None, preset: str) -> config.Config:
    """The configuration that --model or --config names. Raises Misuse when both do."""
    if name is not None and config_file is not None:
        raise Misuse(f"--model {name} and --config {config_file} both give the sizes. Leave one out.")
    return config.from_file(config_file) if config_file is not None else config.preset(preset if name is None else name)


def typed() -> str:
    """The command line, to be typed again."""
    return shlex.join(["blip-train", *sys.argv[1:]])


if __name__ == "__main__":
    main()
