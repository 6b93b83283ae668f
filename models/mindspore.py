"""BLIP-2 as mindformers spells it (mindformers/models/blip2/convert_weight.py, r1.0): names, transposes, split matrices.

Queries, keys and values of the image encoder are three matrices there, its keys have a bias (of zeros), and the other three
matrices of a block are transposed. That converter also writes the two feed-forward matrices of a block under each other's
names; files that MindSpore saved from a model have them right. Their shapes tell. The Q-Former is only renamed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.errors import UserError
from models.weights_file import is_plain, renamed

# Parts of names: ours on the left, which is LAVIS's, MindSpore's on the right.
START = ("Qformer.", "qformer.")
PARTS = (
    (".self.", ".self_att."),
    ("_embeddings.weight", "_embeddings.embedding_table"),
    (".LayerNorm.weight", ".layernorm.gamma"),
    (".LayerNorm.bias", ".layernorm.beta"),
    ("ln_vision.weight", "ln_vision.gamma"),
    ("ln_vision.bias", "ln_vision.beta"),
    ("visual_encoder.cls_token", "visual_encoder.cls_tokens"),
    (".norm1.weight", ".layernorm1.gamma"),
    (".norm1.bias", ".layernorm1.beta"),
    (".norm2.weight", ".layernorm2.gamma"),
    (".norm2.bias", ".layernorm2.beta"),
    (".attn.q_bias", ".attention.dense1.bias"),
    (".attn.k_bias", ".attention.dense2.bias"),
    (".attn.v_bias", ".attention.dense3.bias"),
    (".attn.proj.", ".attention.projection."),
    (".mlp.fc1.", ".output.mapping."),
    (".mlp.fc2.", ".output.projection."),
)
BLOCK = re.compile(r"visual_encoder\.blocks\.\d+\.")
THIRDS = tuple(f"attention.dense{n}.weight" for n in (1, 2, 3))  # queries, keys, values
KEY_BIAS = "attn.k_bias"
SQUARE = "attn.proj.weight"


def to_our_name(name: str) -> str:
    """MindSpore's name of a tensor to ours; a name that both share stays."""
    ours, theirs = START
    name = ours + name.removeprefix(theirs) if name.startswith(theirs) else name
    for ours, theirs in PARTS:
        name = name.replace(theirs, ours)
    return name


def to_their_name(name: str) -> str:
    """Our name of a tensor to MindSpore's (of a matrix that is split there, the name of the first part)."""
    ours, theirs = START
    name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
    for ours, theirs in PARTS:
        name = name.replace(ours, theirs)
    return name.replace(".attn.qkv.weight", f".{THIRDS[0]}")


def from_mindspore(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """MindSpore's tensors under our names and in our shapes, and what there is to say about them. A bias of keys, which no
    model of ours has, is among them where it is not zero.

    Raises UserError when a matrix lacks a third.
    """
    split = {name for name in tensors if BLOCK.match(name) and BLOCK.sub("", name) in THIRDS}
    ours = renamed({name: tensor for name, tensor in tensors.items() if name not in split}, to_our_name, path)
    crossed = 0
    for block in dict.fromkeys(found[0] for name in tensors if (found := BLOCK.match(name))):
        keys = ours.get(block + KEY_BIAS)
        if keys is not None and is_plain(keys) and not bool(keys.count_nonzero()):
            del ours[block + KEY_BIAS]
        if any(block + third in tensors for third in THIRDS):
            ours[f"{block}attn.qkv.weight"] = _joined(path, block, tensors)
        if (square := ours.get(block + SQUARE)) is not None and square.dim() == 2:
            ours[block + SQUARE] = square.t()
        crossed += _turn_feed_forward(block, ours)
    said = f"the feed-forward matrices of {crossed} blocks lie under each other's names, as mindformers' converter writes them"
    return ours, (f"{said}: told apart by their shapes",) if crossed else ()


def _joined(path: Path, block: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Queries, keys and values in one matrix."""
    thirds = [tensors.get(block + third) for third in THIRDS]
    held = [tensor for tensor in thirds if tensor is not None and tensor.dim() == 2]
    if len(held) < 3 or len({(tensor.shape, tensor.dtype) for tensor in held}) > 1:
        shapes = ["missing" if tensor is None else str(tuple(tensor.shape)) for tensor in thirds]
        raise UserError(
            f"{path}: {block}attention.dense1, 2 and 3 are {', '.join(shapes)}, expected three matrices of one shape. "
            "Give a complete checkpoint."
        )
    return torch.cat(held)


def _turn_feed_forward(block: str, ours: dict[str, Tensor]) -> bool:
    """Transpose the two feed-forward matrices of `block` in `ours`; true when they were under each other's names."""
    names = f"{block}mlp.fc1.weight", f"{block}mlp.fc2.weight"
    first, second = (ours.get(name) for name in names)
    if first is None or second is None or first.dim() != 2 or second.dim() != 2:
        return False
    width = ours.get(f"{block}norm1.weight", ours.get(f"{block}mlp.fc2.bias"))
    # The first matrix leads from the width of the model to another one. It has the model's width first, being transposed.
    crossed = width is not None and first.shape[0] != width.numel() == first.shape[1]
    if crossed:
        first, second = second, first
    ours[names[0]], ours[names[1]] = first.t(), second.t()
    return crossed
