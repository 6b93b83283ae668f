"""blip-train probe: the losses of a checkpoint on a few pictures, without training."""

from __future__ import annotations

from pathlib import Path

import click

from models import presets
from models.config import Blip2Config
from models.config_file import from_file
from models.errors import Command, Misuse, extra

FOLDER = click.Path(path_type=Path)
PRESET = "blip2-demo"  # when neither --model nor --config says otherwise
DEMO = Path(__file__).parent.parent / "demo"  # the embedded models and their vocabulary
SIZES = [name for name, known in presets.PRESETS.items() if isinstance(known, Blip2Config)]


@click.command("probe", cls=Command, context_settings={"show_default": True})
@click.option("--model", "name", show_default=PRESET, help=f"Sizes: a preset, {', '.join(SIZES)}.")
@click.option("--config", "config_file", type=FOLDER, help="Sizes: a JSON file, in place of a preset.")
@click.option(
    "--tokenizer",
    type=FOLDER,
    default=DEMO / "tokenizer",
    show_default="the demo's",
    help="vocab.txt or tokenizer.json of BERT, or its folder.",
)
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
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=1, help="Of the wrong pairs that ITM draws.")
def probe(
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
    cfg = _sizes(name, config_file)
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


def _sizes(name: str | None, config_file: Path | None) -> Blip2Config:
    """The configuration that --model or --config names. Raises Misuse when both do, or when it is of another model."""
    if name is not None and config_file is not None:
        raise Misuse(f"--model {name} and --config {config_file} both give the sizes. Leave one out.")
    cfg = from_file(config_file) if config_file is not None else presets.preset(PRESET if name is None else name)
    if not isinstance(cfg, Blip2Config):
        found = type(cfg).__name__.removesuffix("Config")
        raise Misuse(f"{config_file or name} has the sizes of {found}; expected those of BLIP-2's first stage.")
    return cfg
