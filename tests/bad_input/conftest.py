"""One good chain of each model for all cases, and a copy of it for each."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import chain
from tests.bad_input.table import Work
from tests.classes import write_classes
from tests.make_checkpoint import encoder_file, stage1_state, without_encoder, write_stage1
from tests.test_cifar import batch, write_cifar100
from tests.tiny import TINY2, TINY_CLIP, random_blip2, random_model

GRAPHS2 = "text_embed,image,text_feat,multimodal"  # what classification and features need


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory, atc_graphs: Path) -> Path:
    """Pictures, model, graphs, data, outputs, report of BLIP, each made by its command. Read only."""
    root = tmp_path_factory.mktemp("good")
    chain.write_model(root / "model", random_model())
    chain.with_only(atc_graphs, root / "graphs", "text_embed", "image", "itm")
    chain.write_pictures(root, own=(2, 1, 3, 2))
    work = Work(root)
    chain.done(work.call("pre", "--out", root / "data"))
    chain.done(work.call("run", "--out", root / "outputs", "--k-test", 4))
    chain.done(work.call("post", "--out", root / "report"))
    return root


@pytest.fixture(scope="session")
def good2(tmp_path_factory: pytest.TempPathFactory, atc_graphs: Path) -> Path:
    """The same of BLIP-2, with classification and features in place of retrieval; and beside it what a step may be given
    instead: CIFAR, a checkpoint in two files, graphs of BLIP. Read only."""
    root = tmp_path_factory.mktemp("good2")
    static = ("--target", "atc", "--batchsize", chain.STATIC)  # the quicker exporter
    chain.export_graphs(root, *static, "--graphs", GRAPHS2, model=random_blip2())
    chain.with_only(atc_graphs, root / "graphs of BLIP", "text_embed", "image")
    state = stage1_state(TINY2, std=0.2)
    write_stage1(TINY2, root / "whole.pth", state)
    write_stage1(TINY2, root / "stage1.pth", without_encoder(state))
    torch.save(encoder_file(state, TINY2), root / "eva.pth")
    torch.save(encoder_file(stage1_state(TINY_CLIP, std=0.2), TINY_CLIP), root / "clip.pth")
    chain.write_pictures(root, own=(2, 1, 3, 2))
    write_classes(root / "classes")
    write_cifar100(root / "cifar", batch())
    work = Work(root)
    chain.done(work.call("pre", "--out", root / "data"))
    chain.done(work.call("pre classify", "--out", root / "label-data"))
    chain.done(work.call("run classify", "--out", root / "label-outputs", "--temperature", 0.5))
    chain.done(work.call("run features", "--out", root / "features", "--modes", "image"))
    chain.done(work.call("post top1", "--out", root / "label-report"))
    return root


@pytest.fixture
def work(good: Path, tmp_path: Path) -> Iterator[Work]:
    """A copy of BLIP's to spoil; --out does not exist yet."""
    yield from _copied(good, tmp_path / "work")


@pytest.fixture
def work2(good2: Path, tmp_path: Path) -> Iterator[Work]:
    """The same of BLIP-2."""
    yield from _copied(good2, tmp_path / "work")


def _copied(good: Path, root: Path) -> Iterator[Work]:
    shutil.copytree(good, root)
    yield Work(root)
    shutil.rmtree(root)  # all the copies together would fill gigabytes
