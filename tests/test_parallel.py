"""Two processes, each with half of a batch, against one with the whole: losses, and gradients, of DDP and FSDP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.errors import Misuse
from tests import one_process
from tests.two_processes import run_two
from training.parallel import DDP, FULL_SHARD, NONE, SHARD_GRAD_OP, joined

ROOT = Path(__file__).parent.parent
# Losses are sums of at most 60 terms in float32, here added up in another order.
EXACT = 1e-6
KINDS = ("stage1", "pretrain", "opt", "llama", "momentum")
WAYS = [*((kind, mode) for kind in KINDS[:4] for mode in (DDP, SHARD_GRAD_OP, FULL_SHARD)), ("momentum", DDP)]


Found = tuple[dict[str, Tensor], dict[str, Tensor]]  # losses and gradients, by name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """What one process finds of the whole batch."""
    out = tmp_path_factory.mktemp("alone")
    one_process.main([(kind, NONE) for kind in KINDS], out)
    return {kind: torch.load(out / f"{kind}-{NONE}-0.pt") for kind in KINDS}


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have written what each found. They do all that is compared, since they take long to start."""
    out = tmp_path_factory.mktemp("two")
    run_two("tests.one_process", str(out), *(f"{kind}:{mode}" for kind, mode in WAYS))
    return out


def largest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference, of the largest gradient of all."""
    assert found.keys() == wanted.keys()
    scale = max(float(tensor.abs().max()) for tensor in wanted.values())
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted) / scale


@pytest.mark.parametrize(("kind", "mode"), WAYS)
def test_two_processes_are_one(alone: dict[str, Found], in_two: Path, kind: str, mode: str) -> None:
    losses, gradients = alone[kind]
    found = [torch.load(in_two / f"{kind}-{mode}-{rank}.pt") for rank in range(2)]
    for name, loss in losses.items():
        mean = sum(float(of_one[name]) for of_one, _ in found) / 2
        assert mean == pytest.approx(float(loss), abs=EXACT), name
    for _, theirs in found:
        assert largest(theirs, gradients) <= EXACT
    assert losses.keys() == ({"lm"} if kind in ("opt", "llama") else {"itc", "itm", "lm"})


def test_the_comparison_can_fail(alone: dict[str, Found]) -> None:
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
