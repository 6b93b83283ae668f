"""training/momentum.py and the losses with it, against the same in plain numbers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.blip import BlipPretrain
from tests.one_process import Words, batch_of
from tests.test_losses import log_softmax
from tests.tiny import TINY, fill
from training import losses
from training.losses import hard_negatives
from training.momentum import NOBODY, PARTS, Momentum, ramped
from training.pretrain import BlipFinetune, Slow, losses_of

K, ALPHA = 8, 0.4
# Sums of at most 24 terms in float32: 8e-7 was the largest difference seen.
EXACT = 3e-6


def blip(kind: type[BlipPretrain | BlipFinetune] = BlipPretrain) -> BlipPretrain | BlipFinetune:
    model = kind(TINY)
    fill(model, 0, 0.2)
    with torch.no_grad():
        model.temp.fill_(0.07)
    return model.eval()


def slowly(model: BlipPretrain | BlipFinetune, decay: float = 0.9) -> Momentum:
    """Copies of another model, and a queue with something in two of its places."""
    torch.manual_seed(3)
    momentum = Momentum(model, decay, K)
    fill(momentum, 5, 0.2)
    momentum.picture_queue[:2] = torch.tensor([1, 9])
    return momentum.eval()


def rows(x: Tensor) -> list[list[float]]:
    return [[float(value) for value in row] for row in x.detach()]


def softmax(row: list[float]) -> list[float]:
    return [math.exp(score) for score in log_softmax(row)]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def plain_itc(model: BlipPretrain | BlipFinetune, momentum: Momentum, alpha: float) -> float:
    """Pair by pair; the copies have followed already, the queue has not moved on."""
    batch, temp = batch_of(slice(0, 4), TINY.text.vocab), float(model.temp.detach())
    with torch.no_grad():
        fast = rows(model.image_embed(model.image_feat(batch.image))), rows(model.text_embed(batch.ids, batch.mask))
        slow = tuple(map(rows, momentum.embed(model, batch.image, batch.ids, batch.mask)))
    queues = rows(momentum.image_queue), rows(momentum.text_queue)
    numbers = batch.pictures.tolist() + momentum.picture_queue.tolist()
    total = 0.0
    for way in (0, 1):  # pictures to captions, captions to pictures
        columns = slow[1 - way] + queues[1 - way]
        for row, own in enumerate(batch.pictures.tolist()):
            scores = log_softmax([dot(fast[way][row], column) / temp for column in columns])
            soft = softmax([dot(slow[way][row], column) / temp for column in columns])
            count = numbers.count(own)
            wanted = [alpha * s + (1 - alpha) * (number == own) / count for s, number in zip(soft, numbers, strict=True)]
            total -= dot(wanted, scores)
    return total / 8


def step(model: BlipPretrain | BlipFinetune, momentum: Momentum, alpha: float = ALPHA) -> dict[str, float]:
    batch = batch_of(slice(0, 4), TINY.text.vocab)
    with torch.no_grad():
        found = losses_of(model, Words, batch, torch.Generator().manual_seed(7), True, Slow(momentum, alpha))  # type: ignore[arg-type]
    return {"itc": float(found.itc), "itm": float(found.itm), "lm": float(found.lm)}


@pytest.mark.parametrize("kind", [BlipPretrain, BlipFinetune])
@pytest.mark.parametrize("alpha", [0.0, ALPHA])
def test_the_contrast(kind: type[BlipPretrain | BlipFinetune], alpha: float) -> None:
    model = blip(kind)
    momentum = slowly(model)
    followed = copy.deepcopy(momentum)
    followed.follow(model)
    wanted = plain_itc(model, followed, alpha)
    found = step(model, momentum, alpha)
    assert found["itc"] == pytest.approx(wanted, abs=EXACT)
    assert (found["lm"] > 0) == (kind is BlipPretrain)
    assert found["itm"] > 0
    assert abs(plain_itc(model, slowly(model), alpha) - wanted) > 100 * EXACT  # the check can fail: copies that did not follow


@pytest.mark.parametrize("kind", [BlipPretrain, BlipFinetune])
def test_negatives(kind: type[BlipPretrain | BlipFinetune], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn by what the copies make of the batch (blip_pretrain.py), or by what the model does (blip_retrieval.py)."""
    drawn_by: list[Tensor] = []

    def watched(sims: Tensor, *given: Any) -> Tensor:
        drawn_by.append(sims)
        return hard_negatives(sims, *given)

    monkeypatch.setattr(losses, "hard_negatives", watched)
    model = blip(kind)
    momentum = slowly(model)
    step(model, momentum)
    batch = batch_of(slice(0, 4), TINY.text.vocab)
    with torch.no_grad():
        image, text = model.image_embed(model.image_feat(batch.image)), model.text_embed(batch.ids, batch.mask)
        slow_image, slow_text = momentum.embed(model, batch.image, batch.ids, batch.mask)
    others = (slow_image, slow_text) if kind is BlipPretrain else (image, text)
    for found, wanted in zip(drawn_by, (text @ others[0].t(), image @ others[1].t()), strict=True):
        torch.testing.assert_close(found, wanted / model.temp.detach(), atol=1e-5, rtol=0)
    assert float((slow_image - image).abs().max()) > 0.01


def test_copies_follow() -> None:
    model = blip()
    momentum = slowly(model, decay=0.75)
    before = copy.deepcopy(momentum.state_dict())
    momentum.follow(model)
    own = model.state_dict()
    for name, tensor in momentum.state_dict().items():
        if name.startswith(tuple(f"{part}." for part in PARTS)):
            torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * own[name])
    assert not any(parameter.requires_grad for parameter in momentum.parameters())
    model.requires_grad_(True)
    step(model, momentum)
    assert all(part is getattr(model, name) for name, part in model.named_children() if name in PARTS)


def test_the_queue_is_a_ring() -> None:
    momentum = Momentum(blip(), 0.9, 5)
    assert momentum.picture_queue.tolist() == [NOBODY] * 5
    for first in (0, 3):
        new = torch.arange(first, first + 3)
        momentum.enqueue(new[:, None] * torch.ones(3, TINY.embed), -new[:, None] * torch.ones(3, TINY.embed), new)
    assert momentum.picture_queue.tolist() == [5, 1, 2, 3, 4]
    assert momentum.image_queue[:, 0].tolist() == [5, 1, 2, 3, 4]
    assert momentum.text_queue[:, 0].tolist() == [-5, -1, -2, -3, -4]
    assert int(momentum.place) == 1


def test_the_share_rises() -> None:
    """Over two epochs of ten steps."""
    assert [ramped(0.4, *at, 10, 2.0) for at in ((0, 0), (0, 5), (1, 0), (1, 9), (2, 0), (7, 3))] == pytest.approx(
        [0, 0.1, 0.2, 0.38, 0.4, 0.4]
    )
    assert ramped(0.4, 0, 0, 10, 0.0) == 0.4
