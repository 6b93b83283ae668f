"""AdamW and what goes with it: which weights decay, the clipping of gradients, and the loss scale of float16.

Before `take_step` the loss goes through `scaler.scale(loss / batches).backward()` for each of the step's batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor import DTensor

from models.errors import Misuse
from training.settings import Optimizer, Run


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW over what `model` has that is not frozen: matrices decay; biases, norms and the temperature do not.

    Its learning rate is 0 until `set_learning_rate`. Raises Misuse when everything is frozen.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise Misuse("Nothing is left to train: all parts of the model are frozen. Set model.freeze_vit to false, or add LoRA.")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let the next step be of this size, for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def make_scaler(run: Run, device: torch.device) -> GradScaler:
    """What keeps small gradients of fp16 from becoming 0, on any device; with fp32 and bf16 it does nothing.

    It begins at `run.loss_scale`, which `take_step` then holds it to, or at 65536 and finds the scale while training.
    """
    return GradScaler(device.type, init_scale=run.loss_scale or 2.0**16, enabled=run.precision == "fp16")


def take_step(optimizer: torch.optim.Optimizer, scaler: GradScaler, norm: float | None, loss_scale: float | None = None) -> float:
    """Clip the gradients to `norm`, step, and drop them. Returns their norm before.

    A step whose gradients are not all numbers is left out, and its norm is inf or nan. With fp16 the scale then becomes smaller,
    unless `loss_scale` fixes it.
    """
    scaler.unscale_(optimizer)
    found = clip((p for group in optimizer.param_groups for p in group["params"]), norm)
    if scaler.is_enabled() or math.isfinite(found):
        scaler.step(optimizer)
    scaler.update(loss_scale if scaler.is_enabled() else None)
    optimizer.zero_grad()
    return found


def clip(parameters: Iterable[Tensor], norm: float | None) -> float:
    """Scale the gradients, in place, so that their common norm is at most `norm`; None leaves them. Returns their norm before.

    Of weights that FSDP shares out it is the norm of the whole, on every process.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    shares = [g for g in gradients if isinstance(g, DTensor)]  # kinds that no operation takes together
    wholes = [g for g in gradients if not isinstance(g, DTensor)]
    of_shares = torch.nn.utils.get_total_norm(shares).full_tensor() if shares else torch.zeros(())  # type: ignore[attr-defined]
    of_wholes = torch.nn.utils.get_total_norm(wholes) if wholes else torch.zeros(())
    total = math.hypot(float(of_shares), float(of_wholes))
    if norm is not None and total > norm:
        torch._foreach_mul_(wholes, norm / total) if wholes else None
        for share in shares:
            share.mul_(norm / total)
    return total
