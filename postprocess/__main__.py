"""`blip-post`: outputs/ -> report/. Never runs a model."""

from __future__ import annotations

from pathlib import Path

import click

from models import manifest
from models.errors import Command, Misuse, UserError
from postprocess import classify_report, report

OPTIONS = {"retrieval": "--recall", "classify": "--top1"}  # what reports the outputs of each task


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--recall", "wants_recall", is_flag=True, help="Recall of retrieval in both directions.")
@click.option("--top1", "wants_top1", is_flag=True, help="Accuracy of zero-shot classification.")
@click.option("--outputs", type=click.Path(path_type=Path), default="build/outputs", help="Folder of `blip-run`.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of `blip-pre`.  [default: the one --outputs names]")
@click.option("--out", type=click.Path(path_type=Path), default="build/report", help="Folder to write.")
@click.option(
    "--keys",
    type=click.Choice(["blip", "ascend"]),
    show_default="blip",
    help="Names of the metrics of --recall: txt_r1 … or text_r1 …",
)
@click.option("--verify", is_flag=True, help="Check the sha256 of every file that is read.")
def main(
    wants_recall: bool, wants_top1: bool, outputs: Path, data: Path | None, out: Path, keys: str | None, verify: bool
) -> None:
    """Report how well a run did: a table here, report.json and a self-contained report.html in OUT."""
    if wants_recall and wants_top1:
        raise Misuse("--recall and --top1 are of different runs; choose the one that --outputs holds.")
    if not wants_recall and not wants_top1:
        raise Misuse("Nothing was asked for. Of a retrieval run: blip-post --recall; of a classification run: blip-post --top1.")
    if wants_top1 and keys:
        raise Misuse("--keys names the metrics of --recall; leave it out with --top1.")
    _check_task(outputs, "--recall" if wants_recall else "--top1")
    if wants_recall:
        made = report.write(outputs, data, out, keys or "blip", verify)
    else:
        made = classify_report.write(outputs, data, out, verify)
    click.echo(made.text)
    click.echo(made.page)


def _check_task(outputs: Path, option: str) -> None:
    """Raise UserError when `outputs` are of a task that another option reports."""
    task = manifest.read(outputs, "outputs").content.get("task")
    right = OPTIONS.get(task) if isinstance(task, str) else None
    if right and right != option:
        raise UserError(f"{outputs} holds outputs of the task {task!r}; {option} cannot report them. Use blip-post {right}.")


if __name__ == "__main__":
    main()
