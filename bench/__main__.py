"""blip-bench: how fast the graphs are here, how near to what this machine can do, and against another implementation."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from bench import machine
from bench.compare import chosen_works
from bench.graphs import Load, chosen_names
from bench.record import record_folder, write_record
from bench.run import Against, bench
from models.errors import Command, Misuse
from preprocess.workers import usable_cpus
from runtime.graphs import Graphs, read_graphs
from runtime.onnx_session import available_provider
from runtime.session import PROVIDERS

RECORDS = machine.ROOT / "bench" / "records"


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--graphs", type=click.Path(path_type=Path), default=Path("build/graphs"), help="Folder that blip-export wrote.")
@click.option("--only", default=None, help="Only these graphs, with commas between.  [default: all]")
@click.option("--batchsize", type=click.IntRange(min=1), default=1, help="Samples per run.")
@click.option(
    "--length",
    type=click.IntRange(min=2),
    default=None,
    help="Tokens of a caption; --compare cuts and pads to it.  [default: the model's]",
)
@click.option(
    "--loops", type=click.IntRange(min=1), default=None, help="Timed runs per graph.  [default: 10 seconds, 5 to 200 runs]"
)
@click.option("--warmup", type=click.IntRange(min=0), default=2, help="Runs per graph before the timed ones.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=None, help="Threads of one operator.  [default: one per processor]"
)
@click.option("--provider", type=click.Choice(PROVIDERS), default="cpu", help="Where ONNX Runtime runs; never another one.")
@click.option("--compare", "rival", type=click.Choice(["transformers"]), default=None, help="Take turns with this on equal work.")
@click.option("--works", default=None, help="Only these of --compare: pictures,captions,pairs.  [default: all]")
@click.option("--checkpoint", type=click.Path(path_type=Path), default=None, help="The one of the graphs, for --compare.")
@click.option(
    "--vit-checkpoint", type=click.Path(path_type=Path), default=None, help="The one of the graphs, if they had one of their own."
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
    loops: int | None,
    warmup: int,
    threads: int | None,
    provider: str,
    rival: str | None,
    works: str | None,
    checkpoint: Path | None,
    vit_checkpoint: Path | None,
    captions: Path | None,
    pairs: int,
    rounds: int,
    itm_batchsize: int,
    record: Path | None,
    no_record: bool,
) -> None:
    """Time every graph: latency, samples per second, operations, and the share of this machine's matrix peak reached."""
    if record and no_record:
        raise Misuse("--record and --no-record contradict each other; give one of them.")
    against = None
    if rival:
        weights = _for_comparison(checkpoint, provider)
        against = Against(chosen_works(works), weights, vit_checkpoint, captions, pairs, itm_batchsize, rounds)
    else:
        _refuse_unused()
    found = read_graphs(graphs)
    load = Load(batchsize, _fitting(found, length, rival), loops, warmup, threads or usable_cpus(), provider)
    names = chosen_names(found, only)
    wanted = None if no_record else record or (RECORDS if machine.in_checkout() else None)
    available_provider(provider)  # before a folder is made
    folder = record_folder(wanted) if wanted else None
    content = bench(found, names, load, against, click.echo)
    if folder:
        what = f"compare-{rival}" if rival else "graphs"
        click.echo(f"Record: {write_record(folder, what, str(found.content['model']), load, content)}")


def _for_comparison(checkpoint: Path | None, provider: str) -> Path:
    """The checkpoint, which a comparison cannot do without. Raises Misuse."""
    if checkpoint is None:
        raise Misuse(
            "--compare transformers needs the weights: add --checkpoint with the file that the graphs were exported from."
        )
    if provider != "cpu":
        raise Misuse(f"--compare transformers runs both on the CPU; leave out --provider {provider}.")
    return checkpoint


def _refuse_unused() -> None:
    """Raise Misuse when an option was typed that only a comparison reads."""
    context = click.get_current_context()
    for name in ("works", "checkpoint", "vit_checkpoint", "captions", "pairs", "rounds", "itm_batchsize"):
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise Misuse(f"--{name.replace('_', '-')} is only read with --compare transformers; add that, or leave it out.")


def _fitting(graphs: Graphs, length: int | None, rival: str | None) -> int:
    """The caption length to time with. Raises Misuse when captions of this model, or its positions, are not that many."""
    usual, positions = graphs.config.protocol.max_length, graphs.config.text.positions
    if length is not None and length > positions:
        raise Misuse(f"--length {length} is longer than the {positions} positions of the text encoder.")
    if length is not None and length > usual and rival:
        raise Misuse(f"--length {length} is longer than the captions of this model, {usual} tokens, which --compare takes.")
    return length or usual


if __name__ == "__main__":
    main()
