"""blip-bench: how fast the graphs are here, how near to what this machine can do, and against another implementation."""

from __future__ import annotations

from pathlib import Path

import click

from bench import machine
from bench.asked import checkpoint_asked, length_asked, refuse_unused, works_asked, writing_asked
from bench.forms import Load
from bench.graphs import chosen_names
from bench.race import Against
from bench.record import record_folder, write_record
from bench.room import refuse_beyond
from bench.run import bench
from models.config import GenerationConfig
from models.errors import Command, Misuse
from preprocess.workers import usable_cpus
from runtime.graphs import read_graphs
from runtime.onnx_session import available_provider
from runtime.session import PROVIDERS

RECORDS = machine.ROOT / "bench" / "records"


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--graphs", type=click.Path(path_type=Path), default=Path("build/graphs"), help="Folder that blip-export wrote.")
@click.option("--only", default=None, help="Only these graphs, with commas between.  [default: all]")
@click.option("--batchsize", type=click.IntRange(min=1), default=1, help="Samples per run, or pictures written about at a time.")
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
    "--loops", type=click.IntRange(min=1), default=None, help="Timed runs per graph.  [default: 10 seconds, 5 to 200 runs]"
)
@click.option("--warmup", type=click.IntRange(min=0), default=2, help="Runs per graph before the timed ones.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=None, help="Threads of one operator.  [default: one per processor]"
)
@click.option("--provider", type=click.Choice(PROVIDERS), default="cpu", help="Where ONNX Runtime runs; never another one.")
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
    batchsize: int,
    length: int | None,
    num_beams: str,
    new_tokens: int,
    prompt_tokens: int,
    use_past: str,
    loops: int | None,
    warmup: int,
    threads: int | None,
    provider: str,
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
    this machine reads with is reached."""
    if record and no_record:
        raise Misuse("--record and --no-record contradict each other; give one of them.")
    found = read_graphs(graphs)
    words = isinstance(found.config, GenerationConfig)
    refuse_unused(found, words, rival is not None)
    against = None
    if rival:
        weights, chosen = checkpoint_asked(checkpoint, provider), works_asked(found, works, words)
        against = Against(chosen, weights, vit_checkpoint, llm_checkpoint, rounds, captions, pairs, itm_batchsize)
    read = prompt_tokens if words else length_asked(found, length, rival is not None)
    load = Load(batchsize, read, loops, warmup, threads or usable_cpus(), provider)
    writing = writing_asked(num_beams, new_tokens, use_past) if words else None
    if writing:
        refuse_beyond(found, load, writing)
    names = chosen_names(found, only)
    wanted = None if no_record else record or (RECORDS if machine.in_checkout() else None)
    available_provider(provider)  # before a folder is made
    folder = record_folder(wanted) if wanted else None
    content = bench(found, names, load, writing, against, click.echo)
    if folder:
        what = f"compare-{rival}" if rival else "graphs"
        click.echo(f"Record: {write_record(folder, what, str(found.content['model']), load, content)}")


if __name__ == "__main__":
    main()
