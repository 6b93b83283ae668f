"""A model and its losses as one module, whose `forward` is what DistributedDataParallel and FSDP look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Losses = dict[str, Tensor]  # by name, each the mean over the batch; what is learnt is their sum


class Learner(nn.Module):
    def __init__(self, model: nn.Module, losses_of: Callable[..., Losses]) -> None:
        """`losses_of`: the model and what `forward` is given, to losses."""
        super().__init__()
        self.model = model
        self._losses_of = losses_of

    def forward(self, *given: Any) -> tuple[Tensor, Losses]:
        """The sum of the losses, and each of them."""
        found = self._losses_of(self.model, *given)
        return sum(found.values(), start=next(iter(found.values())) * 0), found
