"""One process of a training in several: losses and gradients of its share of a batch. Run by tests/test_parallel.py.

python -m tests.one_process OUT KIND:MODE ..., with the environment of torchrun; alone it has the whole batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.blip import BlipPretrain
from tests.tiny import TINY, TINY_LLAMA, TINY_OPT, fill, random_generator, random_stage1, tiny_llm
from training import pretrain, stage1, stage2
from training.learner import Learner, Losses
from training.momentum import Momentum
from training.parallel import DDP, joined, shared
from training.settings import Model
from training.start import freeze
from training.step import Batch

N, LENGTH = 4, 7


class Words:
    """The two tokens that losses put first."""

    encode_id, decode_id = 3, 4


def texts(vocab: int) -> tuple[Tensor, Tensor]:
    mask = (torch.arange(LENGTH) < torch.tensor([[4], [3], [7], [6]])).long()
    return torch.randint(5, vocab - 1, (N, LENGTH), generator=torch.Generator().manual_seed(1)) * mask, mask


def batch_of(rows: slice, vocab: int) -> Batch:
    image = torch.randn(N, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    ids, mask = (x[rows] for x in texts(vocab))
    longest = int(mask.sum(1).max())  # cut to the longest, as batches are: the processes' differ
    return Batch(torch.tensor([0, 1, 2, 1])[rows], image[rows], ids[:, :longest], mask[:, :longest])


def three(losses_of: Callable[..., Any]) -> Callable[..., Losses]:
    def found(model: nn.Module, batch: Batch) -> Losses:
        step = losses_of(model, Words, batch, torch.Generator().manual_seed(7), True)
        return {"itc": step.itc, "itm": step.itm, "lm": step.lm}

    return found


def said(model: Any, batch: Batch) -> Losses:
    learnt = torch.ones_like(batch.ids)
    learnt[:, :2] = 0
    return {"lm": stage2.told_loss(model, stage2.Told(batch.image, batch.ids, batch.mask, learnt))}


def learner_of(kind: str) -> tuple[Learner, int]:
    """A learner, and how many words it knows."""
    if kind == "stage1":
        model = random_stage1()
        freeze(model, Model())
        return Learner(model, three(stage1.losses_of)), model.cfg.text.vocab
    if kind in ("pretrain", "momentum"):
        blip = BlipPretrain(TINY)
        fill(blip, 0, 0.2)
        with torch.no_grad():
            blip.temp.fill_(0.07)
        torch.manual_seed(3)
        slow = pretrain.Slow(Momentum(blip, 0.9, 8), 0.4) if kind == "momentum" else None
        return Learner(blip.eval(), three(partial(pretrain.losses_of, slow=slow))), TINY.text.vocab
    llm = {"opt": TINY_OPT, "llama": TINY_LLAMA}[kind]
    generator = random_generator(tiny_llm(llm))
    freeze(generator, Model(freeze_vit=False))
    return Learner(generator, said), llm.vocab


def whole(tensor: Tensor) -> Tensor:
    """A gradient of which FSDP has a share here, whole."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(ways: Sequence[tuple[str, str]], out: Path) -> None:
    """What this process finds of each kind in each mode, one after the other, into `out`."""
    with joined("cpu", DDP) as place:
        for kind, mode in ways:
            learner, vocab = learner_of(kind)
            per = N // place.processes
            batch = batch_of(slice(place.rank * per, (place.rank + 1) * per), vocab)
            together = shared(learner, mode, place)  # kept until gradients have been exchanged
            total, losses = together(batch)
            total.backward()
            gradients = {n: whole(p.grad) for n, p in learner.model.named_parameters() if p.grad is not None}
            torch.save(({n: v.detach() for n, v in losses.items()}, gradients), out / f"{kind}-{mode}-{place.rank}.pt")
            del together


if __name__ == "__main__":
    torch.set_num_threads(1)
    main([(kind, mode) for kind, _, mode in (way.partition(":") for way in sys.argv[2:])], Path(sys.argv[1]))
