"""The sizes that the tensors of a checkpoint show, and the preset that has them. Heads leave no trace in a shape."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from models.config import CLIP, EVA, PRESETS, Blip2Config, BlipConfig, Config
from models.errors import UserError
from models.positions import NAMES as POSITIONS
from models.positions import side_of

# Size in the configuration -> a tensor and the axis that shows it. Of several for one size the first one there.
VIT_SIZES = (
    ("vision.width", "visual_encoder.cls_token", 2),
    ("vision.patch", "visual_encoder.patch_embed.proj.weight", 3),
    ("vision.mlp", "visual_encoder.blocks.0.mlp.fc1.weight", 0),
)
CLIP_SIZES = (
    ("vision.width", "visual_encoder.class_embedding", 0),
    ("vision.patch", "visual_encoder.conv1.weight", 3),
    ("vision.mlp", "visual_encoder.transformer.resblocks.0.mlp.c_fc.weight", 0),
)


def _reader(part: str, where: str) -> tuple[tuple[str, str, int], ...]:
    """Of what reads the text: `part` of the configuration, under `where` in the checkpoint."""
    return (
        (f"{part}.vocab", f"{where}.embeddings.word_embeddings.weight", 0),
        (f"{part}.width", f"{where}.embeddings.word_embeddings.weight", 1),
        (f"{part}.positions", f"{where}.embeddings.position_embeddings.weight", 0),
        (f"{part}.ffn", f"{where}.encoder.layer.0.intermediate.dense.weight", 0),
    )


SIZES = {
    BlipConfig: (*VIT_SIZES, *_reader("text", "text_encoder"), ("embed", "vision_proj.weight", 0)),
    Blip2Config: (
        *VIT_SIZES,
        *CLIP_SIZES,
        ("vision.width", "Qformer.bert.encoder.layer.0.crossattention.self.key.weight", 1),  # without an image encoder
        *_reader("qformer", "Qformer.bert"),
        ("qformer.queries", "query_tokens", 1),
        ("embed", "vision_proj.weight", 0),
    ),
}
DEPTHS = {
    BlipConfig: {
        "vision.depth": r"visual_encoder\.blocks\.(\d{1,4})\.",
        "text.depth": r"text_encoder\.encoder\.layer\.(\d{1,4})\.",
    },
    Blip2Config: {
        "vision.depth": r"visual_encoder\.(?:transformer\.res)?blocks\.(\d{1,4})\.",
        "qformer.depth": r"Qformer\.bert\.encoder\.layer\.(\d{1,4})\.",
    },
}
CROSS = re.compile(r"Qformer\.bert\.encoder\.layer\.(\d{1,4})\.crossattention\.")
KINDS = {EVA: "visual_encoder.cls_token", CLIP: "visual_encoder.class_embedding"}  # of BLIP-2's image encoder


def check_sizes(path: Path, config: Config, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError when the tensors show other sizes than `config`, with the preset that has theirs."""
    found = _shown(type(config), tensors)
    wrong = {size: held for size, held in found.items() if held != operator.attrgetter(size)(config)}
    if not wrong:
        return
    name = next((name for name, known in PRESETS.items() if known == config), "the configuration")
    said = [f"{size}: the checkpoint has {held}, {name} has {operator.attrgetter(size)(config)}" for size, held in wrong.items()]
    # Of the presets with these sizes, the one that follows the same protocol, and with pictures as it was trained on.
    fitting, pixels = _fitting(type(config), found), _pixels(found, tensors)
    fitting.sort(key=lambda n: (PRESETS[n].protocol != config.protocol, PRESETS[n].vision.image_size != pixels))
    advice = f"Try --model {fitting[0]}." if fitting else "Give its sizes with --config, or a checkpoint of this model."
    raise UserError(f"{path}: {'; '.join(said)}. {advice}")


def preset_of(path: Path, blip2: bool, tensors: Mapping[str, Tensor]) -> Config:
    """The preset with the sizes that the tensors show. Raises UserError when none has them."""
    kind = Blip2Config if blip2 else BlipConfig
    found = _shown(kind, tensors)
    fitting, pixels = _fitting(kind, found), _pixels(found, tensors)
    fitting.sort(key=lambda n: PRESETS[n].vision.image_size != pixels)
    if not fitting:
        said = ", ".join(f"{size} {held}" for size, held in found.items())
        raise UserError(f"{path}: no preset has its sizes ({said}). Give them with --config FILE.json.")
    return PRESETS[fitting[0]]


def _shown(kind: type[Config], tensors: Mapping[str, Tensor]) -> dict[str, int | str]:
    """The sizes that the tensors show, as far as the telling ones are there."""
    found: dict[str, int | str] = {}
    for size, name, axis in SIZES[kind]:
        if size not in found and name in tensors and tensors[name].dim() > axis:
            found[size] = tensors[name].shape[axis]
    for size, pattern in DEPTHS[kind].items():
        layers = [int(match[1]) for name in tensors if (match := re.match(pattern, name))]
        if layers:
            found[size] = max(layers) + 1
    if kind is Blip2Config:
        for encoder, name in KINDS.items():
            if name in tensors:
                found["vision.kind"] = encoder
        crossed = sorted({int(match[1]) for name in tensors if (match := CROSS.match(name))})
        if len(crossed) > 1:
            found["qformer.cross_every"] = crossed[1] - crossed[0]
    return found


def _fitting(kind: type[Config], found: Mapping[str, int | str]) -> list[str]:
    """The presets that have these sizes."""
    same_kind = [name for name, known in PRESETS.items() if isinstance(known, kind)]
    return [n for n in same_kind if all(operator.attrgetter(size)(PRESETS[n]) == held for size, held in found.items())]


def _pixels(found: Mapping[str, int | str], tensors: Mapping[str, Tensor]) -> int | None:
    """Picture size that the position embeddings were made for."""
    positions = next((tensors[name] for name in POSITIONS if name in tensors), None)
    patch = found.get("vision.patch")
    if positions is None or positions.dim() < 2 or not isinstance(patch, int):
        return None
    side = side_of(positions)
    return side * patch if side else None
