"""The folders are the packages: each name must mean ours, whatever else is installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import COMMANDS

ROOT = Path(__file__).parent.parent
FOLDERS = ("models", "preprocess", "export", "runtime", "postprocess", "bench", "training", "demo")


@pytest.mark.parametrize("name", FOLDERS)
def test_name_resolves_to_this_checkout(name: str) -> None:
    """A distribution on PyPI called `models` or `bench` would win over an editable install without a word."""
    found = importlib.import_module(name).__file__
    assert found is not None
    assert Path(found).parent == ROOT / name, f"another package named {name!r} is installed; uninstall it"


@pytest.mark.parametrize(("command", "module"), COMMANDS.items())
def test_command_and_module_are_the_same(command: str, module: str, tmp_path: Path) -> None:
    scripts = {e.name: e.value for e in importlib.metadata.distribution("blip-offline").entry_points}
    assert scripts[f"blip-{command}"] == f"{module}:main"
    # From another folder, as a user calls it.
    called = [sys.executable, "-m", module.removesuffix(".__main__"), "--help"]
    done = subprocess.run(called, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_every_dependency_is_pinned() -> None:
    pinned = {
        re.split(r"[=;]", line)[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] != "#"
    }
    for requirement in importlib.metadata.requires("blip-offline") or []:
        name = re.split(r"[^A-Za-z0-9-]", requirement)[0]
        assert name in pinned or name == "blip-offline", f"{name} has no pin in constraints.txt"
