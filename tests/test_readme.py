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
TABLES = (
    "blip-retrieval-base-coco",
    "blip2-stage1-vit-g",
    "blip-caption-base",
    "blip-vqa-base",
    "blip2-opt-2.7b",
    "blip2-flan-t5-xl",
)
STATIC_TABLES = ("blip-caption-base", "blip2-opt-2.7b")
LAYER = re.compile(r"\.(\d+)\.(key|value)$")  # of a tensor that is there once a layer: shown for layer n
README = (ROOT / "README.md").read_text("utf-8")


def graph_table(model: str, static: bool = False) -> str:
    """The table as README must show it, from the specs of the model."""

    def say(tensors: tuple[TensorSpec, ...]) -> str:
        once = [t for t in tensors if not (layer := LAYER.search(t.name)) or layer[1] == "0"]
        names = [LAYER.sub(r".n.\2", t.name) for t in once]
        return ", ".join(f"`{name}` {t.dtype} [{', '.join(map(str, t.shape))}]" for name, t in zip(names, once, strict=True))

    specs = graph_specs(preset(model), static).values()
    rows = [f"| `{spec.name}` | {say(spec.inputs)} | {say(spec.outputs)} |" for spec in specs]
    return "\n".join(["| graph | inputs | outputs |", "|---|---|---|", *rows])


def commands() -> list[str]:
    """The command lines that README shows, continued lines joined."""
    text = README.replace("\\\n", " ")
    return re.findall(r"^ +((?:blip-(?:pre|export|convert|atc|run|post|bench|train)|make) .*)$", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["README.md", "demo/README.md"])
def test_no_figure_is_left_open(name: str) -> None:
    assert "@@" not in (ROOT / name).read_text("utf-8")


@pytest.mark.parametrize("model", TABLES)
def test_table_of_graphs_is_the_spec(model: str) -> None:
    assert graph_table(model) in README


@pytest.mark.parametrize("model", STATIC_TABLES)
def test_table_of_static_graphs_is_the_spec(model: str) -> None:
    assert graph_table(model, static=True) in README


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    steps = {"export", "data", "run", "report", "classify", "captions", "answers", "om", "atc-script", "bench"}
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
