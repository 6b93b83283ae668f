"""What README says is what there is: the table of graphs, the make targets, the options in its commands."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import click
import pytest

from models.config import preset
from models.spec import TensorSpec, graph_specs
from tests.commands import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def graph_table() -> str:
    """The table as README must show it, from the specs of the base model."""

    def say(tensors: tuple[TensorSpec, ...]) -> str:
        return ", ".join(f"`{t.name}` {t.dtype} [{', '.join(map(str, t.shape))}]" for t in tensors)

    rows = [
        f"| `{spec.name}` | {say(spec.inputs)} | {say(spec.outputs)} |"
        for spec in graph_specs(preset("blip-retrieval-base-coco")).values()
    ]
    return "\n".join(["| graph | inputs | outputs |", "|---|---|---|", *rows])


def commands() -> list[str]:
    """The command lines that README shows, continued lines joined."""
    text = README.replace("\\\n", " ")
    return re.findall(r"^ +((?:blip-(?:pre|export|run|post|bench|train)|make) .*)$", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["README.md", "demo/README.md"])
def test_no_figure_is_left_open(name: str) -> None:
    assert "@@" not in (ROOT / name).read_text("utf-8")


def test_table_of_graphs_is_the_spec() -> None:
    assert graph_table() in README


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets == {"demo", "test", "lint", "export", "data", "run", "report", "bench", "train", "clean", "help"}
    named = {line.split()[1] for line in commands() if line.startswith("make ")}
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("blip-")])
def test_options_exist(line: str) -> None:
    name, *words = line.split()
    command: click.Command = importlib.import_module(f"{COMMANDS[name.removeprefix('blip-')]}.__main__").main
    if isinstance(command, click.Group):
        command = command.commands[words[0]]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


if __name__ == "__main__":
    print(graph_table())
