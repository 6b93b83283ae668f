"""One good chain for all cases, and a copy of it for each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import chain
from tests.bad_input.table import Work
from tests.tiny import random_model


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory, atc_graphs: Path) -> Path:
    """Pictures, model, graphs, data, outputs, report, each made by its command. Read only."""
    root = tmp_path_factory.mktemp("good")
    chain.write_model(root / "model", random_model())
    chain.with_only(atc_graphs, root / "graphs", "text_embed", "image", "itm")
    chain.write_pictures(root, own=(2, 1, 3, 2))
    work = Work(root)
    chain.done(work.call("pre", "--out", root / "data"))
    chain.done(work.call("run", "--out", root / "outputs", "--k-test", 4))
    chain.done(work.call("post", "--out", root / "report"))
    return root


@pytest.fixture
def work(good: Path, tmp_path: Path) -> Work:
    """A copy to spoil; --out does not exist yet."""
    shutil.copytree(good, tmp_path / "work")
    return Work(tmp_path / "work")
