"""MindSpore's .ckpt a second time: written with protobuf's own library, the names as mindformers' converter makes them.

It shares nothing with models/mindspore.py and models/mindspore_file.py. Written from mindspore/ccsrc/utils/checkpoint.proto,
mindspore/python/mindspore/train/serialization.py and mindformers/models/blip2/convert_weight.py.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from torch import Tensor

Tensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
REQUIRED, REPEATED = 2, 3
INT64, STRING, MESSAGE, BYTES = 3, 9, 11, 12
KINDS = {
    torch.float16: "Float16",
    torch.bfloat16: "BFloat16",
    torch.float32: "Float32",
    torch.float64: "Float64",
    torch.int32: "Int32",
    torch.int64: "Int64",
    torch.bool: "Bool",
}


def _checkpoint_class() -> Any:
    """The message `Checkpoint` of checkpoint.proto."""
    file = descriptor_pb2.FileDescriptorProto(name="checkpoint.proto", package="mindspore_test", syntax="proto2")
    tensor = file.message_type.add(name="TensorProto")
    tensor.field.add(name="dims", number=1, label=REPEATED, type=INT64)
    tensor.field.add(name="tensor_type", number=2, label=REQUIRED, type=STRING)
    tensor.field.add(name="tensor_content", number=3, label=REQUIRED, type=BYTES)
    checkpoint = file.message_type.add(name="Checkpoint")
    value = checkpoint.nested_type.add(name="Value")
    value.field.add(name="tag", number=1, label=REQUIRED, type=STRING)
    value.field.add(name="tensor", number=2, label=REQUIRED, type=MESSAGE, type_name=".mindspore_test.TensorProto")
    checkpoint.field.add(name="value", number=1, label=REPEATED, type=MESSAGE, type_name=".mindspore_test.Checkpoint.Value")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("mindspore_test.Checkpoint"))


CHECKPOINT = _checkpoint_class()


def value(tag: str, dims: list[int], kind: str, content: bytes) -> bytes:
    """One entry of a file."""
    message = CHECKPOINT()
    entry = message.value.add()
    entry.tag = tag
    entry.tensor.dims.extend(dims)
    entry.tensor.tensor_type = kind
    entry.tensor.tensor_content = content
    data: bytes = message.SerializeToString()
    return data


def write_ckpt(path: Path, tensors: Tensors, cut: int = 1 << 29, crc: bool = False, old: bool = False) -> None:
    """Write a .ckpt: tensors of more than `cut` in several entries, with `crc` its checksum at the end, with `old`
    single numbers as MindSpore 1 writes them."""
    checksum = 0
    with path.open("wb") as file:
        for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            dims = [0] if old and tensor.dim() == 0 else list(tensor.shape)
            for start in range(0, len(content), cut):
                data = value(name, dims, KINDS[tensor.dtype], content[start : start + cut])
                checksum = zlib.crc32(data, checksum)
                file.write(data)
        if crc:
            file.write(b"crc_num" + checksum.to_bytes(10, "big"))


def mindspore_items(state: Mapping[str, Tensor], crossed: bool = False) -> Iterator[tuple[str, Tensor]]:
    """LAVIS's tensors as mindformers' converter leaves them; with `crossed` the feed-forward matrices of the image encoder
    under each other's names, as it really does."""
    for name, tensor in state.items():
        if name.endswith("attn.qkv.weight"):
            stem, width = name.removesuffix("attn.qkv.weight"), tensor.shape[1]
            for n in range(3):
                yield f"{stem}attention.dense{n + 1}.weight", tensor[n * width : (n + 1) * width].clone()
            continue
        new = re.sub(r"^Qformer\.", "qformer.", name).replace(".self.", ".self_att.")
        new = re.sub(r"(_embeddings)\.weight$", r"\1.embedding_table", new)
        new = re.sub(r"(LayerNorm|ln_vision|norm1|norm2)\.weight$", r"\1.gamma", new)
        new = re.sub(r"(LayerNorm|ln_vision|norm1|norm2)\.bias$", r"\1.beta", new)
        new = re.sub(r"\.norm([12])\.", r".layernorm\1.", new).replace("LayerNorm", "layernorm")
        if name.startswith("visual_encoder."):
            new = re.sub(r"cls_token$", "cls_tokens", new).replace("attn.proj", "attention.projection")
            new = new.replace("attn.q_bias", "attention.dense1.bias").replace("attn.v_bias", "attention.dense3.bias")
            matrix = name.endswith(("fc1.weight", "fc2.weight"))
            first, second = ("projection", "mapping") if crossed and matrix else ("mapping", "projection")
            new = new.replace("mlp.fc1", f"output.{first}").replace("mlp.fc2", f"output.{second}")
            if matrix or name.endswith("attn.proj.weight"):
                tensor = tensor.t().contiguous()
        yield new, tensor
        if name.endswith("attn.q_bias"):
            yield new.replace("dense1", "dense2"), torch.zeros_like(tensor)


def mindspore_state(state: Mapping[str, Tensor], crossed: bool = False) -> dict[str, Tensor]:
    """All of `mindspore_items`."""
    return dict(mindspore_items(state, crossed))
