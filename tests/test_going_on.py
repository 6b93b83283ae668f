"""Trainings that end before their time: stopped, killed, or with what they cannot use. What is there then, and how they go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from models.errors import Misuse, UserError
from tests.generators import speaking
from tests.killed_training import newest
from tests.trainings import described, equal, small, stage2, trained, weights, written
from tests.two_processes import ROOT
from training import fit as fitting
from training import stage2 as stage2_losses
from training.order import START
from training.plan import plan_of
from training.settings_file import read_settings


def test_stopped_and_gone_on_is_undisturbed(tmp_path: Path, pictures: Path) -> None:
    """To the bit: batches, moments, hard negatives, LoRA's dropout. Two batches to a step."""
    lora = {"lora": {"rank": 2, "alpha": 4, "dropout": 0.3}}
    values = stage2(tmp_path, pictures, model=lora, optimizer={"accumulate": 2})
    once = weights(trained(tmp_path, values, f"run.out={tmp_path / 'once'}"))
    for _ in range(3):
        last = trained(tmp_path, values, f"run.out={tmp_path / 'often'}", resume=True, max_steps=2)
    assert last.step == 6
    assert equal(once, weights(last))
    other = weights(trained(tmp_path, values, f"run.out={tmp_path / 'other'}", "run.seed=7"))
    assert not equal(once, other)


def test_what_was_learnt_before_a_broken_picture_is_kept(tmp_path: Path, pictures: Path) -> None:
    """It is the second batch of a step of two: nothing of that step was learnt, and once mended it is learnt whole."""
    own = shutil.copytree(pictures, tmp_path / "pictures")
    lora = {"lora": {"rank": 2, "alpha": 4, "dropout": 0.3}}
    values = stage2(tmp_path, own, model=lora, optimizer={"accumulate": 2}, run={"save_every": 100})
    once = weights(trained(tmp_path, values, f"run.out={tmp_path / 'once'}"))
    plan = plan_of(read_settings(written(tmp_path, values)), speaking("opt"), 1)
    *_, last = islice(plan.batches(0, START, 0, 1), 4)
    broken = last.draws[0].file
    assert isinstance(broken, Path)
    whole = broken.read_bytes()
    broken.write_bytes(whole[:50])
    with pytest.raises(UserError, match=f"{broken.name}.* What was learnt until step 1 is saved: go on with --resume."):
        trained(tmp_path, values)
    broken.write_bytes(whole)
    assert equal(once, weights(trained(tmp_path, values, resume=True)))


