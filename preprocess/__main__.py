"""blip-pre: pictures and annotations, or labels, to a data/ folder."""

from __future__ import annotations

from pathlib import Path

import click

from models.config import INTERPOLATIONS
from models.errors import Group
from models.recipe import RECIPES
from preprocess.caption import WrittenCaptions, write_caption
from preprocess.captioned import read_captioned
from preprocess.cifar import LABELS, SPLITS
from preprocess.classify import WrittenLabels, write_classify
from preprocess.labelled import read_labelled
from preprocess.pictures import Options
from preprocess.questioned import read_questioned
from preprocess.retrieval import Written, write_retrieval
from preprocess.tensors import LAYOUTS, PACKED
from preprocess.vqa import WrittenQuestions, write_vqa
from preprocess.workers import workers_of

FOLDER = click.Path(path_type=Path)


MANY_UNKNOWN = 0.2  # share of the tokens; bert-base-uncased leaves none of COCO's unknown

# The options of every task.
GRAPHS = click.option(
    "--graphs", type=FOLDER, default="build/graphs", help="Graphs that will read the data: sizes, protocol, tokenizer."
)
OUT = click.option("--out", type=FOLDER, default="build/data", help="Folder to write.")
LAYOUT = click.option("--layout", type=click.Choice(LAYOUTS), default=PACKED, help="One .npy per tensor, or one .bin per sample.")
INTERPOLATION = click.option(
    "--interpolation", type=click.Choice(INTERPOLATIONS), show_default="the model's", help="How to resize."
)
WORKERS = click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=lambda: workers_of(None),
    show_default="one per CPU, at most 16",
    help="Processes.",
)
LIMIT = click.option("--limit", type=click.IntRange(min=1), help="Only the first so many pictures.")


@click.group(cls=Group)
def main() -> None:
    """Turn pictures and annotations into tensors for the graphs."""


@main.command(context_settings={"show_default": True})
@click.option("--annotations", type=FOLDER, required=True, help="JSON: the Karpathy form of BLIP, or Karpathy's own file.")
@click.option("--images", type=FOLDER, required=True, help="Folder that the picture paths in the annotations start from.")
@GRAPHS
@OUT
@click.option("--split", default="test", help="Which part of Karpathy's own file; the other form has no parts.")
@LAYOUT
@click.option(
    "--as", "recipe", type=click.Choice(list(RECIPES)), help="Whose evaluation to follow: bilinear, of ascend-modelzoo."
)
@INTERPOLATION
@WORKERS
@LIMIT
@click.option("--skip-broken", is_flag=True, help="Leave broken pictures and their captions out, and list them.")
def retrieval(
    annotations: Path,
    images: Path,
    graphs: Path,
    out: Path,
    split: str,
    layout: str,
    recipe: str | None,
    interpolation: str | None,
    workers: int,
    limit: int | None,
    skip_broken: bool,
) -> None:
    """Prepare pictures and captions for retrieval."""
    options = Options(layout, interpolation, workers, limit, skip_broken)
    click.echo(_summary(write_retrieval(annotations, images, graphs, out, options, split, recipe), out))


@main.command(context_settings={"show_default": True})
@click.option("--images", type=FOLDER, help="Folder with one folder of pictures per class, or what --annotations starts from.")
@click.option("--annotations", type=FOLDER, help='JSON: [{"image": path, "label": class}, ...], alone or beside "classes".')
@click.option("--cifar", type=FOLDER, help="CIFAR-100 or CIFAR-10 in its Python version, instead of --images.")
@click.option("--split", type=click.Choice(SPLITS), show_default="test", help="Which part of CIFAR.")
@click.option("--labels", type=click.Choice(LABELS), show_default="fine", help="Which labels of CIFAR-100.")
@GRAPHS
@OUT
@LAYOUT
@INTERPOLATION
@WORKERS
@LIMIT
@click.option("--skip-broken", is_flag=True, help="Leave broken pictures out, and list them.")
def classify(
    images: Path | None,
    annotations: Path | None,
    cifar: Path | None,
    split: str | None,
    labels: str | None,
    graphs: Path,
    out: Path,
    layout: str,
    interpolation: str | None,
    workers: int,
    limit: int | None,
    skip_broken: bool,
) -> None:
    """Prepare pictures with class labels for zero-shot classification."""
    found = read_labelled(images, annotations, cifar, split, labels)
    options = Options(layout, interpolation, workers, limit, skip_broken)
    click.echo(_counts(write_classify(found, graphs, out, options), out))


