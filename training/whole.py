"""Weights and moments of a training, whole on the first process, and back to where they are kept: with FSDP in shares.

All processes call these functions, in the same order. torch.distributed.checkpoint.state_dict does the same for models; for
optimizers it gives weights that had no gradient yet the moments of a step that never was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from models.errors import UserError
from training.gather import processes, rank

T = TypeVar("T")
Moments = dict[str, dict[str, Tensor]]  # of AdamW, by the name of the weight
STEP = "step"  # the one that is a number; AdamW when it is fused wants it on the device of the weight


def tensors_of(module: nn.Module, trainable_only: bool = False) -> dict[str, Tensor]:
    """What is saved of a module, by name, each once: weights and buffers, or without the weights that are frozen."""
    state = module.state_dict()  # with FSDP this lets go of weights that are gathered
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad} if trainable_only else set()
    names = (name for name, _ in chain(module.named_parameters(), module.named_buffers()))
    return {name: state[name] for name in names if name in state and name not in frozen}


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same whole and on the CPU; empty on all processes but the first."""
    return {name: tensor for name, tensor in ((name, _whole(tensor)) for name, tensor in tensors.items()) if rank() == 0}


def spread(values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Write the whole `values` of the first process into `tensors`, in place. Each tensor has its value there."""
    for name, tensor in tensors.items():
        _fill(tensor, values.get(name))


def gathered_moments(model: nn.Module, optimizer: torch.optim.AdamW) -> Moments:
    """The moments of all weights that have any, whole; empty on all processes but the first."""
    tensors_of(model)  # the optimizer knows shares
    return {
        name: {kind: tensor.clone() if kind == STEP else tensor for kind, tensor in kinds.items()}
        for name, kinds in (
            (name, gathered(optimizer.state[p])) for name, p in model.named_parameters() if optimizer.state.get(p)
        )
        if rank() == 0
    }


def spread_moments(moments: Moments, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """Put the whole `moments` of the first process in the place of those of `optimizer`."""
    tensors_of(model)
    numbers = by_the_first(lambda: {name: (float(kinds[STEP]), list(kinds)) for name, kinds in moments.items()})
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        if name not in numbers:
            continue
        step, names = numbers[name]
        kinds = {kind: torch.zeros_like(parameter.detach()) for kind in names if kind != STEP}
        spread(moments.get(name, {}), kinds)
        optimizer.state[parameter] = {STEP: torch.tensor(step, device=parameter.device), **kinds}


def by_the_first(work: Callable[[], T]) -> T:
    """What the first process returns, on all of them; or its UserError."""
    if processes() == 1:
        return work()
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found = [work(), None]
        except UserError as error:
            found = [None, error]
    distributed.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]  # type: ignore[no-any-return]


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


@torch.no_grad()
def _fill(tensor: Tensor, value: Tensor | None) -> None:
    if isinstance(tensor, DTensor):
        if value is None:
            value = torch.empty(tensor.shape, dtype=tensor.dtype)
        tensor.copy_(distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements))
        return
    if value is not None:
        tensor.copy_(value)
    if processes() > 1:
        distributed.broadcast(tensor.detach(), 0)