def test_other_settings_are_refused_before_features_are_made(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = stage2(tmp_path, pictures, data={"crop_scale": None, "flip": 0.0})
    trained(tmp_path, values, "run.steps=2")
    monkeypatch.setattr(fitting, "features_of", None)
    with pytest.raises(Misuse, match=r"was trained with data.train.0.weight: 1.0, and now it is 2.0"):
        trained(tmp_path, values, "run.cache_features=true", "data.train.0.weight=2", resume=True)


def test_a_whole_group_is_asked_to_stop(tmp_path: Path, pictures: Path) -> None:
    """As torchrun and schedulers ask: the decoders are not hit, and the step in hand is finished and saved."""
    values = described(tmp_path, pictures, "stage1", small(tmp_path, "stage1"), run={"steps": 1_000_000, "log_every": 1})
    values["data"]["workers"] = 2
    values["run"]["save_every"] = 1_000_000
    command = [sys.executable, "-m", "training", "stage1", "--config", str(written(tmp_path, values))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as going:
        log = tmp_path / "out" / "log.jsonl"
        while going.poll() is None and not (log.is_file() and log.read_text("utf-8").count("losses") >= 3):
            time.sleep(0.02)
        os.killpg(going.pid, signal.SIGTERM)
        said, complaint = going.communicate(timeout=60)
    assert going.returncode == 130, complaint
    step = int(newest(tmp_path / "out").removeprefix("step-"))
    assert f"Stopped after step {step:,}. The same command with --resume goes on from there." in said


def test_what_changed_since_is_said_or_refused(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of the same name as before, and the length."""
    own = shutil.copytree(pictures, tmp_path / "pictures")
    values = stage2(tmp_path, own, run={"trainable_only": True})
    trained(tmp_path, values, max_steps=2)
    entries = json.loads((own / "train.json").read_text("utf-8"))
    (own / "train.json").write_text(json.dumps(entries[:-2]), "utf-8")
    trained(tmp_path, values, "run.steps=8", resume=True, max_steps=2)
    said = capsys.readouterr().out
    assert "What there is to learn has changed since step-0000002" in said
    assert "run.steps was 6 until step-0000002 and is 8 now" in said
    with pytest.raises(Misuse, match="step-0000004 is beyond the 3 steps that are asked for now"):
        trained(tmp_path, values, "run.steps=3", resume=True)
    first = load_file(tmp_path / "stage2.safetensors")
    save_file({name: tensor + 1 for name, tensor in first.items()}, tmp_path / "stage2.safetensors")
    with pytest.raises(Misuse, match=r"was learnt beside other frozen weights, of the sha256 [0-9a-f]+, [0-9a-f]+; now they are"):
        trained(tmp_path, values, resume=True)
    trained(tmp_path, values, "run.trainable_only=false", f"run.out={tmp_path / 'whole'}", max_steps=2)
    save_file(first, tmp_path / "stage2.safetensors")
    trained(tmp_path, values, "run.trainable_only=false", f"run.out={tmp_path / 'whole'}", resume=True)  # all is in the state


def test_weights_without_a_state_are_not_overwritten(tmp_path: Path, pictures: Path) -> None:
    values = stage2(tmp_path, pictures, run={"steps": 1})
    trained(tmp_path, values)
    for folder in (tmp_path / "out").glob("step-*"):
        shutil.rmtree(folder)
    for resume in (False, True):
        with pytest.raises(Misuse, match=r"holds the weights of a training .* and no state to go on from"):
            trained(tmp_path, values, resume=resume)


def test_killed_at_any_moment(tmp_path: Path, pictures: Path) -> None:
    """kill -9, again and again, then --resume: the weights of an undisturbed training, to the bit."""
    values = stage2(tmp_path, pictures, run={"steps": 24, "save_every": 1})
    once = weights(trained(tmp_path, values, f"run.out={tmp_path / 'once'}"))
    command = [sys.executable, "-m", "tests.killed_training", str(written(tmp_path, values))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    killed = [line for line in done.stderr.splitlines() if line.startswith("killed after ")]
    assert len(set(killed)) >= 2, done.stderr
    assert newest(tmp_path / "out") < "step-0000024"
    assert equal(once, weights(trained(tmp_path, values, resume=True)))


def test_a_gradient_that_is_no_number(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the loss is one. It ends before the step: what is saved then is what went before."""
    losses = stage2_losses.told_loss
    calls = iter(range(6))

    def spoiled(*given: Any) -> Tensor:
        loss = losses(*given)
        if next(calls) == 2:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    monkeypatch.setattr(stage2_losses, "told_loss", spoiled)
    with pytest.raises(UserError, match=r"The gradient is not a number at step 3 \(norm nan; epoch 0, batch 2,"):
        trained(tmp_path, stage2(tmp_path, pictures), "run.save_every=1")
    saved = load_file(tmp_path / "out" / newest(tmp_path / "out") / "model.safetensors")
    assert newest(tmp_path / "out") == "step-0000002"
    assert all(tensor.isfinite().all() for tensor in saved.values())


@pytest.mark.parametrize(("steps", "last"), [(6, 6), (30, 21)])
def test_an_fp16_that_never_has_a_gradient(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, steps: int, last: int
) -> None:
    """Its scale goes down step by step; when it did all the way, or no step was ever taken, there is nothing to keep."""
    values = stage2(tmp_path, pictures)
    monkeypatch.setattr(fitting, "make_scaler", lambda *given: GradScaler("cpu", init_scale=1.0))
    monkeypatch.setattr(fitting, "take_step", lambda *given: float("inf"))
    with pytest.raises(UserError, match=rf"The gradient is not a number at step {last} \(norm inf"):
        trained(tmp_path, values, f"run.steps={steps}")
    norms = iter([float("inf")] * 3 + [1.0] + [float("inf")] * 2)
    monkeypatch.setattr(fitting, "take_step", lambda *given: next(norms))
    assert trained(tmp_path, values, "run.steps=6", f"run.out={tmp_path / 'some'}").step == 6
