"""Tensors into files, one at a time: safetensors, whole or in shards, and PyTorch's. Values and types stay as they are.

safetensors' own writer wants all tensors contiguous in memory at once; here a view of a mapped file is laid out when it is
written. The format: 8 bytes of length, a JSON header of names, types, shapes and places, the numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.errors import UserError
from models.weights_file import INDEX, SINGLE, listed

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
ALIGNED = 8  # bytes that the numbers start at a multiple of
SHARD = 5 * 10**9  # bytes, as transformers splits
TRANSFORMERS = {"format": "pt"}  # without it transformers refuses a file


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` as one safetensors file. Raises UserError for a tensor that the format has no type or no name for."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = f"{tensor.dtype} {tensor.layout} on {tensor.device}".replace("torch.", "")
            raise UserError(f"{listed([name])} holds {kind}, which safetensors has no place for. Remove it from the checkpoint.")
        if name in header or any("\ud800" <= letter <= "\udfff" for letter in name):  # half a character
            raise UserError(f"{listed([ascii(name)])} is no name for a tensor in safetensors. Remove it from the checkpoint.")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)


def write_shards(folder: Path, tensors: Mapping[str, Tensor], limit: int = SHARD) -> None:
    """Write `tensors` into `folder` as transformers reads them: one file, or files of at most `limit` bytes (a larger tensor
    has one of its own) and an index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(held.nbytes for held in shards[-1].values()) + tensor.nbytes > limit:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, tensors, TRANSFORMERS)
        return
    where: dict[str, str] = {}
    for n, shard in enumerate(shards, start=1):
        file = f"model-{n:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard, TRANSFORMERS)
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_torch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` as {"model": tensors}, the form of LAVIS's and BLIP's checkpoints. One that is named twice is stored
    once."""
    packed = {id(tensor): _packed(tensor.detach()) for tensor in tensors.values()}
    state = {name: packed[id(tensor)] for name, tensor in tensors.items()}
    with path.open("wb") as file:  # with a path, torch answers a full disk with an error of its own
        torch.save({"model": state}, file)


def _packed(tensor: Tensor) -> Tensor:
    """With memory that holds this tensor and nothing else: torch stores all memory that a tensor looks into."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return tensor
    # An empty one may begin where another one does, which torch would take for the same memory.
    if tensor.nbytes and tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
