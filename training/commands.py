"""blip-train TASK: a training that a settings file or a preset describes."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from typing import Any

import click

from models.errors import Command, Misuse, UserError, extra
from training.settings import Lora

STOPPED = 130  # exit code of what a signal ended, as a shell has it of Ctrl-C
LIST = "?"  # in the place of a preset
LORA = [field.name for field in dataclasses.fields(Lora)]
TASKS = {
    "pretrain": "Train BLIP from nothing with its three losses: ITC, ITM and LM, with momentum encoders and a queue if asked.",
    "stage1": "Train BLIP-2's first stage, the Q-Former upon an image encoder, with the losses ITC, ITM and LM.",
    "stage2": "Train BLIP-2's second stage: Q-Former and projection before a language model that stays as it is, or has LoRA.",
    "caption": "Fine-tune BLIP or BLIP-2 to describe pictures.",
    "retrieval": "Fine-tune BLIP, with momentum, or BLIP-2 to find pictures and captions.",
    "vqa": "Fine-tune BLIP to answer questions about pictures.",
}


KEYS = {  # of a settings file, for what other commands take as options
    **{f"--{name}": name for name in ("images", "annotations", "questions", "split")},
    **{
        f"--{name.replace('_', '-')}": f"model.{name}" for name in ("tokenizer", "checkpoint", "vit_checkpoint", "llm_checkpoint")
    },
    **{"--workers": "data.workers", "--batchsize": "run.batchsize", "--image-size": "model.image_size"},
    **{"--model": "model.name", "--out": "run.out"},
}
OPTION = re.compile(r"(?<![^\s(])--[a-z-]+")


class TaskCommand(Command):
    """A command whose files are named by settings: what their readers say of options is said of keys. --set takes several."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        for before, arg in zip(["", *args], args, strict=False):
            if before == "--set":
                spread.append(arg)
            elif len(spread) > 1 and spread[-2] == "--set" and not arg.startswith("-"):
                spread += ["--set", arg]
            else:
                spread.append(arg)
        return super().parse_args(ctx, spread)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            said = OPTION.sub(lambda option: KEYS.get(option[0], option[0]), error.message)
            raise type(error)(said) from error


def command_of(task: str) -> click.Command:
    """The command of a task."""

    def callback(
        config: str,
        sets: tuple[str, ...],
        cache_features: bool,
        lora: tuple[str, ...],
        resume: bool,
        max_steps: int | None,
        perf: bool,
        show: bool,
    ) -> None:
        if perf and max_steps is None:
            raise Misuse("--perf measures a number of steps. Add --max-steps N.")
        with extra("torch"):
            import yaml

            from training.settings_file import presets, read_settings, to_dict
        if config == LIST:
            click.echo("\n".join(name for name in presets() if read_settings(name).task == task))
            return
        settings = read_settings(config, [*sets, *(("run.cache_features=true",) if cache_features else ()), *lora], task)
        if settings.task != task:
            raise Misuse(f"{config} is of the task {settings.task}. Use blip-train {settings.task}, or another --config.")
        if show:
            click.echo(yaml.safe_dump(to_dict(settings), sort_keys=False, default_flow_style=None, width=130), nl=False)
            return
        with extra("torch"):
            from training.fit import fit
        fitted = fit(settings, resume, max_steps, perf)
        first = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun
        if first and fitted.weights:
            click.echo(f"{fitted.weights}: {fitted.weights.stat().st_size / 1e6:.2f} MB")
        elif first and not perf:
            click.echo(f"Stopped after step {fitted.step:,}. The same command with --resume goes on from there.")
        if fitted.stopped:
            raise SystemExit(STOPPED)

    options = [
        click.option("--config", required=True, help="A settings file (YAML), or a preset; '?' lists those of this task."),
        click.option("--set", "sets", multiple=True, metavar="KEY=VALUE ...", help="Settings, such as run.batchsize=8."),
        click.option("--cache-features", is_flag=True, help="Keep what the frozen image encoder makes of each picture on disk."),
        click.option(
            "--lora", callback=_lora, metavar="rank=16,alpha=32", help="Train the language model by LoRA: rank, alpha, dropout."
        ),
        click.option("--resume", is_flag=True, help="Go on from the newest whole state in run.out."),
        click.option(
            "--max-steps", type=click.IntRange(min=1), help="Stop after so many steps more, with a state to go on from."
        ),
        click.option("--perf", is_flag=True, help="Measure the speed of --max-steps steps, and save no state."),
        click.option("--show", is_flag=True, help="Print all settings, as a file for --config, and stop."),
    ]
    found = click.command(task, cls=TaskCommand, help=TASKS[task])(callback)
    for option in options:
        found = option(found)
    return found


def _lora(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """rank=16,alpha=32 as the changes of settings that it stands for."""
    found = []
    for pair in [] if value is None else value.split(","):
        key, equals, number = (part.strip() for part in pair.partition("="))
        if key not in LORA:
            near = difflib.get_close_matches(key, LORA, n=1, cutoff=0.0)[0]
            raise Misuse(f"--lora has {key!r}; expected {', '.join(LORA)}. Did you mean {near}?")
        if not (equals and number):
            raise Misuse(f"--lora has {pair!r}; expected a number behind {key}, such as rank=16,alpha=32.")
        found.append(f"model.lora.{key}={number}")
    return tuple(found)


COMMANDS = [command_of(task) for task in TASKS]
