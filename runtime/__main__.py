"""blip-run: graphs x data -> outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from models.errors import Group, Misuse, ResumableCommand
from models.recipe import RECIPES
from preprocess.tensors import LAYOUTS, PACKED
from runtime.ais_bench_commands import ais_bench_script, pairs
from runtime.caption import Options as CaptionOptions
from runtime.caption import run_caption
from runtime.classify import QUERIES, run_classify
from runtime.classify import Options as ClassifyOptions
from runtime.decoding import NEVER, ORIGINAL, TRANSFORMERS
from runtime.features import MODES, run_features
from runtime.features import Options as FeaturesOptions
from runtime.generation_presets import AS, OPTIONS
from runtime.how import INFERENCES
from runtime.labels import TEMPLATES
from runtime.outputs import LAVIS, MINDFORMERS, PROTOCOLS
from runtime.retrieval import Options as RetrievalOptions
from runtime.retrieval import run_retrieval
from runtime.session import PROVIDERS
from runtime.vqa import Options as VqaOptions
from runtime.vqa import run_vqa

FOLDER = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
TRUTH: dict[str, bool | str] = {"true": True, "false": False}
STOPPING = {**TRUTH, NEVER: NEVER}  # early_stopping
TRUE_OR_FALSE = ("early_stopping", "clean_prompt", "echo_prompt", "use_past")  # options that say so
YES_OR_NO = click.Choice(list(TRUTH), case_sensitive=False)
FILE = click.Path(path_type=Path)
# The options of every task, named as the fields of run.Options.
COMMON = (
    click.option("--graphs", type=FOLDER, default=Path("build/graphs"), help="Folder that blip-export wrote, or blip-atc."),
    click.option("--data", type=FOLDER, default=Path("build/data"), help="Folder that blip-pre wrote."),
    click.option("--out", type=FOLDER, default=Path("build/outputs"), help="Folder to write."),
    click.option("--batchsize", type=COUNT, default=16, help="Pictures or texts per run of a graph."),
    click.option("--provider", type=click.Choice(PROVIDERS), default="cpu", help="Where ONNX Runtime runs; never another one."),
    click.option("--device", default=None, help="For --graphs of blip-atc: NPUs, with commas between.  [default: 0]"),
    click.option("--threads", type=COUNT, default=None, help="Threads of one operator.  [default: all cores]"),
    click.option("--restart", is_flag=True, help="Begin anew, whichever run --out holds, whole or half finished."),
    click.option("--verify", is_flag=True, help="Check the sha256 of every file read."),
)
# The options of tasks that write texts: those of generation_presets.OPTIONS, which have the preset's values where nothing is
# said, and the fields of text_run.Options.
WRITING = (
    click.option("--as", "preset", type=click.Choice(AS), help="Whose defaults.  [default: blip for BLIP, lavis for BLIP-2]"),
    click.option("--num-beams", type=int, help="Texts followed at a time; 1 takes the likeliest word each time."),
    click.option(
        "--min-length", type=int, help="Fewest words, counted as the preset counts: with the prompt, or new ones alone."
    ),
    click.option("--max-length", type=int, help="Most words, counted in the same way."),
    click.option("--length-penalty", type=float, help="Above 0 for longer texts, below for shorter ones; with beams."),
    click.option("--repetition-penalty", type=float, help="Above 1 against words that were there."),
    click.option("--early-stopping", type=click.Choice(list(STOPPING)), help="When a search with beams ends."),
    click.option("--rule", type=click.Choice([ORIGINAL, TRANSFORMERS]), help="How beams score: the original's way, or of 5.x."),
    click.option("--do-sample", is_flag=True, default=None, help="Draw words instead of taking the likeliest."),
    click.option("--top-k", type=int, help="Draw from so many of the likeliest words; 0 from all."),
    click.option("--top-p", type=float, help="Draw from the likeliest words that together have this probability."),
    click.option("--temperature", type=float, help="Divides the logits before words are drawn."),
    click.option("--seed", type=int, help="Of the words that are drawn."),
    click.option("--num-return", type=int, help="Texts for each prompt."),
    click.option("--clean-prompt", type=YES_OR_NO, help="Clean the whole prompt as captions are cleaned."),
    click.option("--echo-prompt", type=YES_OR_NO, help="Begin each text with its prompt."),
    click.option("--use-past", type=YES_OR_NO, default="true", help="Keep what was read; false reads all again for each word."),
)


def common(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of every task."""
    for option in reversed(COMMON):
        command = option(command)
    return command


