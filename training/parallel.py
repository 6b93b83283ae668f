"""One training in many processes: who they are, and how the model is shared among them.

torchrun starts the processes (`blip-train rank-table launch` prints its lines for Ascend). The losses are made so that the mean
over the processes is that of one process with the whole batch (training/gather.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from models.errors import Misuse, UserError
from training.learner import Learner

NONE, DDP, SHARD_GRAD_OP, FULL_SHARD = "none", "ddp", "shard_grad_op", "full_shard"
MODES = (NONE, DDP, SHARD_GRAD_OP, FULL_SHARD)
PATIENCE = timedelta(days=1)  # while one process measures, saves or makes features; torchrun sees to those that died
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


@dataclass(frozen=True)
class Place:
    """Where this process stands."""

    rank: int
    processes: int
    device: torch.device


@contextmanager
def joined(device: str, mode: str, backend: str = "auto") -> Iterator[Place]:
    """Within the block this process is one of those that torchrun started, or alone.

    Args:
        device: cpu, cuda or npu.
        mode: one of MODES.
        backend: of torch.distributed; auto is that of the device.

    Raises Misuse when `mode` does not go with the number of processes, or the device is not there.
    """
    if mode not in MODES:
        raise Misuse(f"There is no parallel mode {mode!r:.60}; known modes: {', '.join(MODES)}.")
    count, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if count > 1 and mode == NONE:
        raise Misuse(f"{count} processes were started, and parallel.mode is {NONE}: each would train alone. Set it to {DDP}.")
    place = device_of(device, local)
    if "RANK" not in os.environ:
        if mode not in (NONE, DDP):
            raise Misuse(f"parallel.mode {mode} needs processes: start them with torchrun --nproc_per_node N -m training ...")
        yield Place(0, 1, place)
        return
    try:
        distributed.init_process_group(BACKENDS[device] if backend == "auto" else backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise Misuse(
            f"This process cannot join the others ({str(error).splitlines()[0].rstrip('.')}). Start all of them with torchrun, "
            "and set parallel.backend to auto or to one that the device has."
        ) from error
    try:
        yield Place(distributed.get_rank(), count, place)
    finally:
        distributed.destroy_process_group()


def has_npu() -> bool:
    """Whether this machine has an NPU that torch_npu knows of."""
    if find_spec("torch_npu") is None:
        return False
    import_module("torch_npu")  # makes torch know the device
    return bool(torch.get_device_module("npu").is_available())


def device_of(name: str, number: int) -> torch.device:
    """The `number`-th device of a kind. Raises Misuse when there is none."""
    if name == "npu":
        try:
            import_module("torch_npu")  # makes torch know the device
        except ModuleNotFoundError as error:
            raise UserError("device npu needs torch_npu. Install the release that Ascend has for this torch.") from error
    kinds = {"cpu": None, "cuda": torch.cuda, "npu": getattr(torch, "npu", None)}
    if name not in kinds:
        raise Misuse(f"There is no device {name!r:.60}; known devices: {', '.join(kinds)}.")
    if name == "cpu":
        return torch.device("cpu")
    kind = kinds[name]
    if kind is None or not kind.is_available() or number >= kind.device_count():
        raise Misuse(f"This machine has no {name} device {number}. Set the device to cpu, or start fewer processes.")
    kind.set_device(number)
    return torch.device(name, number)


def shared(learner: Learner, mode: str, place: Place, unused: bool = False) -> nn.Module:
    """The learner, whose gradients come to be the mean over all processes.

    With `ddp` each process holds all of it; with `shard_grad_op` a share of gradients and of the optimizer's state, and the
    weights from the forward to the backward pass; with `full_shard` a share of the weights as well, block by block (FlanT5's
    language model, whose blocks are not run by `forward`, stays whole from the forward to the backward pass here too). `unused`:
    steps may leave some weights without a gradient, which `ddp` must then look for in each.
    """
    if place.processes == 1 or mode == NONE:
        return learner
    if mode == DDP:
        devices = None if place.device.type == "cpu" else [place.device.index]
        return DistributedDataParallel(learner, device_ids=devices, find_unused_parameters=unused)
    mesh = init_device_mesh(place.device.type, (place.processes,))
    for block in blocks(learner.model):
        fully_shard(block, mesh=mesh, reshard_after_forward=mode == FULL_SHARD)
    scalars = {parameter for parameter in learner.parameters() if parameter.dim() == 0}  # the temperature has no axis to share
    fully_shard(learner, mesh=mesh, reshard_after_forward=False, ignored_params=scalars)
    for scalar in scalars:
        scalar.register_post_accumulate_grad_hook(_average)  # type: ignore[no-untyped-call]
    return learner


def _average(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    distributed.all_reduce(parameter.grad)
    parameter.grad /= distributed.get_world_size()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that are run by their `forward`, each of which may be gathered and let go by itself."""
    names = (
        "visual_encoder.blocks",
        "visual_encoder.transformer.resblocks",
        "llm_model.model.layers",
        "llm_model.model.decoder.layers",
    )
    modules = dict(model.named_modules())
    return [block for name in names if name in modules for block in modules[name].children()]
