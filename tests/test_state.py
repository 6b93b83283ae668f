"""A training that goes on from its state is the training that was never stopped; what is cut short is never taken."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models import manifest
from models.errors import Misuse, UserError
from tests import one_training
from tests.one_training import SETTINGS, begin, go_on
from tests.two_processes import ROOT, run_two
from training import state
from training.optimizer import make_optimizer
from training.parallel import DDP, FULL_SHARD
from training.state import Progress
from training.whole import spread_moments, tensors_of


def weights(parts: state.Parts) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Tensor]:
    """The weights after six steps."""
    parts = begin()
    go_on(parts, Progress(), 6)
    return weights(parts)


def saved(out: Path, steps: int = 3) -> Path:
    parts = begin()
    return state.save(out, parts, go_on(parts, Progress(), steps), SETTINGS)


@pytest.mark.parametrize("trainable_only", [False, True])
def test_going_on_is_not_having_stopped(tmp_path: Path, undisturbed: dict[str, Tensor], trainable_only: bool) -> None:
    parts = begin()
    settings = replace(SETTINGS, run=replace(SETTINGS.run, trainable_only=trainable_only))
    folder = state.save(tmp_path, parts, go_on(parts, Progress(), 3), settings)
    assert folder == state.latest(tmp_path)
    parts = begin()
    if not trainable_only:  # weights that are frozen come from the state too
        with torch.no_grad():
            parts.model.visual_encoder.cls_token.zero_()
    torch.manual_seed(999)
    progress = state.restore(folder, parts, SETTINGS)
    assert (progress.step, progress.position.batch, progress.best) == (3, 3, 0.5)
    assert go_on(parts, progress, 3).step == 6
    assert same(weights(parts), undisturbed)
    held = set(state.load_file(folder / state.MODEL))
    assert ("visual_encoder.cls_token" not in held) == trainable_only


def test_the_comparison_can_fail(tmp_path: Path, undisturbed: dict[str, Tensor]) -> None:
    """Without the random numbers, or without the moments, the weights come out otherwise."""
    folder = saved(tmp_path)
    for forget in ("random", "moments"):
        parts = begin()
        progress = state.restore(folder, parts, SETTINGS)
        torch.manual_seed(999) if forget == "random" else parts.optimizer.state.clear()
        go_on(parts, progress, 3)
        assert not same(weights(parts), undisturbed), forget


def test_weights_without_a_gradient_yet_have_no_moments(tmp_path: Path) -> None:
    """As those of the matching head before run.itm_after."""
    parts = begin()
    go_on(parts, Progress(), 2)
    del parts.optimizer.state[parts.model.itm_head.weight]
    folder = state.save(tmp_path, parts, Progress(2), SETTINGS)
    again = begin()
    state.restore(folder, again, SETTINGS)
    assert parts.model.itm_head.weight not in again.optimizer.state or not again.optimizer.state[again.model.itm_head.weight]
    assert len(again.optimizer.state) == len(parts.optimizer.state)


def test_moments_are_where_their_weights_are() -> None:
    """AdamW's fused step on a GPU counts there, and fails with a count that is not."""
    model = nn.Linear(3, 2, device="meta")
    optimizer = make_optimizer(model, SETTINGS.optimizer)
    ones = {"step": torch.tensor(4.0), "exp_avg": torch.ones(2, 3), "exp_avg_sq": torch.ones(2, 3)}
    spread_moments({"weight": ones}, model, optimizer)
    (found,) = optimizer.state.values()
    assert {kind: (tensor.device.type, tensor.shape) for kind, tensor in found.items()} == {
        kind: ("meta", tensor.shape) for kind, tensor in ones.items()
    }


def test_a_state_is_a_checkpoint(tmp_path: Path) -> None:
    parts = begin()
    folder = state.save(tmp_path, parts, go_on(parts, Progress(), 1), SETTINGS)
    assert same(load_file(folder / state.MODEL), tensors_of(parts.model))


