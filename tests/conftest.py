"""What several test files start from."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from demo import shapes
from models.blip import BlipRetrieval
from models.config import BlipConfig
from runtime.journal import Journal
from tests import chain, generators, om_folder, talkative
from tests.tiny import TINY, random_model

# The products of tiny models are done before a second thread wakes up; on a busy machine waiting for it costs 50 times more.
torch.set_num_threads(1)

# A shell that runs the tests in the background has them, and all that they start, ignore Ctrl-C: some tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def tiny_config() -> BlipConfig:
    return TINY


@pytest.fixture
def tiny_model() -> BlipRetrieval:
    """Random weights; a new model for each test, so a test may change it."""
    return random_model()


@pytest.fixture(scope="session")
def ort_graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every graph of TINY (seed 0), dynamic. Read only."""
    return chain.export_graphs(tmp_path_factory.mktemp("ort"))


@pytest.fixture(scope="session")
def atc_graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every graph of TINY (seed 0), for batches of chain.STATIC and the longest captions. Read only."""
    return chain.export_graphs(tmp_path_factory.mktemp("atc"), "--target", "atc", "--batchsize", chain.STATIC)


@pytest.fixture(scope="session")
def generator_graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Every graph of talkative.talkative(kind) for "ort" or "atc" (generators.STATIC), written once. Read only."""

    @cache
    def exported(kind: str, target: str) -> Path:
        options, folder = generators.STATIC if target == "atc" else (), tmp_path_factory.mktemp(f"{kind}-{target}")
        return generators.export_generator(folder, kind, target, *options, model=talkative.talkative(kind))

    return exported


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, atc_graphs: Path) -> Path:
    """Pictures and captions (chain.OWN) prepared for the graphs of TINY. Read only."""
    return chain.prepare(tmp_path_factory.mktemp("pictures"), atc_graphs)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, atc_graphs: Path) -> Path:
    """The same prepared in files, as ais_bench takes them. Read only."""
    return chain.prepare(tmp_path_factory.mktemp("files"), atc_graphs, "--layout", "files")


@pytest.fixture(scope="session")
def om(tmp_path_factory: pytest.TempPathFactory, atc_graphs: Path) -> Path:
    """An om/ folder of every graph of TINY, for batches of chain.STATIC. Read only."""
    return om_folder.write_om(tmp_path_factory.mktemp("om") / "om", atc_graphs)


@pytest.fixture(params=om_folder.GENERATIONS)
def generation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each year's ais_bench in turn."""
    with om_folder.ais_bench(request.param):
        yield request.param


@pytest.fixture
def today() -> Iterator[None]:
    """The later of the two."""
    with om_folder.ais_bench(om_folder.GENERATIONS[-1]):
        yield


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn pictures, 20 to train on and 10 held out, with captions, and questions about the first. Read only."""
    folder = tmp_path_factory.mktemp("drawn")
    shapes.write(folder, "train", 20, 1)
    shapes.write(folder, "test", 10, 1)
    questions = [
        {"image": entry["image"], "question": "What is it?", "question_id": n, "answer": ["a dot", "a dot", "none"]}
        for n, entry in enumerate(json.loads((folder / "train.json").read_text("utf-8")))
    ]
    (folder / "questions.json").write_text(json.dumps(questions), "utf-8")
    return folder


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Collects the shards that are computed in this process."""
    found: list[tuple[str, int]] = []
    real = Journal.note

    def note(self: Journal, stage: str, shard: int, *others: Any) -> None:
        found.append((stage, shard))
        real(self, stage, shard, *others)

    monkeypatch.setattr(Journal, "note", note)
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without BLIP_REAL_DATA there is nothing for the `real_data` tests to read: they are deselected, and counted as such."""
    if "BLIP_REAL_DATA" in os.environ:
        return
    wanting = [item for item in items if item.get_closest_marker("real_data")]
    if wanting:
        config.hook.pytest_deselected(items=wanting)
        items[:] = [item for item in items if item not in wanting]
