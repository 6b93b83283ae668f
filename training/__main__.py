"""blip-train: pictures and captions to a checkpoint, and a checkpoint to its losses."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from models import presets
from models.config import CLIP, Blip2Config, BlipConfig
from models.config_file import from_file
from models.errors import Group, Misuse, extra
from preprocess.workers import usable_cpus
from training.commands import COMMANDS
from training.options import Files, Options
from training.rank_table_commands import rank_table

Function = TypeVar("Function", bound=Callable[..., Any])
Sizes = TypeVar("Sizes", BlipConfig, Blip2Config)
FOLDER = click.Path(path_type=Path)
BLIP, BLIP2 = "blip-demo", "blip2-demo"  # when neither --model nor --config says otherwise
DEMO = Path(__file__).parent.parent / "demo"  # the embedded models and their vocabulary
DEFAULTS = {field.name: field.default for field in fields(Options)}


class Finite(click.FloatRange):
    """A range without infinity and NaN, which click lets pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not finite.", param, ctx)
        return number


POSITIVE, NATURAL, SHARE = click.IntRange(min=1), click.IntRange(min=0), Finite(min=0, min_open=True)
SEED = click.IntRange(0, 2**63 - 1)  # what PyTorch takes


def together(*decorators: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Several options in one decorator. --help lists them in this order."""

    def decorate(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def option(name: str, kind: Any, text: str) -> Callable[[Function], Function]:
    """An option of `Options`, with its default."""
    return click.option(f"--{name.replace('_', '-')}", type=kind, default=DEFAULTS[name], help=text)


def model(preset: str) -> Callable[[Function], Function]:
    """The options that say what is trained or probed: `preset` when nothing else is said, or another one of its kind."""
    names = [name for name, known in presets.PRESETS.items() if type(known) is type(presets.PRESETS[preset])]
    return together(
        click.option("--model", "name", show_default=preset, help=f"Sizes: a preset, {', '.join(names)}."),
        click.option("--config", "config_file", type=FOLDER, help="Sizes: a JSON file, in place of a preset."),
        click.option(
            "--tokenizer",
            type=FOLDER,
            default=DEMO / "tokenizer",
            show_default="the demo's",
            help="vocab.txt or tokenizer.json of BERT, or its folder.",
        ),
    )


# What is trained on and how, and where the result goes: `Files`, `Options` and the number of workers.
TRAINING = together(
    click.option("--annotations", type=FOLDER, required=True, help="JSON: the Karpathy form of BLIP, or Karpathy's own file."),
    click.option("--images", type=FOLDER, required=True, help="Folder that the picture paths start from."),
    click.option("--held-out", type=FOLDER, help="Such JSON to measure recall on; its pictures lie below --images too."),
    click.option(
        "--out", type=FOLDER, default="build/train/weights.safetensors", help="Checkpoint to write; its log lies beside it."
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
    option("weight_decay", Finite(min=0), "Of the matrices."),
    option("clip", SHARE, "Largest norm of the gradient."),
    option("shift", NATURAL, "Pictures are moved by up to so many pixels."),
    option("seed", SEED, "Of the first weights, the order and the negatives."),
    option("validate_every", POSITIVE, "Steps between measurements on --held-out."),
    click.option("--bf16/--fp32", default=True, help="Precision of the matrix products."),
)


@click.group(cls=Group)
def main() -> None:
    """Train BLIP and BLIP-2, from nothing or from a checkpoint."""


main.add_command(rank_table)
for command in COMMANDS:
    main.add_command(command)


@main.command("pretrain", context_settings={"show_default": True})
@model(BLIP)
@TRAINING
def pretrain_command(name: str | None, config_file: Path | None, workers: int, **values: Any) -> None:
    """Train BLIP from nothing with the losses ITC, ITM and LM. Of Karpathy's own file train is learnt and test held out."""
    cfg = sizes(BlipConfig, name, config_file, BLIP)
    with extra("torch"):
        from models.blip import BlipPretrain
        from training.initial import initialise
        from training.pretrain import losses_of
        from training.run import run
    files, options = sorted_out(values)
    fresh = BlipPretrain(cfg)
    initialise(fresh, options.seed)
    run(fresh, losses_of, files, workers, options, typed())


@main.command("stage1", context_settings={"show_default": True})
@model(BLIP2)
@click.option("--vit-checkpoint", type=FOLDER, help="Image encoder to start from; it stays as it is.  [default: trained too]")
@TRAINING
def stage1_command(name: str | None, config_file: Path | None, vit_checkpoint: Path | None, workers: int, **values: Any) -> None:
    """Train BLIP-2's first stage, the Q-Former upon an image encoder, with the losses ITC, ITM and LM. Of Karpathy's own file
    train is learnt and test held out."""
    cfg = sizes(Blip2Config, name, config_file, BLIP2)
    if cfg.vision.kind == CLIP and vit_checkpoint is None:
        raise Misuse("CLIP's image encoder is not trained from nothing. Give its weights with --vit-checkpoint.")
    with extra("torch"):
        from models.blip2 import Blip2Stage1
        from models.checkpoint import load_image_encoder
        from training.initial import initialise
        from training.run import run
        from training.stage1 import freeze_image_encoder, losses_of
    files, options = sorted_out(values)
    fresh = Blip2Stage1(cfg)
    initialise(fresh, options.seed)
    if vit_checkpoint is not None:
        click.echo("\n".join(load_image_encoder(fresh, vit_checkpoint).lines()))
        freeze_image_encoder(fresh)
    run(fresh, losses_of, files, workers, options, typed())


@main.command("probe", context_settings={"show_default": True})
@model(BLIP2)
@click.option(
    "--checkpoint",
    type=FOLDER,
    default=DEMO / "blip2.safetensors",
    show_default="the demo's",
    help="LAVIS's of the first stage, or one of blip-train; Hugging Face's have no language head.",
)
@click.option("--vit-checkpoint", type=FOLDER, help="The image encoder, when the checkpoint has none: eva_vit_g.pth.")
@click.option("--image", "images", type=FOLDER, required=True, multiple=True, help="A picture; may be given several times.")
@click.option("--text", "texts", required=True, multiple=True, help="Its caption; as many as pictures, in the same order.")
@option("seed", SEED, "Of the wrong pairs that ITM draws.")
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
    cfg = sizes(Blip2Config, name, config_file, BLIP2)
    with extra("torch"):
        from models.checkpoint import load_stage1
        from preprocess.text import CaptionTokenizer
        from training.probe import pairs, probe
    words = CaptionTokenizer.load(tokenizer, cfg)
    batch = pairs(cfg, words, images, texts)  # before the checkpoint, which takes much longer
    loaded, report = load_stage1(cfg, checkpoint, vit_checkpoint)
    found = probe(loaded, words, batch, seed)
    values = {"overall": found.total, "itc": found.itc, "itm": found.itm, "lm": found.lm}
    click.echo("\n".join(report.lines()))
    click.echo("  ".join(f"{name} {round(float(value), 6) + 0.0:.6f}" for name, value in values.items()))  # no -0.000000


def sizes(kind: type[Sizes], name: str | None, config_file: Path | None, preset: str) -> Sizes:
    """The configuration that --model or --config names. Raises Misuse when both do, or when it is of the other model."""
    if name is not None and config_file is not None:
        raise Misuse(f"--model {name} and --config {config_file} both give the sizes. Leave one out.")
    cfg = from_file(config_file) if config_file is not None else presets.preset(preset if name is None else name)
    if not isinstance(cfg, kind):
        found, wanted = ("BLIP-2", "BLIP") if kind is BlipConfig else ("BLIP", "BLIP-2")
        raise Misuse(
            f"{config_file or name} has the sizes of {found}, expected those of {wanted}. "
            "blip-train pretrain is for BLIP, stage1 and probe are for BLIP-2."
        )
    return cfg


def sorted_out(values: dict[str, Any]) -> tuple[Files, Options]:
    """What the options of TRAINING say."""
    files = {field.name: values.pop(field.name) for field in fields(Files)}
    return Files(**files), Options(**values)


def typed() -> str:
    """The command line, to be typed again."""
    return shlex.join(["blip-train", *sys.argv[1:]])


if __name__ == "__main__":
    main()
