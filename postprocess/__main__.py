"""`blip-post`: outputs/ -> report/, or a file of captions or answers -> report/. Never runs a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from models import manifest
from models.errors import Command, Misuse, UserError
from models.recipe import RECIPES, departures, wanted
from postprocess import caption_report, caption_source, classify_report, report, vqa_report, vqa_source
from postprocess.inputs import AisBench
from postprocess.page import Report
from postprocess.vqa_accuracy import RULES

# What reports the outputs of each task.
OPTIONS = {"retrieval": "--recall", "classify": "--top1", "caption": "--captions", "vqa": "--vqa"}
TEXTS = ("--captions", "--vqa")
# Which reports take an option that not all of them do.
OF = {
    "--keys": ("--recall",),
    "--as": ("--recall",),
    "--ais-bench": ("--recall",),
    "--pairs": ("--recall",),
    "--references": TEXTS,
    "--subset": TEXTS,
    "--images": TEXTS,
    "--metrics": ("--captions",),
    "--split": ("--captions",),
    "--questions": ("--vqa",),
    "--vqa-rule": ("--vqa",),
}
FILE = click.Path(path_type=Path)
RUN = ""  # what --captions and --vqa are given when they stand alone: report a run


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--recall", "wants_recall", is_flag=True, help="Recall of retrieval in both directions.")
@click.option("--top1", "wants_top1", is_flag=True, help="Accuracy of zero-shot classification.")
@click.option(
    "--captions",
    is_flag=False,
    flag_value=RUN,
    metavar="[RESULTS]",
    help='BLEU, ROUGE-L, CIDEr of captions: of --outputs, or of a JSON file [{"image_id", "caption"}].',
)
@click.option(
    "--vqa",
    is_flag=False,
    flag_value=RUN,
    metavar="[RESULTS]",
    help='Accuracy of answers: of --outputs, or of a JSON file [{"question_id", "answer"}].',
)
@click.option("--outputs", type=FILE, default="build/outputs", help="Folder of `blip-run`.")
@click.option("--ais-bench", type=FILE, help="What ais_bench.sh of `blip-run ais-bench-script` left, instead of --outputs.")
@click.option("--pairs", type=FILE, help="With --ais-bench: folder of `blip-run pairs`.  [default: nothing is re-ranked]")
@click.option("--data", type=FILE, help="Folder of `blip-pre`.  [default: the one --outputs names]")
@click.option("--out", type=FILE, default="build/report", help="Folder to write.")
@click.option(
    "--keys",
    type=click.Choice(["blip", "ascend"]),
    show_default="blip",
    help="Names of the metrics of --recall: txt_r1 … or text_r1 …",
)
@click.option(
    "--as", "recipe", type=click.Choice(list(RECIPES)), help="Whose evaluation it is: ascend-modelzoo has --keys ascend."
)
@click.option("--references", type=FILE, help="What people wrote or answered, a JSON file.  [default: what the data holds]")
@click.option("--questions", type=FILE, help="VQA v2's file of questions, for their texts.")
@click.option("--images", type=FILE, help="Folder of pictures to show with a file of results.")
@click.option("--subset", is_flag=True, help="Count only the pictures or questions that have a result.")
@click.option("--metrics", default=caption_report.USUAL, help=f"Of captions: some of {','.join(caption_report.METRICS)}.")
@click.option("--split", default=caption_source.SPLIT, help="Which part of Karpathy's own file --references is.")
@click.option(
    "--vqa-rule",
    type=click.Choice(RULES),
    default=RULES[0],
    help="Whose form of the official rule: LAVIS's cleans the answer and little of what people said, the later one both.",
)
@click.option("--verify", is_flag=True, help="Check the sha256 of every file that is read.")
def main(**given: Any) -> None:
    """Report how well a run did: a table here, report.json and a self-contained report.html in OUT."""
    asked = _asked(given)
    named = _named()
    for option in named & OF.keys():
        if asked not in OF[option]:
            raise Misuse(f"{option} belongs to {' and '.join(OF[option])}; leave it out with {asked}.")
    if given["ais_bench"] is not None and "--outputs" in named:
        raise Misuse("Both --outputs and --ais-bench are given; choose one.")
    if given["ais_bench"] is None and "--pairs" in named:
        raise Misuse("--pairs belongs to --ais-bench, the folder that ais_bench wrote. Name it, or leave --pairs out.")
    results = given["captions"] if asked == "--captions" else given["vqa"] if asked == "--vqa" else RUN
    if results == RUN:
        if "--images" in named:
            raise Misuse("--images shows pictures with a file of results; a run has its own. Leave it out.")
        if given["ais_bench"] is None:
            _check_task(given["outputs"], asked)
    elif idle := sorted(named & {"--outputs", "--data", "--verify"}):
        raise Misuse(f"{asked} {results} is a file of results, and {idle[0]} is of a run. Choose one of the two.")
    elif Path(results).is_dir():
        raise Misuse(f"{results} is a folder. {asked} takes a file of results; name the folder of a run with --outputs.")
    if not given["references"] and (idle := sorted(named & {"--questions", "--split"})):
        raise Misuse(f"{idle[0]} belongs to --references, a file of what people wrote or answered. Name one, or leave it out.")
    made = _written(asked, Path(results) if results else None, given)
    click.echo(made.text)
    click.echo(made.page)


def _asked(given: dict[str, Any]) -> str:
    """The one report that is wanted."""
    wanted = {
        "--recall": given["wants_recall"],
        "--top1": given["wants_top1"],
        "--captions": given["captions"] is not None,
        "--vqa": given["vqa"] is not None,
    }
    asked = [option for option, wants in wanted.items() if wants]
    if not asked:
        raise Misuse(
            "Nothing was asked for. Of a retrieval run: blip-post --recall; of a classification run: blip-post --top1; of "
            "captions: blip-post --captions; of answers: blip-post --vqa."
        )
    if len(asked) > 1:
        raise Misuse(f"{' and '.join(asked)} are of different runs; choose the one that --outputs holds.")
    return asked[0]


def _named() -> set[str]:
    """The options that stand in the command."""
    context = click.get_current_context()
    sources = ((option, context.get_parameter_source(str(option.name))) for option in context.command.params)
    return {option.opts[0] for option, source in sources if source is ParameterSource.COMMANDLINE}


def _written(asked: str, results: Path | None, given: dict[str, Any]) -> Report:
    outputs, data, out, verify = (given[name] for name in ("outputs", "data", "out", "verify"))
    references, questions, images, split = (given[name] for name in ("references", "questions", "images", "split"))
    if asked == "--recall":
        keys = wanted(given["recipe"], "keys", given["keys"]) or "blip"
        for line in departures(given["recipe"], {"keys": keys}):
            click.echo(line, err=True)
        ais_bench = given["ais_bench"]
        return report.write(AisBench(ais_bench, given["pairs"]) if ais_bench else outputs, data, out, keys, verify)
    if asked == "--top1":
        return classify_report.write(outputs, data, out, verify)
    if asked == "--captions":
        caption_report.chosen(given["metrics"])
        captions = (
            caption_source.of_file(results, references, images, split)
            if results
            else caption_source.of_run(outputs, data, references, split, verify)
        )
        return caption_report.write(captions, out, given["metrics"], given["subset"])
    answers = (
        vqa_source.of_file(results, references, questions, images)
        if results
        else vqa_source.of_run(outputs, data, references, questions, verify)
    )
    return vqa_report.write(answers, out, given["vqa_rule"], given["subset"])


def _check_task(outputs: Path, option: str) -> None:
    """Raise UserError when `outputs` are of a task that another option reports."""
    task = manifest.read(outputs, "outputs").content.get("task")
    right = OPTIONS.get(task) if isinstance(task, str) else None
    if right and right != option:
        raise UserError(f"{outputs} holds outputs of the task {task!r}; {option} cannot report them. Use blip-post {right}.")


if __name__ == "__main__":
    main()
