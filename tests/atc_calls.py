"""blip-atc over the stand-in for ATC, on a host that has little else. Shared by its test files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from click.testing import Result

from export import atc as command
from models import manifest
from tests import chain
from tests.doubles import atc as double


def install(folder: Path) -> Path:
    """A folder with atc and what bash itself does not have, and no Python; returns it."""
    double.install(folder)
    for name in ("bash", "dirname", "rm"):
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder


def run(graphs: Path, *asked: object, soc: str | None = "Ascend310P3") -> Result:
    """blip-atc of `graphs`, to the folder om beside them."""
    named = () if soc is None else ("--soc", soc)
    return chain.call(command.main, "--graphs", graphs, "--out", graphs.parent / "om", *named, *asked)


def listed(graphs: Path) -> None:
    """The manifest knows the graphs as they now are."""
    content = json.loads((graphs / manifest.NAME).read_text("utf-8"))
    manifest.write(graphs, "graphs", {key: content[key] for key in content.keys() - {"format", "kind", "made_by", "files"}})


def left(graphs: Path) -> list[str]:
    """What lies beside the graphs."""
    return sorted(path.name for path in graphs.parent.iterdir() if path != graphs)
