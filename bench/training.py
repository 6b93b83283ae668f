"""python -m bench.training: samples per second of BLIP-2's first stage, ours against the plain way, in one run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
import numpy as np

from bench import machine
from bench.captions import captions_of
from bench.forms import Load
from bench.record import conditions, record_folder, write_record
from bench.table import compare_lines, load_line, threads_of
from models import config_file, presets
from models.config import Blip2Config
from models.errors import Command, Misuse, extra
from preprocess.text import CaptionTokenizer
from preprocess.workers import usable_cpus

RECORDS = machine.ROOT / "bench" / "records"
MODEL, DEPTH = "blip2-stage1-vit-g", 20
DEMO, DEMO_MODEL = machine.ROOT / "demo" / "tokenizer", "blip2-demo"  # whose special tokens stand where no tokenizer is named


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--model", default=None, help=f"Sizes of BLIP-2's first stage.  [default: {MODEL}]")
@click.option("--config", type=click.Path(path_type=Path), default=None, help="Other sizes, as JSON, in place of --model.")
@click.option("--depth", type=click.IntRange(min=1), default=DEPTH, help="Blocks of the image encoder, if it has more.")
@click.option("--batchsize", type=click.IntRange(min=2), default=8, help="Pictures of a step.")
@click.option("--length", type=click.IntRange(min=3), default=32, help="Tokens that the plain way pads captions to.")
@click.option(
    "--captions", type=click.Path(path_type=Path), default=None, help="Annotations to take captions from; else invented."
)
@click.option("--tokenizer", type=click.Path(path_type=Path), default=None, help="That of the model, for --captions.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="Timed steps of each way.")
@click.option("--threads", type=click.IntRange(min=1), default=None, help="Of PyTorch.  [default: one per processor]")
@click.option("--record", type=click.Path(path_type=Path), default=None, help="Folder.  [default: bench/records in a checkout]")
@click.option("--no-record", is_flag=True, help="Only print.")
def main(
    model: str | None,
    config: Path | None,
    depth: int,
    batchsize: int,
    length: int,
    captions: Path | None,
    tokenizer: Path | None,
    rounds: int,
    threads: int | None,
    record: Path | None,
    no_record: bool,
) -> None:
    """Time steps of BLIP-2's first stage with random weights, three ways taking turns: the plain way (gradients through the
    image encoder, captions padded, one pass per loss), ours with the encoder frozen, and ours with its features kept. The losses
    of all three have to agree."""
    if record and no_record:
        raise Misuse("--record and --no-record contradict each other; give one of them.")
    if model and config:
        raise Misuse("--model and --config contradict each other; give one of them.")
    if (captions is None) != (tokenizer is None):
        raise Misuse("--captions and --tokenizer go together: real captions are cut into the tokens of the model.")
    with extra("torch"):
        import torch

        from bench.stage1_race import Given, race
    whole = config_file.from_file(config) if config else presets.preset(model or MODEL)
    if not isinstance(whole, Blip2Config):
        raise Misuse(f"{config or model} is a {type(whole).__name__}; expected a Blip2Config, the sizes of BLIP-2's first stage.")
    name, vision = config.name if config else model or MODEL, whole.vision
    sizes = dataclasses.replace(whole, vision=dataclasses.replace(vision, depth=min(depth, vision.depth)))
    words = CaptionTokenizer.load(tokenizer, sizes) if tokenizer else CaptionTokenizer.load(DEMO, presets.preset(DEMO_MODEL))
    chosen = captions_of(sizes, words, captions, batchsize * (rounds + 2), length)
    shape = (len(chosen.ids), 3, vision.image_size, vision.image_size)
    if shape[0] < batchsize:
        raise Misuse(f"{captions} holds {shape[0]} captions; expected {batchsize} at least, as many as --batchsize.")
    wanted = None if no_record else record or (RECORDS if machine.in_checkout() else None)
    folder = record_folder(wanted) if wanted else None
    load = Load(batchsize, length, rounds, 1, threads or usable_cpus(), "cpu")
    torch.set_num_threads(load.threads)
    before = machine.load_average()
    given = Given(np.random.default_rng(0).standard_normal(shape, np.float32), chosen, batchsize)
    measured = race(sizes, words, given, rounds)
    loads = {"before": before, "after": machine.load_average()}
    blocks = f"{sizes.vision.depth} of {vision.depth} blocks of its image encoder"
    click.echo(f"Steps of {name}, {blocks}, {batchsize} pictures, float32, {rounds} rounds, {threads_of(load.threads)}.")
    click.echo(
        f"Plain: gradients through the encoder, captions padded to {length}, a pass per loss. Pictures are decoded before."
    )
    click.echo(f"Captions: {chosen.describe()}.")
    click.echo("")
    for line in compare_lines(measured):
        click.echo(line)
    click.echo("")
    said = [f"{work.work} {work.ratio(list(work.timings)[-1]):.2f}" for work in measured]
    click.echo(f"Times the samples per second of the plain way: {', '.join(said)}.")
    click.echo(load_line(loads["before"], loads["after"], load.threads, usable_cpus()))
    content = {
        "batchsize": batchsize,
        "threads": load.threads,
        "provider": load.provider,
        **machine.facts(),
        "load_average": loads,
        "config": config_file.to_dict(sizes),
        "blocks_of_the_whole": vision.depth,
        "length": length,
        "compare": {
            "with": "the plain way",
            "captions": chosen.describe(),
            "rounds": rounds,
            "works": [work.record() for work in measured],
        },
    }
    if folder:
        click.echo(f"Record: {write_record(folder, 'training-stage1', name, conditions(load), content)}")


if __name__ == "__main__":
    main()
