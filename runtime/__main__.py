"""blip-run: graphs x data -> outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from models.errors import Group, ResumableCommand
from runtime.classify import QUERIES, run_classify
from runtime.classify import Options as ClassifyOptions
from runtime.features import MODES, run_features
from runtime.features import Options as FeaturesOptions
from runtime.labels import TEMPLATES
from runtime.outputs import LAVIS, MINDFORMERS, PROTOCOLS
from runtime.retrieval import Options as RetrievalOptions
from runtime.retrieval import run_retrieval
from runtime.session import PROVIDERS

FOLDER = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
# The options of every task, named as the fields of run.Options.
COMMON = (
    click.option("--graphs", type=FOLDER, default=Path("build/graphs"), help="Folder that blip-export wrote."),
    click.option("--data", type=FOLDER, default=Path("build/data"), help="Folder that blip-pre wrote."),
    click.option("--out", type=FOLDER, default=Path("build/outputs"), help="Folder to write."),
    click.option("--batchsize", type=COUNT, default=16, help="Pictures or captions per run of an encoder."),
    click.option("--provider", type=click.Choice(PROVIDERS), default="cpu", help="Where ONNX Runtime runs; never another one."),
    click.option("--threads", type=COUNT, default=None, help="Threads of one operator.  [default: all cores]"),
    click.option("--restart", is_flag=True, help="Begin anew, whichever run --out holds, whole or half finished."),
    click.option("--verify", is_flag=True, help="Check the sha256 of every file read."),
)


def common(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of every task."""
    for option in reversed(COMMON):
        command = option(command)
    return command


@click.group(cls=Group)
def main() -> None:
    """Run the graphs over prepared data."""


@main.command(cls=ResumableCommand, context_settings={"show_default": True})
@common
@click.option("--itm-batchsize", type=COUNT, default=64, help="Captions of one picture per run of the ITM graph.")
@click.option("--k-test", type=COUNT, default=None, help="Candidates re-ranked per query.  [default: the model's]")
@click.option("--feat-dtype", type=click.Choice(["float32", "float16"]), default="float32", help="How image features are stored.")
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default=LAVIS,
    help="Whose evaluation: mindformers leaves out the last pictures when they do not fill a batch of 100; lavis counts all. "
    "mindformers without add_extra_itm_score ranks as the report's ITC alone.",
)
def retrieval(**asked: Any) -> None:
    """Embed all pictures and captions, then re-rank each one's best candidates with the ITM head."""
    run_retrieval(RetrievalOptions(**asked), click.echo)
    click.echo(f"Outputs: {asked['out']}")


@main.command(cls=ResumableCommand, context_settings={"show_default": True})
@common
@click.option("--labels", default=None, help="With commas between.  [default: the classes of the data]")
@click.option("--labels-file", type=click.Path(path_type=Path), default=None, help="One label a line, instead of --labels.")
@click.option(
    "--template",
    "templates",
    multiple=True,
    help="A prompt with {} where the label goes; of several the vectors are averaged.  [default: the protocol's]",
)
@click.option(
    "--query",
    type=click.Choice(QUERIES),
    default=None,
    help="BLIP-2: which query speaks for a picture, the first or the most similar one.  [default: first]",
)
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default=MINDFORMERS,
    help=f"Whose template: '{TEMPLATES[MINDFORMERS]}' of mindformers, the bare '{TEMPLATES[LAVIS]}' of lavis.",
)
@click.option("--temperature", type=float, default=None, help="Divides the similarities.  [default: the checkpoint's]")
def classify(**asked: Any) -> None:
    """Say how likely each picture is of each class, by what the classes are called (zero-shot)."""
    run_classify(ClassifyOptions(**asked), click.echo)
    click.echo(f"Outputs: {asked['out']}")


@main.command(cls=ResumableCommand, context_settings={"show_default": True})
@common
@click.option("--modes", default=",".join(MODES), help="What to describe: pictures, captions, captions with their pictures.")
def features(**asked: Any) -> None:
    """Write what BLIP-2's Q-Former says of pictures and captions, as LAVIS's extract_features does."""
    run_features(FeaturesOptions(**asked), click.echo)
    click.echo(f"Outputs: {asked['out']}")


if __name__ == "__main__":
    main()
