"""training/average.py: the moving average, step by step again, and in trainings that stop, measure, and share out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.blip2 import Blip2Stage1
from tests.test_bert_checkpoint import random
from tests.tiny import TINY2
from tests.trainings import assert_one_training, described, equal, logged, small, stage2, trained, weights, written
from tests.two_processes import train_two
from training.average import Average, average_in, standing_in

DECAY = 0.8


def model() -> nn.Module:
    found: nn.Module = random(Blip2Stage1(TINY2))
    found.get_submodule("visual_encoder").requires_grad_(False)
    return found


def moved(module: nn.Module, step: int) -> None:
    """Weights that are trained, after a step."""
    noise = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=noise)


def test_it_follows() -> None:
    module = model()
    average = Average(module, DECAY)
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert set(average.state_dict()) == trainable
    assert not any(name.startswith("visual_encoder") for name in trainable)
    wanted = {name: module.state_dict()[name].double().clone() for name in trainable}
    for step in range(3):
        moved(module, step)
        average.follow(module)
        wanted = {name: DECAY * tensor + (1 - DECAY) * module.state_dict()[name].double() for name, tensor in wanted.items()}
    for name, tensor in average.state_dict().items():
        torch.testing.assert_close(tensor.double(), wanted[name], atol=1e-6, rtol=0)
        assert not torch.equal(tensor, module.state_dict()[name])


def test_it_stands_in_and_goes() -> None:
    """Bit for bit, also when what is within fails."""
    module = model()
    average = Average(module, DECAY)
    moved(module, 1)
    own, followed = ({n: t.clone() for n, t in found.state_dict().items()} for found in (module, average))
    with standing_in(average, module):
        assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in followed.items())
    with pytest.raises(StopIteration), standing_in(average, module):
        next(iter(()))
    assert equal(dict(module.state_dict()), own)
    assert equal(dict(average.state_dict()), followed)
    with standing_in(None, module):
        assert equal(dict(module.state_dict()), own)
    assert average_in({"momentum": module, "average": average}) is average
    assert average_in({"momentum": module}) is None


def states(out: Path, what: str) -> list[dict[str, Tensor]]:
    """Of each step."""
    return [load_file(folder / f"{what}.safetensors") for folder in sorted(out.glob("step-*"))]


def test_a_training_writes_its_average(tmp_path: Path, pictures: Path) -> None:
    """What is written is the average of what each step left, computed again from the states."""
    out = tmp_path / "out"
    values = described(tmp_path, pictures, "retrieval", small(tmp_path, "stage1"), run={"ema": DECAY, "save_every": 1, "keep": 9})
    found = weights(trained(tmp_path, values))
    without = trained(tmp_path, values, "run.ema=null", f"run.out={tmp_path / 'without'}")
    steps = states(out, "model")
    assert len(steps) == 6
    assert equal(steps[-1], weights(without))  # the training itself is as it was
    assert not equal(found, steps[-1])
    averages = states(out, "average")
    wanted: dict[str, Any] = averages[0]
    for after, average in zip(steps[1:], averages[1:], strict=True):
        wanted = {name: DECAY * tensor + (1 - DECAY) * after[name] for name, tensor in wanted.items()}
        for name, tensor in average.items():
            torch.testing.assert_close(tensor, wanted[name], atol=1e-6, rtol=0)
    assert all(torch.equal(found[name], averages[-1][name]) for name in averages[-1])
    # Stopped and gone on: to the bit.
    for _ in range(2):
        last = trained(tmp_path, values, f"run.out={tmp_path / 'twice'}", resume=True, max_steps=3)
    assert equal(weights(last), found)


def test_the_average_is_measured(tmp_path: Path, pictures: Path) -> None:
    """An average that keeps all of itself is the model of the start, whatever the weights have become."""
    source = {"annotations": str(pictures / "train.json"), "images": str(pictures)}
    values = described(tmp_path, pictures, "retrieval", small(tmp_path, "pretrain"), data={"validation": source})
    values["run"] |= {"validate_every": 1, "steps": 2}
    trained(tmp_path, values, "run.ema=0.9999999", "schedule.lr=0.01")
    kept = list(logged(tmp_path, "metrics").values())
    trained(tmp_path, values, "schedule.lr=0.01", f"run.out={tmp_path / 'moving' / 'out'}")
    moving = list(logged(tmp_path / "moving", "metrics").values())
    assert kept[0] == kept[1]
    assert moving[0] != moving[1]


def test_two_processes_average_what_one_does(tmp_path: Path, pictures: Path) -> None:
    """Of the shares, and what they wrote goes on whole in each process."""
    values = stage2(tmp_path, pictures, run={"ema": DECAY, "steps": 4})
    one = weights(trained(tmp_path, values, f"run.out={tmp_path / 'one'}"))
    command = ["stage2", "--config", written(tmp_path, values), "--set=run.batchsize=2", f"--set=run.out={tmp_path / 'two'}"]
    train_two(
        [*command, "--set=parallel.mode=full_shard", "--max-steps", 2],
        [*command, "--set=parallel.mode=ddp", "--resume"],
    )
    two = load_file(tmp_path / "two" / "weights.safetensors")
    assert_one_training(one, two)
    last = states(tmp_path / "two", "model")[-1]
    assert any(float((two[name] - last[name]).abs().max()) > 1e-4 for name in two)
    # What each leaves out at random is its own.
    first, second = torch.load(tmp_path / "two" / "step-0000004" / "random.pt")
    assert not torch.equal(first["cpu"], second["cpu"])