@main.command(context_settings={"show_default": True})
@click.option("--images", type=FOLDER, required=True, help="Folder of pictures, or what the paths of --annotations start from.")
@click.option(
    "--annotations", type=FOLDER, help="Which of them, and captions: a list of BLIP, COCO's, Karpathy's or Flickr8k's file."
)
@click.option("--split", show_default="test", help="Which part of Karpathy's own file or Flickr8k's; the others have no parts.")
@click.option("--prompts-file", "prompts", type=FOLDER, help="Text with a prompt in each line, one for each picture.")
@GRAPHS
@OUT
@LAYOUT
@INTERPOLATION
@WORKERS
@LIMIT
@click.option("--skip-broken", is_flag=True, help="Leave broken pictures and their captions out, and list them.")
def caption(
    images: Path,
    annotations: Path | None,
    split: str | None,
    prompts: Path | None,
    graphs: Path,
    out: Path,
    layout: str,
    interpolation: str | None,
    workers: int,
    limit: int | None,
    skip_broken: bool,
) -> None:
    """Prepare pictures for captioning."""
    found = read_captioned(images, annotations, split, prompts)
    options = Options(layout, interpolation, workers, limit, skip_broken)
    click.echo(_captions(write_caption(found, graphs, out, options), out))


@main.command(context_settings={"show_default": True})
@click.option(
    "--images", type=FOLDER, required=True, help="Folder that the paths of the pictures start from, or COCO's pictures."
)
@click.option("--questions", type=FOLDER, required=True, help="JSON: the questions of VQA v2, or a list of BLIP.")
@click.option("--annotations", type=FOLDER, help="JSON: the annotations of VQA v2, with the answers.")
@click.option("--answer-list", type=FOLDER, help="JSON list of the answers to choose from, where they are ranked.")
@GRAPHS
@OUT
@LAYOUT
@INTERPOLATION
@WORKERS
@LIMIT
@click.option("--skip-broken", is_flag=True, help="Leave broken pictures and their questions out, and list them.")
def vqa(
    images: Path,
    questions: Path,
    annotations: Path | None,
    answer_list: Path | None,
    graphs: Path,
    out: Path,
    layout: str,
    interpolation: str | None,
    workers: int,
    limit: int | None,
    skip_broken: bool,
) -> None:
    """Prepare pictures and questions about them."""
    found = read_questioned(images, questions, annotations, answer_list)
    options = Options(layout, interpolation, workers, limit, skip_broken)
    click.echo(_questions(write_vqa(found, graphs, out, options), out))


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


def _counts(written: WrittenLabels, out: Path) -> str:
    counts = written.counts
    lines = [
        f"{out}: {counts.sum():,} pictures, {len(counts):,} classes",
        f"pictures of a class: {counts.min():,} to {counts.max():,}",
    ]
    if written.broken:
        lines.append(f"left out: {len(written.broken):,} broken pictures; the manifest lists them")
    return "\n".join(lines)


def _captions(written: WrittenCaptions, out: Path) -> str:
    references = f"{written.references:,} captions" if written.references else "no captions"
    lines = [f"{out}: {written.pictures:,} pictures, {references} to compare with"]
    if written.prompts:
        lines.append("each picture has a prompt of its own")
    if written.broken:
        lines.append(f"left out: {len(written.broken):,} broken pictures; the manifest lists them")
    return "\n".join(lines)


def _questions(written: WrittenQuestions, out: Path) -> str:
    answers = f"{written.answers:,} answers" if written.answers else "no answers"
    lines = [f"{out}: {written.pictures:,} pictures, {written.questions:,} questions, {answers} to compare with"]
    if written.choices:
        lines.append(f"answers to choose from: {written.choices:,}")
    if written.broken:
        lines.append(f"left out: {len(written.broken):,} broken pictures and their questions; the manifest lists them")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
