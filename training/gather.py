"""Tensors of all processes of a training, with the gradient back to where each came from. Alone, nothing happens.

W processes with B rows each; N = W * B. A loss is made in such a way that the mean over the processes, which is what
DistributedDataParallel and FSDP make of gradients, is that of one process with all N rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F


def processes() -> int:
    """W; 1 where nothing is distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of the W processes this is."""
    return distributed.get_rank() if processes() > 1 else 0


def gathered(rows: Tensor) -> Tensor:
    """(B, ...) to (N, ...), in the order of the ranks. Gradients come back to the process that the rows are from, the sum over
    all processes. The other axes must be the same everywhere."""
    if processes() == 1:
        return rows
    found: Tensor = _Gather.apply(rows.contiguous())  # type: ignore[no-untyped-call]
    return found


def gathered_texts(texts: Tensor) -> Tensor:
    """(B, L) to (N, L'), padded with 0 to the longest of all."""
    if processes() == 1:
        return texts
    longest = torch.tensor(texts.shape[1], device=texts.device)
    distributed.all_reduce(longest, distributed.ReduceOp.MAX)
    return gathered(F.pad(texts, (0, int(longest) - texts.shape[1])))


def own_rows(count: int) -> slice:
    """Where the B = `count` rows of this process stand among the N."""
    return slice(rank() * count, (rank() + 1) * count)


def mean_over_all(total: Tensor, count: Tensor) -> Tensor:
    """A sum of terms and their number, here, to a loss whose mean over the processes is the mean of all terms."""
    if processes() == 1:
        return total / count
    everywhere = count.detach().clone()
    distributed.all_reduce(everywhere)
    return total * (processes() / everywhere)


def averaged(value: Tensor) -> float:
    """The mean over the processes, without a gradient."""
    found = value.detach().float().clone()
    if processes() > 1:
        distributed.all_reduce(found)
    return found.item() / processes()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(processes())]
        distributed.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)  # it may be read elsewhere too
        distributed.all_reduce(total)
        return total[own_rows(len(total) // processes())]
