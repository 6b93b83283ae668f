"""`blip-post`: outputs/ -> report/. Never runs a model."""

from __future__ import annotations

from pathlib import Path

import click

from models.errors import Command, Misuse
from postprocess import report


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--recall", "wants_recall", is_flag=True, help="Recall of retrieval in both directions.")
@click.option("--outputs", type=click.Path(path_type=Path), default="build/outputs", help="Folder of `blip-run retrieval`.")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Folder of `blip-pre retrieval`.  [default: the one --outputs names]"
)
@click.option("--out", type=click.Path(path_type=Path), default="build/report", help="Folder to write.")
@click.option("--keys", type=click.Choice(["blip", "ascend"]), default="blip", help="Names of the metrics: txt_r1 … or text_r1 …")
@click.option("--verify", is_flag=True, help="Check the sha256 of every file that is read.")
def main(wants_recall: bool, outputs: Path, data: Path | None, out: Path, keys: str, verify: bool) -> None:
    """Report how well a run did: a table here, report.json and a self-contained report.html in OUT."""
    if not wants_recall:
        raise Misuse("Nothing was asked for. Recall of a retrieval run: blip-post --recall --outputs build/outputs.")
    made = report.write(outputs, data, out, keys, verify)
    click.echo(made.text)
    click.echo(made.page)


if __name__ == "__main__":
    main()
