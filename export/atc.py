"""blip-atc: ONNX graphs to Ascend's .om files, with ATC here or by a script on another host. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from export import cann
from export.atc_command import shell
from export.atc_plan import LARGEST_OM, USUAL_BATCH, Options, Plan, plan, too_large
from export.atc_run import collect, convert, write_script
from export.atc_script import SCRIPT
from export.lengths import BUCKETS, buckets
from export.op_table import read_table
from export.soc import checked_soc, soc_of_this_machine
from export.targets import OPEN
from models.errors import Command, Misuse, UserError
from models.om import DYNAMIC, FIXED

CHECKED = ("graphs", "only", "batchsize", "length", "cann", "operators", "check")  # all that --check reads
CHECKED_SAID = "--graphs, --only, --batchsize, --length, --cann and --operators"


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--graphs", type=click.Path(path_type=Path), default=Path("build/graphs"), help="Folder that blip-export wrote.")
@click.option("--only", default=None, help="These graphs, with commas between.  [default: all]")
@click.option(
    "--batchsize",
    default=None,
    help=f"One or several, with commas between; an .om for each.  [default: that of the graphs, or {USUAL_BATCH}]",
)
@click.option("--soc", default=None, help="Processor, such as Ascend310P3.  [default: what npu-smi info names here]")
@click.option(
    "--cann", type=click.Choice([str(n) for n in cann.RELEASES]), default=str(cann.DEFAULT_RELEASE), help="Release of CANN."
)
@click.option(
    "--precision",
    default=None,
    metavar=f"[{'|'.join(cann.PRECISIONS)}]",
    help=f"Of every graph, and of single ones behind it, as in {cann.FP16},itm={cann.ORIGIN}.  "
    f"[default: {cann.FP16} for image encoders, {cann.MIXED} for the others]",
)
@click.option(
    "--length",
    default=None,
    help=f"Tokens of a text, one or several with commas between, an .om for each; the graphs' longest must be among them. "
    f"'{BUCKETS}': the usual ones, {','.join(map(str, buckets(35)))} for 35. Several need graphs exported with --length {OPEN}."
    "  [default: the longest]",
)
@click.option(
    "--dynamic",
    type=click.Choice(DYNAMIC),
    default=FIXED,
    help="One .om for all of --batchsize, which then are its gears: by the batch axis, or by any axis.",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    default=None,
    help="Operators to keep in float32: a list of names, a folder with one for each graph, or the JSON of --modify_mixlist.",
)
@click.option(
    "--op-precision",
    type=click.Path(path_type=Path),
    default=None,
    help="op_precision.ini for every graph.  [default: Gelu=high_performance for those that read texts alone]",
)
@click.option(
    "--external-weight",
    is_flag=True,
    help=f"Weights beside the .om, in weight/: ais_bench refuses an .om of more than {LARGEST_OM // 10**9} GB.",
)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder to write.  [default: build/om]")
@click.option("--dry-run", is_flag=True, help="Print the commands, as they are run in --out, and stop.")
@click.option("--script", is_flag=True, help=f"Write {SCRIPT} instead, for a host without Python.  [--out default: build/atc]")
@click.option("--check", is_flag=True, help="Check that ATC can read the graphs, without ATC, and stop.")
@click.option(
    "--operators",
    type=click.Path(path_type=Path),
    default=None,
    help="For --check: the operators that ATC reads, in place of the list that comes with this package (export/atc_ops.txt).",
)
@click.option("--collect", "collecting", is_flag=True, help=f"Write the manifest of --out, which {SCRIPT} has filled.")
def main(
    graphs: Path,
    only: str | None,
    batchsize: str | None,
    soc: str | None,
    cann: str,
    precision: str | None,
    length: str | None,
    dynamic: str,
    keep: Path | None,
    op_precision: Path | None,
    external_weight: bool,
    out: Path | None,
    dry_run: bool,
    script: bool,
    check: bool,
    operators: Path | None,
    collecting: bool,
) -> None:
    """Convert the graphs in GRAPHS with Ascend's converter, ATC."""
    if sum((dry_run, script, check, collecting)) > 1:
        raise Misuse("--dry-run, --script, --check and --collect are different things to do; give one.")
    if operators and not check:
        raise Misuse("--operators is the list that --check looks operators up in; give both, or leave it out.")
    out = out or Path("build/atc" if script or collecting else "build/om")
    if collecting:
        click.echo(f"{collect(out)} .om files: {out}")
        return
    batches = _batches(batchsize)
    names = [name.strip() for name in only.split(",")] if only is not None else None
    if check:
        _refuse_beside_check(click.get_current_context())
        _check(graphs, int(cann), batches, length, names, operators)
        return
    found = _soc(soc, elsewhere=dry_run or script)
    options = Options(
        graphs, out, names, batches, found, int(cann), precision, length, dynamic, keep, op_precision, external_weight
    )
    made = plan(options)
    for said in too_large(made):
        click.echo(f"Warning: {said}", err=True)
    if dry_run:
        _show(made)
    elif script:
        write_script(made, out)
        click.echo(f"{len(made.jobs)} commands: {out / SCRIPT}")
    else:
        convert(made, out, click.echo)
        click.echo(f"{len(made.jobs)} .om files for {found}: {out}")


def _soc(name: str | None, elsewhere: bool) -> str:
    """The processor, and how it is known: on a machine that is not the target nobody can ask it."""
    if name is not None:
        return checked_soc(name)
    try:
        return soc_of_this_machine()
    except UserError as error:
        if elsewhere:
            raise Misuse(error.message) from error
        raise


def _batches(text: str | None) -> list[int] | None:
    """The numbers of --batchsize. Raises Misuse for one that is none, or stands twice."""
    if text is None:
        return None
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise Misuse(f"--batchsize {text} is not a list of numbers such as 1,4,8.") from error
    if wrong := [batch for batch in batches if batch < 1]:
        raise Misuse(f"--batchsize {text} holds {wrong[0]}; a batch has at least 1 row.")
    if twice := [batch for batch in batches if batches.count(batch) > 1]:
        raise Misuse(f"--batchsize {text} holds {twice[0]} twice.")
    return batches


def _show(made: Plan) -> None:
    click.echo(f"# in {made.options.out}", err=True)
    for name, text in made.files.items():
        click.echo(f"# {name}: {' '.join(text.split())}", err=True)
    for job in made.jobs:
        click.echo(shell(job.argv))


def _refuse_beside_check(context: click.Context) -> None:
    """Raises Misuse for an option that --check would leave without effect."""
    others = [option for option in context.command.params if option.name and option.name not in CHECKED]
    given = [o.opts[0] for o in others if context.get_parameter_source(str(o.name)) is ParameterSource.COMMANDLINE]
    if given:
        raise Misuse(f"--check takes {CHECKED_SAID} alone; leave out {', '.join(given)}.")


def _check(
    graphs: Path,
    release: int,
    batches: Sequence[int] | None,
    length: str | None,
    only: Sequence[str] | None,
    operators: Path | None,
) -> None:
    # Imported here: it reads every graph with onnx, which no other mode needs to.
    from export.lint import lint_folder

    table = read_table(operators) if operators else None
    findings = lint_folder(graphs, release, batches or [USUAL_BATCH], table, only, length)
    for finding in findings:
        click.echo(f"{finding.graph}: {finding.rule}: {finding.said}")
    if findings:
        raise UserError(f"ATC of CANN {release} would refuse or garble what {len(findings)} findings name; see above.")
    click.echo(f"ATC of CANN {release} can read {', '.join(only) if only else 'every graph'} in {graphs}.")


if __name__ == "__main__":
    main()
