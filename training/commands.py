"""blip-train stage2, caption, retrieval and vqa: a training that a settings file or a preset describes."""

from __future__ import annotations

import click

from models.errors import Command, Misuse, extra

TASKS = {
    "stage2": "Train BLIP-2's second stage: Q-Former and projection before a language model that stays as it is, or has LoRA.",
    "caption": "Fine-tune BLIP or BLIP-2 to describe pictures.",
    "retrieval": "Fine-tune BLIP, with momentum, or BLIP-2 to find pictures and captions.",
    "vqa": "Fine-tune BLIP to answer questions about pictures.",
}


def command_of(task: str) -> click.Command:
    """The command of a task."""

    def callback(config: str, sets: tuple[str, ...], resume: bool, max_steps: int | None, perf: bool) -> None:
        if perf and max_steps is None:
            raise Misuse("--perf measures a number of steps. Add --max-steps N.")
        with extra("torch"):
            from training.fit import fit
            from training.settings_file import read_settings
        settings = read_settings(config, sets)
        if settings.task != task:
            raise Misuse(f"{config} is of the task {settings.task}. Use blip-train {settings.task}, or another --config.")
        fitted = fit(settings, resume, max_steps, perf)
        if fitted.weights:
            click.echo(f"{fitted.weights}: {fitted.weights.stat().st_size / 1e6:.2f} MB")
        elif not perf:
            click.echo(f"Stopped after step {fitted.step:,}. The same command with --resume goes on from there.")

    options = [
        click.option("--config", required=True, help="A settings file (YAML), or the name of a preset."),
        click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="One setting, such as run.batchsize=8."),
        click.option("--resume", is_flag=True, help="Go on from the newest whole state in run.out."),
        click.option("--max-steps", type=click.IntRange(min=1), help="Stop after so many steps, with a state to go on from."),
        click.option("--perf", is_flag=True, help="Measure the speed of --max-steps steps, and save nothing."),
    ]
    found = click.command(task, cls=Command, help=TASKS[task])(callback)
    for option in options:
        found = option(found)
    return found


COMMANDS = [command_of(task) for task in TASKS]
