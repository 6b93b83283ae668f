"""What docs/ascend.md says is what there is: its commands, the recipe's settings, and each correction to the recipe."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import click
import pytest

from export.cann import MIXED, OLD_NAMES, OPSETS_READ, PRECISIONS
from export.sizes import fixed
from models.config import Blip2LlmConfig
from models.generation_spec import SLOTS
from models.presets import preset
from models.recipe import ASCEND_MODELZOO, recipe
from tests.commands import COMMANDS
from tests.test_atc_command import BATCHES, RECIPE, corrected

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "ascend.md").read_text("utf-8")
COMMAND = re.compile(r"^ +((?:blip-[a-z]+|make|bash) .*)$", re.MULTILINE)


def commands(page: str) -> list[str]:
    """The command lines that a page shows, continued lines joined."""
    return [re.sub(r" +", " ", line) for line in COMMAND.findall(page.replace("\\\n", " "))]


def parsed(line: str) -> dict[str, object]:
    """What our command makes of its line, without running it: the values of its options. Raises click's own for a wrong one."""
    name, *words = shlex.split(line)
    command: click.Command = importlib.import_module(COMMANDS[name.removeprefix("blip-")]).main
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    return command.make_context(name, words).params


def rows(heading: str) -> list[list[str]]:
    """The cells of the tables under a heading, up to the next one."""
    (part,) = re.findall(rf"^##+ {re.escape(heading)}$(.*?)(?=^##+ |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in cells] for cells in lines]


@pytest.mark.parametrize("line", [line for line in commands(PAGE) if line.startswith("blip-")])
def test_our_commands_take_these_lines(line: str) -> None:
    parsed(line)


@pytest.mark.parametrize(
    "line",
    [
        "blip-atc --graphs g --batchsize 1 --cann 9",
        "blip-atc --graphs g --chip Ascend310P3",
        "blip-run retrieval --as modelzoo",
        "blip-pre retrieval --images i",
        "blip-run ais-bench --om om",
        "blip-trian rank-table",
    ],
)
def test_a_wrong_line_is_seen(line: str) -> None:
    with pytest.raises((click.UsageError, KeyError)):
        parsed(line)


def test_every_step_is_there() -> None:
    shown = {
        " ".join(re.findall(r"^blip-\S+|(?<= )(?:retrieval|caption|pairs|ais-bench-script)(?= )", line))
        for line in commands(PAGE)
    }
    steps = {"blip-export", "blip-atc", "blip-pre retrieval", "blip-run retrieval", "blip-post", "blip-train"}
    assert steps | {"blip-run caption", "blip-run ais-bench-script", "blip-run pairs"} <= shown
    for option in ("--check", "--dry-run", "--script", "--collect", "--keep"):
        assert any(line.startswith("blip-atc") and f" {option} " in line for line in commands(PAGE)), option


def test_the_preset_is_given_to_each_step_that_takes_it() -> None:
    given = [parsed(line).get("recipe") for line in commands(PAGE) if "--as" in line]
    # blip-pre, blip-run, blip-post; and with ais_bench alone ais-bench-script, pairs and blip-post
    assert given == [ASCEND_MODELZOO] * 6


def test_what_moves_the_figures() -> None:
    found = {cells[0]: cells[1] for cells in rows("What moves the figures")}
    theirs = recipe(ASCEND_MODELZOO)
    assert found["resize"] == theirs.interpolation
    assert found["words, tokens"] == f"{theirs.max_words}, {theirs.max_length}"
    assert found["`k_test`"] == str(theirs.k_test)
    ours = preset("blip-retrieval-base-coco").protocol, preset("blip-retrieval-base-flickr").protocol
    own = {cells[0]: cells[2] for cells in rows("What moves the figures") if len(cells) == 4}
    assert own["`k_test`"] == f"{ours[0].k_test} for COCO, {ours[1].k_test} for Flickr30k"
    assert own["resize"] == ours[0].interpolation
    assert own["words, tokens"] == f"{ours[0].max_words}, {ours[0].max_length}"


def test_every_correction_of_the_recipe_is_listed_and_no_other() -> None:
    changed = set()
    for graph, line in RECIPE.items():
        for bs in BATCHES:
            words = shlex.split(line.format(bs=bs))[1:]
            before = dict(word.removeprefix("--").split("=", 1) for word in words)
            after = corrected(before, graph, bs)
            changed |= {f"`--{name}`" for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert {cells[0] for cells in rows("Corrections to the recipe's ATC commands")[1:]} == changed


def test_precisions_and_opsets() -> None:
    found = {cells[0]: (cells[1], cells[2]) for cells in rows("Precision")[1:]}
    assert set(found) == {f"`{name}`" for name in PRECISIONS}
    for name, (new, old) in found.items():
        assert new.strip("`").removeprefix("--precision_mode_v2=") == name.strip("`")
        assert old.strip("`").removeprefix("--precision_mode=") == OLD_NAMES[name.strip("`")]
    assert OLD_NAMES[MIXED] in str(rows("Corrections to the recipe's ATC commands"))
    (cann,) = [cells for cells in rows("Versions") if cells[0] == "CANN"]
    said = {int(r): (int(a), int(b)) for r, a, b in re.findall(r"(\d): (?:opsets )?(\d+) (?:to) (\d+)", cann[2])}
    said[6] = tuple(map(int, re.findall(r"opsets (\d+) to (\d+)", cann[1])[0]))  # type: ignore[assignment]
    assert said == {release: (opsets[0], opsets[-1]) for release, opsets in OPSETS_READ.items()}


def test_buffers_have_the_size_that_is_said() -> None:
    """Slots by default, and megabytes in float32 of one text's keys and values."""
    table = {cells[0].strip("`"): cells for cells in rows("Captions and answers: the decoder as an `.om`")[1:]}
    for model, cells in table.items():
        config = preset(model)
        slots = fixed(config, 1, 1, None).others[SLOTS]
        if isinstance(config, Blip2LlmConfig):
            layers, width = (
                config.llm.depth,
                config.llm.heads * getattr(config.llm, "head_width", config.llm.width // config.llm.heads),
            )
        else:
            layers, width = config.decoder.depth, config.decoder.width  # type: ignore[union-attr]
        assert int(re.findall(r"\d+", cells[1])[0]) == slots
        assert float(cells[2].removesuffix(" MB")) == pytest.approx(2 * layers * width * slots * 4 / 1e6, rel=0.01)
    assert len(table) == 4


def test_links_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^##+ (.*)$", PAGE, re.MULTILINE)
    }
    wanted = re.findall(r"\]\(#([^)]+)\)", PAGE)
    assert len(wanted) > 10
    assert set(wanted) <= headings


@pytest.mark.parametrize("path", ["export/atc_ops.txt", "tests/test_atc_command.py", "tests/test_ascend_preset.py"])
def test_files_that_are_named_are_there(path: str) -> None:
    assert f"`{path}`" in PAGE
    assert (ROOT / path).is_file()
