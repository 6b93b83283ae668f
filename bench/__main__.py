"""blip-bench: how fast the graphs are here, how near to what this machine can do, and against another implementation."""

from __future__ import annotations

from pathlib import Path

import click

from bench import machine
from bench.asked import (
    batches_asked,
    checkpoint_asked,
    length_asked,
    refuse_of_onnx,
    refuse_one_batch,
    refuse_unused,
    works_asked,
    writing_asked,
)
from bench.forms import Load
from bench.graphs import chosen_names
from bench.om import LOOPS, batches_of
from bench.om_run import bench_om, om_conditions
from bench.race import Against
from bench.record import conditions, record_folder, write_record
from bench.room import refuse_beyond
from bench.run import bench
from models.config import GenerationConfig
from models.errors import Command, Misuse
from preprocess.workers import usable_cpus
from runtime.graphs import Graphs, read_graphs
from runtime.place import placed
from runtime.session import PROVIDERS

RECORDS = machine.ROOT / "bench" / "records"


@click.command(cls=Command, context_settings={"show_default": True})
@click.option(
    "--graphs", type=click.Path(path_type=Path), default=Path("build/graphs"), help="Folder that blip-export wrote, or blip-atc."
)
@click.option("--only", default=None, help="Only these graphs, with commas between.  [default: all]")
@click.option(
    "--batchsize",
    callback=batches_asked,
    default=None,
    help="Samples per run, or pictures written about at a time; several with commas between, one after the other.  "
    "[default: 1; of blip-atc all there are]",
)
@click.option(
    "--length",
    type=click.IntRange(min=2),
    default=None,
    help="Retrieval: tokens of a caption; --compare cuts and pads to it.  [default: the model's]",
)
@click.option("--num-beams", default="1,5", help="Words: sequences of each text, 1 for greedy; several with commas between.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=24, help="Words: new ones of each text.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=4, help="Words: tokens of each prompt.")
@click.option("--use-past", default="true", help="Words: true keeps caches, false reads all words each step; true,false: both.")
@click.option(
    "--loops",
    type=click.IntRange(min=1),
    default=None,
    help=f"Timed runs per graph.  [default: 10 seconds, 5 to 200 runs; of blip-atc {LOOPS}]",
)
@click.option("--warmup", type=click.IntRange(min=0), default=2, help="Runs per graph before the timed ones.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=None, help="Threads of one operator.  [default: one per processor]"
)
@click.option("--provider", type=click.Choice(PROVIDERS), default="cpu", help="Where ONNX Runtime runs; never another one.")
@click.option("--device", default=None, help="For --graphs of blip-atc: NPUs, with commas between.  [default: 0]")
@click.option("--compare", "rival", type=click.Choice(["transformers"]), default=None, help="Take turns with this on equal work.")
@click.option(
    "--works",
    default=None,
    help="Only these of --compare: pictures,captions,pairs of retrieval; of words tokens, captions or answers.  [default: all]",
)
@click.option("--checkpoint", type=click.Path(path_type=Path), default=None, help="The one of the graphs, for --compare.")
@click.option(
    "--vit-checkpoint", type=click.Path(path_type=Path), default=None, help="The one of the graphs, if they had one of their own."
)
@click.option(
    "--llm-checkpoint", type=click.Path(path_type=Path), default=None, help="The one of the graphs, if they had one of their own."
)
@click.option(
    "--captions", type=click.Path(path_type=Path), default=None, help="Annotations whose captions --compare takes; else invented."
)
@click.option("--pairs", type=click.IntRange(min=1), default=256, help="Captions to embed and to match with one picture.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="Timed rounds of each work of --compare.")
@click.option("--itm-batchsize", type=click.IntRange(min=1), default=64, help="Captions of one picture at a time.")
@click.option(
    "--record", type=click.Path(path_type=Path), default=None, help="Folder of records.  [default: bench/records in a checkout]"
)
@click.option("--no-record", is_flag=True, help="Only print.")
def main(
    graphs: Path,
    only: str | None,
    batchsize: tuple[int, ...] | None,
    length: int | None,
    num_beams: str,
    new_tokens: int,
    prompt_tokens: int,
    use_past: str,
    loops: int | None,
    warmup: int,
    threads: int | None,
    provider: str,
    device: str | None,
    rival: str | None,
    works: str | None,
    checkpoint: Path | None,
    vit_checkpoint: Path | None,
    llm_checkpoint: Path | None,
    captions: Path | None,
    pairs: int,
    rounds: int,
    itm_batchsize: int,
    record: Path | None,
    no_record: bool,
) -> None:
    """Time every graph: latency, samples per second, operations, and the share of this machine's matrix peak reached. Of a
    model that writes words, time whole texts as well: the first word, each one after it, and what share of the bandwidth that
    this machine reads with is reached.

    Of graphs compiled for an NPU: the time of the NPU, as ais_bench prints it, and end to end, of each at each batch."""
    if record and no_record:
        raise Misuse("--record and --no-record contradict each other; give one of them.")
    found = read_graphs(graphs)
    wanted = None if no_record else record or (RECORDS if machine.in_checkout() else None)
    if found.is_om:
        refuse_of_onnx(found)
        _bench_om(placed(found, provider, device, 1), only, batchsize, loops or LOOPS, warmup, wanted)
        return
    words = isinstance(found.config, GenerationConfig)
    refuse_unused(found, words, rival is not None)
    against = None
    if rival:
        weights, chosen = checkpoint_asked(checkpoint, provider), works_asked(found, works, words)
        against = Against(chosen, weights, vit_checkpoint, llm_checkpoint, rounds, captions, pairs, itm_batchsize)
    read = prompt_tokens if words else length_asked(found, length, rival is not None)
    loads = [Load(each, read, loops, warmup, threads or usable_cpus(), provider) for each in batchsize or (1,)]
    writing = writing_asked(num_beams, new_tokens, use_past) if words else None
    if writing:
        for load in loads:
            refuse_beyond(found, load, writing)
    names = chosen_names(found, only)
    refuse_one_batch(found, names, [load.batchsize for load in loads])
    placed(found, provider, device, 1)  # before a folder is made
    folder = record_folder(wanted) if wanted else None
    what = f"compare-{rival}" if rival else "graphs"
    for load in loads:
        content = bench(found, names, load, writing, against, click.echo)
        if folder:
            click.echo(f"Record: {write_record(folder, what, str(found.content['model']), conditions(load), content)}")


def _bench_om(
    graphs: Graphs, only: str | None, asked: tuple[int, ...] | None, loops: int, warmup: int, wanted: Path | None
) -> None:
    """Of graphs compiled for an NPU. `wanted`: the folder of records, if any."""
    batches = batches_of(graphs, chosen_names(graphs, only), asked)
    folder = record_folder(wanted) if wanted else None
    content = bench_om(graphs, batches, loops, warmup, click.echo)
    if folder:
        model = str(graphs.content["model"])
        click.echo(f"Record: {write_record(folder, 'om', model, om_conditions(graphs, batches), content)}")


if __name__ == "__main__":
    main()
