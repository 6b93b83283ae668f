"""python -m models.convert: a checkpoint of BLIP or BLIP-2 in the layout of another program. See models/conversion.py."""

from __future__ import annotations

from pathlib import Path

import click

from models import presets
from models.config_file import from_file
from models.errors import Command, Misuse, extra
from models.targets import TARGETS


@click.command(cls=Command, context_settings={"show_default": True})
@click.option(
    "--from",
    "checkpoint",
    type=click.Path(path_type=Path),
    required=True,
    help="Checkpoint: LAVIS's or BLIP's .pth, a Hugging Face folder or .safetensors, MindSpore's .ckpt, or our .safetensors.",
)
@click.option(
    "--to",
    type=click.Choice(TARGETS),
    required=True,
    help="lavis: .pth of LAVIS, or of BLIP. hf: a folder for transformers. ours: .safetensors, each tensor once.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New file, or folder for hf.")
@click.option(
    "--vit-checkpoint",
    type=click.Path(path_type=Path),
    help="BLIP-2's image encoder, when the checkpoint has none: eva_vit_g.pth or clip_vit_L.pth.",
)
@click.option(
    "--llm-checkpoint",
    type=click.Path(path_type=Path),
    help="The language model of BLIP-2's second stage, a Hugging Face folder, when the checkpoint has none.",
)
@click.option("--model", default=None, help="Preset.  [default: the one with the sizes of the checkpoint]")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Sizes from a JSON file instead, when no preset has them.",
)
def main(
    checkpoint: Path,
    to: str,
    out: Path,
    vit_checkpoint: Path | None,
    llm_checkpoint: Path | None,
    model: str | None,
    config_file: Path | None,
) -> None:
    """Convert a checkpoint. Values and types of its tensors stay as they are, bit for bit."""
    if model and config_file:
        raise Misuse("--model and --config both name sizes. Give one of them, or neither.")
    config = from_file(config_file) if config_file else presets.preset(model) if model else None
    with extra("torch"):
        from models.conversion import Wish, convert
    convert(Wish(checkpoint, to, out, vit_checkpoint, config, llm_checkpoint), click.echo)


if __name__ == "__main__":
    main()
