"""Two processes, each with half of a batch, against one with the whole: losses, and gradients, of DDP and FSDP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.errors import Misuse
from tests import one_process
from training.parallel import DDP, FULL_SHARD, NONE, SHARD_GRAD_OP, joined

ROOT = Path(__file__).parent.parent
# Losses are sums of at most 60 terms in float32, here added up in another order.
EXACT = 1e-6
KINDS = ("stage1", "pretrain", "opt", "llama", "momentum")


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def run(kind: str, mode: str, out: Path, processes: int = 2) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What each process found."""
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.one_process", kind, mode, str(out)],
            cwd=ROOT,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    said = [process.communicate(timeout=240)[1] for process in started]
    assert all(process.returncode == 0 for process in started), said
    return [torch.load(out / f"{kind}-{mode}-{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What one process finds of the whole batch."""
    out = tmp_path_factory.mktemp("alone")
    for kind in KINDS:
        one_process.main(kind, NONE, out)
    return {kind: torch.load(out / f"{kind}-{NONE}-0.pt") for kind in KINDS}


def largest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference, of the largest gradient of all."""
    assert found.keys() == wanted.keys()
    scale = max(float(tensor.abs().max()) for tensor in wanted.values())
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted) / scale


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*((kind, mode) for kind in KINDS[:4] for mode in (DDP, SHARD_GRAD_OP, FULL_SHARD)), ("momentum", DDP)],
)
def test_two_processes_are_one(
    alone: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]], tmp_path: Path, kind: str, mode: str
) -> None:
    losses, gradients = alone[kind]
    found = run(kind, mode, tmp_path)
    for name, loss in losses.items():
        mean = sum(float(of_one[name]) for of_one, _ in found) / 2
        assert mean == pytest.approx(float(loss), abs=EXACT), name
    for _, theirs in found:
        assert largest(theirs, gradients) <= EXACT
    assert losses.keys() == ({"lm"} if kind in ("opt", "llama") else {"itc", "itm", "lm"})


def test_the_comparison_can_fail(alone: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]) -> None:
    """Half of the batch by itself has other gradients."""
    learner, vocab = one_process.learner_of("stage1")
    total, _ = learner(one_process.batch_of(slice(0, 2), vocab))
    total.backward()
    own = {name: p.grad for name, p in learner.model.named_parameters() if p.grad is not None}
    assert largest(own, alone["stage1"][1]) > 1e4 * EXACT


def test_wrong_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Misuse, match="no parallel mode 'fsdp'"), joined("cpu", "fsdp"):
        pass
    with pytest.raises(Misuse, match="needs processes: start them with torchrun"), joined("cpu", FULL_SHARD):
        pass
    with pytest.raises(Misuse, match="no cuda device 0"), joined("cuda", NONE):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Misuse, match="each would train alone"), joined("cpu", NONE):
        pass
