"""blip-run: graphs x data -> outputs."""

from __future__ import annotations

from pathlib import Path

import click

from models.errors import Group, ResumableCommand
from runtime.retrieval import Options, run_retrieval
from runtime.session import PROVIDERS


@click.group(cls=Group)
def main() -> None:
    """Run the graphs over prepared data."""


@main.command(cls=ResumableCommand, context_settings={"show_default": True})
@click.option("--graphs", type=click.Path(path_type=Path), default=Path("build/graphs"), help="Folder that blip-export wrote.")
@click.option("--data", type=click.Path(path_type=Path), default=Path("build/data"), help="Folder that blip-pre wrote.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/outputs"), help="Folder to write.")
@click.option("--batchsize", type=click.IntRange(min=1), default=16, help="Pictures or captions per run of an encoder.")
@click.option("--itm-batchsize", type=click.IntRange(min=1), default=64, help="Captions of one picture per run of the ITM graph.")
@click.option(
    "--k-test", type=click.IntRange(min=1), default=None, help="Candidates re-ranked per query.  [default: the model's]"
)
@click.option("--provider", type=click.Choice(PROVIDERS), default="cpu", help="Where ONNX Runtime runs; never another one.")
@click.option("--threads", type=click.IntRange(min=1), default=None, help="Threads of one operator.  [default: all cores]")
@click.option("--feat-dtype", type=click.Choice(["float32", "float16"]), default="float32", help="How image features are stored.")
@click.option("--restart", is_flag=True, help="Begin anew, though --out holds a half-finished run or this very run.")
@click.option("--verify", is_flag=True, help="Check the sha256 of every file read.")
def retrieval(
    graphs: Path,
    data: Path,
    out: Path,
    batchsize: int,
    itm_batchsize: int,
    k_test: int | None,
    provider: str,
    threads: int | None,
    feat_dtype: str,
    restart: bool,
    verify: bool,
) -> None:
    """Embed all pictures and captions, then re-rank each one's best candidates with the ITM head."""
    options = Options(graphs, data, out, batchsize, itm_batchsize, k_test, provider, threads, feat_dtype, restart, verify)
    run_retrieval(options, click.echo)
    click.echo(f"Outputs: {out}")


if __name__ == "__main__":
    main()
