"""Weights that stay as they were stored, in half precision, and compute in float32.

A language model of several gigabytes lies mapped in its file. Each part that holds weights widens its own while it runs and
lets the copies go: in memory there is never more than the widest matrix in float32 (0.5 GB of LLaMA-7B), and that for as long
as one product takes. Widening is exact, so the numbers are those of a model that was widened beforehand, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

HALVES = (torch.float16, torch.bfloat16)


def in_float32(tensor: Tensor) -> Tensor:
    """The tensor, widened if it is stored in half precision: for weights that are used outside of the module they belong to.
    A tensor in float32 is returned as it is, and leaves no trace in a graph that is being traced."""
    return tensor.to(torch.float32) if tensor.dtype in HALVES else tensor


@contextmanager
def compute_in_float32(module: nn.Module) -> Iterator[None]:
    """Within the block all of `module` computes in float32, whatever its weights are stored in; after it they are as before.

    For inference: what was widened has no gradient. Two threads must not run the module at once.
    """
    handles = [
        handle
        for part in module.modules()
        if any(weight.dtype in HALVES for weight in part.parameters(recurse=False))
        for handle in (_widen_result(part) if isinstance(part, nn.Embedding) else _widen_weights(part))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _widen_result(table: nn.Embedding) -> list[RemovableHandle]:
    """The rows that were looked up, not the table: the same numbers, of which there are fewer."""
    return [table.register_forward_hook(lambda part, given, rows: in_float32(rows))]


def _widen_weights(part: nn.Module) -> list[RemovableHandle]:
    stored: dict[str, nn.Parameter] = {}

    def widen(part: nn.Module, given: Any) -> None:
        for name, weight in part.named_parameters(recurse=False):
            if weight.dtype in HALVES:
                stored[name] = weight
                setattr(part, name, nn.Parameter(in_float32(weight), requires_grad=False))

    def restore(part: nn.Module, given: Any, result: Any) -> None:
        for name in list(stored):
            setattr(part, name, stored.pop(name))

    return [part.register_forward_pre_hook(widen), part.register_forward_hook(restore, always_call=True)]
