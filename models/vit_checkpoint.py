"""A plain ViT out of a file, for an image encoder that starts from it: BLIP's from DeiT's, BLIP-2's from BLIP's.

A file holds the ViT alone (DeiT's and timm's names, as salesforce/BLIP models/blip_pretrain.py takes them), or BLIP in any
layout of models/layouts.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from models.bert_checkpoint import PartReport, Spoken, fill
from models.config import Blip2Config
from models.errors import UserError
from models.layouts import ENCODER, Source, open_checkpoint
from models.positions import fit_positions
from models.sizes import check_sizes
from models.weights_file import listed

PACKED = ".attn.qkv.bias"
PLAIN = f"{ENCODER}blocks.0{PACKED}"  # BLIP-2's own encoders have no such tensor
POSITIONS = f"{ENCODER}pos_embed"
NORM, LN_VISION = f"{ENCODER}norm.", "ln_vision."


def load_plain_vit(model: nn.Module, config: Spoken, path: Path) -> PartReport | None:
    """Fill the image encoder of `model`, which is made of `config`, in place; None when the file holds no plain ViT and
    BLIP-2's may hold one of its own.

    EVA's keys have no bias. Leaving a plain ViT's out changes nothing: it adds the same to all scores of a query, and softmax
    does not see that. The norm at its end becomes `ln_vision`. Raises UserError when the file cannot be read, holds no image
    encoder or one of other sizes, or lacks, misshapes or spoils a tensor.
    """
    blip2 = isinstance(config, Blip2Config)
    source = _open(path)
    if PLAIN not in source.tensors:
        if blip2:
            return None
        held = listed(list(dict.fromkeys(name.split(".")[0] for name in [*source.weights.tensors, *source.weights.beside])))
        raise UserError(
            f"{path} holds no image encoder of BLIP: it has no blocks.0{PACKED}. It holds {held or 'nothing'}. Give a plain ViT, "
            "such as deit_base_patch16_224-b5f2ef4d.pth, or a checkpoint of BLIP."
        )
    own = {name: tensor for name, tensor in source.tensors.items() if name.startswith(ENCODER)}
    check_sizes(path, config, own)
    pixels = None
    if (table := own.get(POSITIONS)) is not None:
        own[POSITIONS], pixels = fit_positions(table, config.vision, path)
    found = _as_eva(own, config.vision.width) if blip2 else own
    wanted = [name for name in model.state_dict() if name.startswith((ENCODER, LN_VISION))]
    fill(model, source, {name: found.get(name) for name in wanted}, {name: _spelt(name) for name in wanted})
    notes = [*source.notes]
    notes += ["position embeddings interpolated from {} to {} pixels".format(*pixels)] if pixels else []
    notes += ["key biases, which change no result, are left, and its last norm is ln_vision"] if blip2 else []
    rest = len(own) - len({_spelt(name) for name in wanted})
    ignored = {"other tensors of the image encoder": rest} if rest else {}
    return PartReport("image encoder", path, source.weights.sha256(), len(wanted), ignored, tuple(notes))


def _open(path: Path) -> Source:
    """The file, its image encoder under our names."""
    source = open_checkpoint(path)
    if PLAIN.removeprefix(ENCODER) not in source.tensors:
        return source
    tensors = {ENCODER + name: tensor for name, tensor in source.tensors.items()}
    return replace(source, tensors=tensors, spell=lambda name: name.removeprefix(ENCODER))


def _as_eva(tensors: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """The same as BLIP-2 names and packs it."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(PACKED):
            stem = name.removesuffix("qkv.bias")
            found |= {f"{stem}q_bias": tensor[:width], f"{stem}v_bias": tensor[2 * width :]}
        else:
            found[name.replace(NORM, LN_VISION)] = tensor
    return found


def _spelt(name: str) -> str:
    """Our name of a tensor to a plain ViT's."""
    for ours in ("q_bias", "v_bias"):
        name = name.replace(f".attn.{ours}", PACKED)
    return name.replace(LN_VISION, NORM)
