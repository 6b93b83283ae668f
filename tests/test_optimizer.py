"""AdamW's groups, the clipping of gradients, and the loss scale."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.errors import Misuse
from tests.one_process import batch_of, learner_of
from tests.one_training import SETTINGS
from tests.tiny import TINY2
from training.optimizer import clip, make_optimizer, make_scaler, set_learning_rate, take_step

CPU = torch.device("cpu")


def test_groups() -> None:
    model = learner_of("stage1")[0].model
    optimizer = make_optimizer(model, SETTINGS.optimizer)
    decayed, others = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == decayed | others
    assert not decayed & others
    assert not any(names[p].startswith("visual_encoder") for p in decayed | others)  # frozen
    assert {"temp", "ln_vision.weight", "itm_head.bias"} <= {names[p] for p in others}
    assert {"query_tokens", "itm_head.weight"} <= {names[p] for p in decayed}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    with pytest.raises(Misuse, match="Nothing is left to train"):
        make_optimizer(model.requires_grad_(False), SETTINGS.optimizer)


def test_what_is_frozen_does_not_change() -> None:
    learner, vocab = learner_of("stage1")
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    optimizer = make_optimizer(learner.model, SETTINGS.optimizer)
    set_learning_rate(optimizer, 1e-2)
    learner(batch_of(slice(0, 4), vocab))[0].backward()
    frozen = {name for name, p in learner.model.named_parameters() if not p.requires_grad}
    assert all(p.grad is None for name, p in learner.model.named_parameters() if name in frozen)
    take_step(optimizer, make_scaler(SETTINGS.run, CPU), None)
    changed = {name for name, tensor in learner.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not changed & frozen
    assert {"temp", "query_tokens", "ln_vision.bias"} <= changed
    assert TINY2.vision.depth == 3


def test_the_learning_rate_is_that_of_the_step() -> None:
    model = nn.Linear(2, 2, bias=False)
    optimizer = make_optimizer(model, replace(SETTINGS.optimizer, weight_decay=0.0))
    before = model.weight.detach().clone()
    for rate, moved in ((0.0, 0.0), (0.25, 0.25)):  # at its first steps, of equal gradients, AdamW moves by the rate
        set_learning_rate(optimizer, rate)
        model(torch.ones(1, 2)).sum().backward()
        take_step(optimizer, make_scaler(SETTINGS.run, CPU), None)
        assert torch.allclose(before - model.weight, torch.full((2, 2), moved), atol=1e-6)
        assert model.weight.grad is None


def test_clip() -> None:
    one, other, unused = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    one.grad, other.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert clip([one, other, unused], None) == clip([one, other, unused], 6.0) == 5.0
    assert one.grad.tolist() == [3.0, 0.0]
    assert clip([one, other], 1.0) == 5.0
    assert torch.allclose(torch.cat([one.grad, other.grad]), torch.tensor([0.6, 0.0, 0.0, 0.8]))
    assert clip([unused], 1.0) == 0.0


@pytest.mark.parametrize("loss_scale", [None, 1024.0])
def test_the_loss_scale_of_fp16(loss_scale: float | None) -> None:
    """The step does not depend on the scale; one with infinite gradients is left out, and a scale that is found falls."""
    run = replace(SETTINGS.run, precision="fp16", loss_scale=loss_scale)
    models = [nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)]
    models[1].load_state_dict(models[0].state_dict())
    norms = []
    for model, told in zip(models, (run, SETTINGS.run), strict=True):
        optimizer, scaler = make_optimizer(model, SETTINGS.optimizer), make_scaler(told, CPU)
        set_learning_rate(optimizer, 0.1)
        scaler.scale(model(torch.ones(1, 3)).square().sum()).backward()
        norms.append(take_step(optimizer, scaler, 0.5, told.loss_scale))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert torch.allclose(models[0].weight, models[1].weight, atol=1e-6)

    optimizer, scaler = make_optimizer(models[0], SETTINGS.optimizer), make_scaler(run, CPU)
    set_learning_rate(optimizer, 0.1)
    before = models[0].weight.detach().clone()
    scaler.scale((models[0](torch.ones(1, 3)) * 1e38).sum()).backward()
    assert take_step(optimizer, scaler, 1.0, loss_scale) == float("inf")
    assert torch.equal(models[0].weight, before)
    assert scaler.get_scale() == (loss_scale or 2.0**15)


def test_without_fp16_nothing_is_scaled() -> None:
    scaler = make_scaler(SETTINGS.run, CPU)
    assert not scaler.is_enabled()
    assert float(scaler.scale(torch.tensor(3.0))) == 3.0


def test_a_gradient_that_is_no_number_is_left_out() -> None:
    """Also without a loss scale: one such step would make all weights no numbers."""
    model = nn.Linear(3, 2, bias=False)
    optimizer, scaler = make_optimizer(model, SETTINGS.optimizer), make_scaler(SETTINGS.run, CPU)
    set_learning_rate(optimizer, 0.1)
    before = model.weight.detach().clone()
    (model(torch.ones(1, 3)).sum() * float("nan")).backward()
    assert math.isnan(take_step(optimizer, scaler, 1.0))
    assert torch.equal(model.weight, before)
    assert not optimizer.state
    assert model.weight.grad is None
