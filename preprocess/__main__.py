"""blip-pre: pictures and annotations to a data/ folder."""

from __future__ import annotations

from pathlib import Path

import click

from models.config import INTERPOLATIONS
from models.errors import Group
from preprocess.dataset import LAYOUTS, PACKED
from preprocess.retrieval import Options, Written, write_retrieval
from preprocess.workers import usable_cpus

FOLDER = click.Path(path_type=Path)


MANY_UNKNOWN = 0.2  # share of the tokens; bert-base-uncased leaves none of COCO's unknown


@click.group(cls=Group)
def main() -> None:
    """Turn pictures and annotations into tensors for the graphs."""


@main.command(context_settings={"show_default": True})
@click.option("--annotations", type=FOLDER, required=True, help="JSON: the Karpathy form of BLIP, or Karpathy's own file.")
@click.option("--images", type=FOLDER, required=True, help="Folder that the picture paths in the annotations start from.")
@click.option("--graphs", type=FOLDER, default="build/graphs", help="Graphs that will read the data: sizes, protocol, tokenizer.")
@click.option("--out", type=FOLDER, default="build/data", help="Folder to write.")
@click.option("--split", default="test", help="Which part of Karpathy's own file; the other form has no parts.")
@click.option("--layout", type=click.Choice(LAYOUTS), default=PACKED, help="One .npy per tensor, or one .bin per sample.")
@click.option("--interpolation", type=click.Choice(INTERPOLATIONS), show_default="the model's", help="How to resize.")
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=lambda: min(usable_cpus(), 16),
    show_default="one per CPU, at most 16",
    help="Processes.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many pictures.")
@click.option("--skip-broken", is_flag=True, help="Leave broken pictures and their captions out, and list them.")
def retrieval(
    annotations: Path,
    images: Path,
    graphs: Path,
    out: Path,
    split: str,
    layout: str,
    interpolation: str | None,
    workers: int,
    limit: int | None,
    skip_broken: bool,
) -> None:
    """Prepare pictures and captions for retrieval."""
    options = Options(split, layout, interpolation, workers, limit, skip_broken)
    click.echo(_summary(write_retrieval(annotations, images, graphs, out, options), out))


def _summary(written: Written, out: Path) -> str:
    found, lengths = written.annotations, written.lengths
    lines = [
        f"{out}: {len(found.images):,} pictures, {len(found.captions):,} captions",
        f"caption length: {lengths.min()} to {lengths.max()} tokens, mean {lengths.mean():.2f}",
    ]
    if written.unknown > MANY_UNKNOWN:
        share = f"{written.unknown:.0%} of the captions' tokens are [UNK]"
        lines.append(f"Warning: {share}; is this the vocabulary for these captions?")
    if written.broken:
        lines.append(f"left out: {len(written.broken):,} broken pictures and their captions; the manifest lists them")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
