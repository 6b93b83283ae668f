"""A moving average of the weights that are trained (Polyak and Juditsky 1992): less noisy than the weights of the last step.

It is part of a checkpoint; what is measured and what is written in the end are the averages. With FSDP each process averages
its shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class Average(nn.Module):
    """The averages of one model's trained weights, as buffers of the same names."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """`decay`: the share of itself that an average keeps at each step. `model` as it is trained, shared out already."""
        super().__init__()
        self.decay = decay
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                _under(self, name).register_buffer(name.rpartition(".")[2], parameter.detach().clone())

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Move the averages towards the weights, after each step of the optimizer."""
        weights = dict(model.named_parameters())
        for name, average in self.named_buffers():
            average.mul_(self.decay).add_(weights[name].detach(), alpha=1 - self.decay)

    @torch.no_grad()
    def exchange(self, model: nn.Module) -> None:
        """Put the averages where the weights are, and the weights here; a second time puts all back."""
        weights = dict(model.named_parameters())
        for name, average in self.named_buffers():
            own = weights[name].detach()
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)


def average_in(others: Mapping[str, nn.Module]) -> Average | None:
    """The average among what follows a model; None when there is none."""
    return next((module for module in others.values() if isinstance(module, Average)), None)


@contextmanager
def standing_in(average: Average | None, model: nn.Module) -> Iterator[None]:
    """Within it `model` has its averages, if there are any, as its weights."""
    if average is None:
        yield
        return
    average.exchange(model)
    try:
        yield
    finally:
        average.exchange(model)


def _under(root: nn.Module, name: str) -> nn.Module:
    """The module that holds what is called `name`, made where there is none."""
    module = root
    for part in name.split(".")[:-1]:
        if part not in dict(module.named_children()):
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module