def writing(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of tasks that write texts."""
    for option in reversed(WRITING):
        command = option(command)
    return command


def apart(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a task that writes texts, those of decoding in a dictionary of their own, where they were given. Raises
    Misuse when both a folder and pictures are named."""
    if given["images"] is not None and click.get_current_context().get_parameter_source("data") is not ParameterSource.DEFAULT:
        raise Misuse("Both --data and --images are given; choose one.")
    given = {name: STOPPING[value] if name in TRUE_OR_FALSE and value is not None else value for name, value in given.items()}
    asked = {name: given.pop(name) for name in OPTIONS if name in given}
    return {**given, "asked": {name: value for name, value in asked.items() if value is not None}}


@click.group(cls=Group)
def main() -> None:
    """Run the graphs over prepared data."""


@main.command(cls=ResumableCommand, context_settings={"show_default": True})
@common
@click.option("--itm-batchsize", type=COUNT, default=64, help="Captions of one picture per run of the ITM graph.")
@click.option("--k-test", type=COUNT, default=None, help="Candidates re-ranked per query.  [default: the model's]")
@click.option(
    "--as", "recipe", type=click.Choice(list(RECIPES)), help="Whose evaluation to follow: k_test 20, of ascend-modelzoo."
)
@click.option("--layout", type=click.Choice(LAYOUTS), default=PACKED, help="One .npy per tensor, or one .bin per sample.")
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


@main.command(cls=ResumableCommand, context_settings={"show_default": True})
@common
@click.option("--images", help="Paths of pictures with commas between, in the place of --data.")
@click.option("--prompts", help="For --images: a prompt for each, with commas between; one may be empty.")
@click.option("--prompts-file", type=FILE, help="A prompt for each picture, one a line.")
@click.option("--prompt", help="One prompt for all.  [default: the data's, else the preset's]")
@writing
def caption(**given: Any) -> None:
    """Describe each picture in words."""
    run_caption(CaptionOptions(**apart(given)), click.echo)
    click.echo(f"Outputs: {given['out']}")


@main.command(cls=ResumableCommand, context_settings={"show_default": True})
@common
@click.option("--images", help="Paths of pictures with commas between, in the place of --data.")
@click.option("--questions", help="For --images: a question about each, with commas between.")
@click.option("--questions-file", type=FILE, help="The same, one a line.")
@click.option("--prompt", help="A template with {} where the question goes: 'Question: {} Answer:'.  [default: the preset's]")
@click.option(
    "--inference",
    type=click.Choice(INFERENCES),
    help="Write answers, or choose from a list.  [default: rank with BLIP and a list, else generate]",
)
@click.option("--answer-list", type=FILE, help="JSON list of the answers to choose from.  [default: the data's]")
@click.option("--k-test", type=COUNT, help="Answers of the list that are ranked for a question.  [default: the model's]")
@click.option("--attend-padding", is_flag=True, help="BLIP that generates: look at questions' padding, as the original does.")
@writing
def vqa(**given: Any) -> None:
    """Answer the questions about each picture."""
    run_vqa(VqaOptions(**apart(given)), click.echo)
    click.echo(f"Outputs: {given['out']}")


for command in (ais_bench_script, pairs):
    main.add_command(command)


if __name__ == "__main__":
    main()
