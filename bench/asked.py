"""What was typed, as the bench takes it; and which options belong to which models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from bench.compare import NEEDED, chosen_works
from bench.forms import Writing
from bench.words_race import words_works
from models.errors import Misuse
from runtime.graphs import Graphs, fixed_sizes

OF_COMPARISONS = ("works", "checkpoint", "vit_checkpoint", "llm_checkpoint", "captions", "pairs", "rounds", "itm_batchsize")
OF_RETRIEVAL = ("length", "captions", "pairs", "itm_batchsize")
OF_WORDS = ("num_beams", "new_tokens", "prompt_tokens", "use_past", "llm_checkpoint")
OF_ONNX = ("length", "threads", *OF_COMPARISONS, *OF_WORDS)  # and not of what was compiled for an NPU
BEAMS = range(1, 65)
YES = {"true": True, "false": False}


def batches_asked(context: click.Context, option: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """--batchsize, a callback of click: whole numbers above 0 with commas between, each once."""
    number = click.IntRange(min=1)
    return None if value is None else tuple(dict.fromkeys(number(part, option, context) for part in value.split(",")))


def refuse_unused(graphs: Graphs, words: bool, compares: bool) -> None:
    """Raise Misuse when an option was typed that nothing reads: `words` whether the graphs write words, `compares` whether
    there is a comparison."""
    for name, option in _typed():
        if name in (OF_RETRIEVAL if words else OF_WORDS):
            kind = "models for retrieval" if words else "models that write words"
            raise Misuse(f"{option} is for {kind}, which {graphs.content['model']} is not; leave it out.")
        if name in OF_COMPARISONS and not compares:
            raise Misuse(f"{option} is only read with --compare transformers; add that, or leave it out.")


def refuse_of_onnx(graphs: Graphs) -> None:
    """Raise Misuse when an option was typed that is not read of graphs compiled for an NPU."""
    folder = graphs.source.folder
    for name, option in _typed():
        if name == "rival":
            raise Misuse(f"--compare runs on the CPU, and {folder} was compiled for an NPU: give the folder of blip-export.")
        if name in OF_ONNX:
            raise Misuse(f"{option} is of graphs that ONNX Runtime runs, and {folder} was compiled for an NPU: leave it out.")


def refuse_one_batch(graphs: Graphs, names: Sequence[str], batches: Sequence[int]) -> None:
    """Raise Misuse when several batches are asked of a graph that has one alone."""
    for name in names if len(batches) > 1 else ():
        if fixed := fixed_sizes(graphs, name)[0]:
            raise Misuse(
                f"{name} was exported for batches of {fixed} alone; give one --batchsize, or graphs of --target ort or ascend."
            )


def _typed() -> list[tuple[str, str]]:
    """The options that were typed, by their names here and there."""
    context = click.get_current_context()
    return [
        (param.name, param.opts[0])
        for param in context.command.params
        if param.name and context.get_parameter_source(param.name) == ParameterSource.COMMANDLINE
    ]


def checkpoint_asked(checkpoint: Path | None, provider: str) -> Path:
    """The checkpoint, which a comparison cannot do without. Raises Misuse."""
    if checkpoint is None:
        raise Misuse(
            "--compare transformers needs the weights: add --checkpoint with the file that the graphs were exported from."
        )
    if provider != "cpu":
        raise Misuse(f"--compare transformers runs both on the CPU; leave out --provider {provider}.")
    return checkpoint


def works_asked(graphs: Graphs, works: str | None, words: bool) -> list[str]:
    """The works of a comparison. Raises Misuse for one that there is not for such a model."""
    return chosen_works(works, words_works(graphs.config) if words else NEEDED)


def length_asked(graphs: Graphs, length: int | None, compares: bool) -> int:
    """The caption length to time with. Raises Misuse when captions of this model, or its positions, are not that many."""
    usual, positions = graphs.config.protocol.max_length, graphs.config.text.positions
    if length is not None and length > positions:
        raise Misuse(f"--length {length} is longer than the {positions} positions of the text encoder.")
    if length is not None and length > usual and compares:
        raise Misuse(f"--length {length} is longer than the captions of this model, {usual} tokens, which --compare takes.")
    return length or usual


def writing_asked(num_beams: str, new_tokens: int, use_past: str) -> Writing:
    """What is asked of a model that writes words. Raises Misuse for a list that is none."""
    known = {str(number): number for number in BEAMS}
    beams = [known.get(said, 0) for said in num_beams.split(",")]
    if 0 in beams:
        raise Misuse(f"--num-beams is {num_beams!r:.60}; expected whole numbers from 1 to {BEAMS[-1]}, with commas between.")
    past = use_past.split(",")
    if not all(said in YES for said in past):
        raise Misuse(f"--use-past is {use_past!r:.60}; expected true, false, or true,false.")
    return Writing(tuple(dict.fromkeys(beams)), new_tokens, tuple(dict.fromkeys(YES[said] for said in past)))