def test_others_are_kept(tmp_path: Path) -> None:
    parts, again = begin(), begin()
    parts.others, again.others = {"slow": torch.nn.Linear(3, 2)}, {"slow": torch.nn.Linear(3, 2)}
    folder = state.save(tmp_path, parts, Progress(), SETTINGS)
    state.restore(folder, again, SETTINGS)
    assert torch.equal(again.others["slow"].weight, parts.others["slow"].weight)
    again.others = {"slow": torch.nn.Linear(3, 2), "average": torch.nn.Linear(3, 2)}
    with pytest.raises(Misuse, match=r"average\.safetensors is of another model: as bias it has nothing, expected is \(2,\)"):
        state.restore(folder, again, SETTINGS)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    other = replace(SETTINGS, optimizer=replace(SETTINGS.optimizer, weight_decay=0.1))
    with pytest.raises(Misuse, match=r"trained with optimizer.weight_decay: 0.05, and now it is 0.1\. Go on with the same"):
        state.restore(folder, begin(), other)
    longer = replace(SETTINGS, run=replace(SETTINGS.run, steps=999, keep=1, log_every=1, out=Path("elsewhere")))
    assert state.restore(folder, begin(), longer).step == 1


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    parts = begin()
    parts.model.temp = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(Misuse, match=r"is of another model: as temp it has \(\), expected is \(2,\)"):
        state.restore(folder, parts, SETTINGS)


@pytest.mark.parametrize("harm", ["shorter", "changed", "missing", "no manifest", "half a manifest"])
def test_a_damaged_state_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: str) -> None:
    first, second = saved(tmp_path, 1), saved(tmp_path, 2)
    file = second / (state.OPTIMIZER if "manifest" not in harm else manifest.NAME)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if harm in ("shorter", "half a manifest"):
        file.write_bytes(data[:-100])
    elif harm == "changed":
        file.write_bytes(data)
    else:
        file.unlink()
    with pytest.raises(UserError):
        state.restore(second, begin(), SETTINGS)
    assert state.latest(tmp_path) == first
    assert ("passed over" in capsys.readouterr().err) == (harm != "no manifest")
    assert saved(tmp_path, 2) == second == state.latest(tmp_path)  # the training comes there again
    for folder in (first, second):
        (folder / state.MODEL).write_bytes(b"")
    with pytest.raises(UserError, match=r"None of the 2 states .* is whole"):
        state.latest(tmp_path)


def test_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert state.latest(tmp_path) is None
    assert state.latest(tmp_path / "none") is None


def test_only_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    parts = begin()
    for step in range(1, 7):
        state.save(tmp_path, parts, Progress(step), SETTINGS)
    (tmp_path / ".step-0000007.part").mkdir()
    others = ["notes", "step-0000001.bak", "step-3000.tar"]  # are not ours
    for name in others:
        (tmp_path / name).mkdir()
    state.prune(tmp_path, 2, 6, best=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "step-0000003", "step-0000005", "step-0000006"])
    state.prune(tmp_path, 1, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "step-0000006"])


def test_a_damaged_state_takes_no_place(tmp_path: Path) -> None:
    """It was passed over: the training goes on before it, and its states are newer though their numbers are smaller."""
    parts = begin()
    for step in (2, 6):
        state.save(tmp_path, parts, Progress(step), SETTINGS)
    (tmp_path / "step-0000006" / "model.safetensors").write_bytes(b"")
    assert state.latest(tmp_path) == state.folder_of(tmp_path, 2)
    state.save(tmp_path, parts, Progress(3), SETTINGS)
    state.prune(tmp_path, 1, 3)
    assert state.latest(tmp_path) == state.folder_of(tmp_path, 3)
    assert state.begun(tmp_path) == "step-0000003"


