"""blip-bench on a tiny model, as a user would call it. Shared by the tests of the bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import Result

import bench.__main__
from tests import chain

COMPARED = ("--batchsize", 4, "--itm-batchsize", 5, "--only", "image", "--compare", "transformers")


def annotations(folder: Path, count: int = 40) -> Path:
    """Captions of 1 to 9 words."""
    path = folder / "captions.json"
    texts = [" ".join(chain.WORDS[: 1 + n % 9]).capitalize() + "." for n in range(count)]
    path.write_text(json.dumps([{"image": "a.jpg", "caption": texts}]), "utf-8")
    return path


def blip_bench(graphs: Path, *options: object) -> Result:
    """On one thread, with few loops."""
    named = ("--graphs", graphs, "--threads", 1, "--loops", 2, "--warmup", 1)
    return chain.call(bench.__main__.main, *named, *options)


def record_in(folder: Path) -> dict[str, Any]:
    """The one record of a folder, and the name of its file."""
    (path,) = folder.iterdir()
    content: dict[str, Any] = json.loads(path.read_text("utf-8")) | {"file": path.name}
    return content
