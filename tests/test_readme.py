"""What README says is what there is: the table of graphs, the make targets, the options in its commands."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import click
import pytest

from models.presets import preset
from models.spec import TensorSpec, graph_specs
from tests.commands import COMMANDS

ROOT = Path(__file__).parent.parent
TABLES = ("blip-retrieval-base-coco", "blip2-stage1-vit-g")
README = (ROOT / "README.md").read_text("utf-8")


def graph_table(model: str) -> str:
    """The table as README must show it, from the specs of the model."""

    def say(tensors: tuple[TensorSpec, ...]) -> str:
        return ", ".join(f"`{t.name}` {t.dtype} [{', '.join(map(str, t.shape))}]" for t in tensors)

    rows = [f"| `{spec.name}` | {say(spec.inputs)} | {say(spec.outputs)} |" for spec in graph_specs(preset(model)).values()]
    return "\n".join(["| graph | inputs | outputs |", "|---|---|---|", *rows])


def commands() -> list[str]:
    """The command lines that README shows, continued lines joined."""
    text = README.replace("\\\n", " ")
    return re.findall(r"^ +((?:blip-(?:pre|export|convert|run|post|bench|train)|make) .*)$", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["README.md", "demo/README.md"])
def test_no_figure_is_left_open(name: str) -> None:
    assert "@@" not in (ROOT / name).read_text("utf-8")


@pytest.mark.parametrize("model", TABLES)
def test_table_of_graphs_is_the_spec(model: str) -> None:
    assert graph_table(model) in README


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    steps = {"export", "data", "run", "report", "classify", "bench"}
    assert targets == {"demo", "demo-blip2", "test", "lint", *steps, "train", "train-blip2", "clean", "help"}
    named = {line.split()[1] for line in commands() if line.startswith("make ")}
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("blip-")])
def test_options_exist(line: str) -> None:
    name, *words = line.split()
    command: click.Command = importlib.import_module(COMMANDS[name.removeprefix("blip-")]).main
    if isinstance(command, click.Group):
        command = command.commands[words[0]]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


if __name__ == "__main__":
    print("\n\n".join(map(graph_table, TABLES)))