def finished(*arguments: str) -> str:
    """What a process printed."""
    command = [sys.executable, "-m", "tests.one_training", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("killed")
    finished("killed", str(out))
    return out


@pytest.mark.parametrize("call", range(one_training.CALLS))
def test_killed_while_saving(killed: Path, undisturbed: dict[str, Tensor], call: int) -> None:
    """kill -9 at each file that a second state writes: the training goes on from the first one, to the same weights."""
    out = killed / str(call)
    left = [path.name for path in out.iterdir() if path.name.startswith(".")]
    folder = state.latest(out)
    assert folder is not None
    last = call == one_training.CALLS - 1
    assert (folder.name, left) == (("step-0000004", []) if last else ("step-0000003", [".step-0000004.part"]))
    parts = begin()
    progress = state.restore(folder, parts, SETTINGS)
    go_on(parts, progress, 6 - progress.step)
    assert same(weights(parts), undisturbed)
    state.save(out, parts, Progress(6), SETTINGS)
    assert not list(out.glob(".*"))


def test_killed_at_any_moment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Processes that save on and on, replacing and removing states, are killed at random moments."""
    finished("any-moment", str(tmp_path))
    found = []
    for turn in range(one_training.TURNS):
        folder = state.latest(tmp_path / str(turn))
        assert folder is not None, turn
        parts = begin()
        found.append(state.restore(folder, parts, SETTINGS).best)
        assert found[-1] == float(parts.model.temp.detach())
    assert len(set(found)) > one_training.TURNS // 2  # they did save
    assert not capsys.readouterr().err  # and nothing damaged was met


def test_a_full_disk(tmp_path: Path) -> None:
    """Here the largest size of a file stands for it: the weights do not fit, then the moments do not."""
    folder = saved(tmp_path, 3)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limits = [str((folder / file).stat().st_size - 100) for file in (state.MODEL, state.OPTIMIZER)]
    said = finished("full", str(tmp_path), *limits).splitlines()
    assert len(said) == 2
    for line in said:
        assert line.startswith("The state of step 4 cannot be written to")
        assert line.endswith(f"Earlier states are as they were: make room, and go on with --resume. {folder.name}")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders MODE and MODE-halves: states of two processes that made six steps, in one go and in two."""
    out = tmp_path_factory.mktemp("shared")
    jobs = [f"{mode}{way}" for mode in (DDP, FULL_SHARD) for way in (f":{mode}:6", f"-halves:{mode}:3", f"-halves:{mode}:6")]
    run_two("tests.one_training", "shared", str(out), *jobs)
    return out


@pytest.mark.parametrize("mode", [DDP, FULL_SHARD])
def test_two_processes_go_on(shared: Path, mode: str) -> None:
    folders = [shared / name / "step-0000006" for name in (mode, f"{mode}-halves")]
    whole, halves = (state.load_file(folder / state.MODEL) for folder in folders)
    assert same(whole, halves)
    moments, theirs = (torch.load(folder / state.OPTIMIZER)["moments"] for folder in folders)
    assert moments.keys() == theirs.keys()
    assert all(same(moments[name], theirs[name]) for name in moments)
    assert "visual_encoder.cls_token" not in moments


@pytest.mark.parametrize("mode", [DDP, FULL_SHARD])
def test_one_process_takes_what_two_saved(shared: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, parts = shared / mode / "step-0000006", begin()
    assert state.restore(folder, parts, SETTINGS).step == 6
    assert "was written by 2 processes, and 1 go on" in capsys.readouterr().out
    found, moments = state.load_file(folder / state.MODEL), torch.load(folder / state.OPTIMIZER)["moments"]
    assert same({name: weights(parts)[name] for name in found}, found)
    assert found.keys() == state.tensors_of(parts.model).keys()
    for name, parameter in parts.model.named_parameters():
        assert same(parts.optimizer.state.get(parameter, {}), moments.get(name, {}))


def test_shares_are_the_same_training(shared: Path) -> None:
    """Gradients are clipped by the norm of the whole, and shares come to the same weights; but for the biases of keys, whose
    gradient is 0 but for rounding, which AdamW makes a step of."""
    whole, shares = (state.load_file(shared / mode / "step-0000006" / state.MODEL) for mode in (DDP, FULL_SHARD))
    before = weights(begin())
    moved = max(float((whole[name] - before[name]).abs().max()) for name in whole)
    apart = [float((whole[name] - shares[name]).abs().max()) for name in whole if not name.endswith("key.bias")]
    assert max(apart) < 0.01 * moved
