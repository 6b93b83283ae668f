"""The sizes that the tensors of a checkpoint show, and the preset that has them. Heads leave no trace in a shape."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from models.config import CLIP, EVA, Blip2Config, Blip2LlmConfig, BlipCaptionConfig, BlipConfig, BlipVqaConfig, Config
from models.errors import UserError
from models.llm_config import LlamaConfig, LlmConfig, OptConfig, T5Config
from models.positions import NAMES as POSITIONS
from models.positions import side_of
from models.presets import PRESETS

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


BRIDGE = ("vision.width", "Qformer.bert.encoder.layer.0.crossattention.self.key.weight", 1)  # without an image encoder
SIZES: dict[type[Config], tuple[tuple[str, str, int], ...]] = {
    BlipConfig: (*VIT_SIZES, *_reader("text", "text_encoder"), ("embed", "vision_proj.weight", 0)),
    Blip2Config: (
        *VIT_SIZES,
        *CLIP_SIZES,
        BRIDGE,
        *_reader("qformer", "Qformer.bert"),
        ("qformer.queries", "query_tokens", 1),
        ("embed", "vision_proj.weight", 0),
    ),
    BlipCaptionConfig: (*VIT_SIZES, *_reader("decoder", "text_decoder.bert")),
    BlipVqaConfig: (*VIT_SIZES, *_reader("text", "text_encoder"), *_reader("decoder", "text_decoder.bert")),
    Blip2LlmConfig: (
        *VIT_SIZES,
        *CLIP_SIZES,
        BRIDGE,
        ("qformer.width", "query_tokens", 2),
        ("qformer.ffn", "Qformer.bert.encoder.layer.0.intermediate_query.dense.weight", 0),
        ("qformer.queries", "query_tokens", 1),
    ),
}
PROJECTION = "llm_proj.weight"  # leads to the language model, which may lie in a file of its own
LLM_SIZES: dict[type[LlmConfig], tuple[tuple[str, str, int], ...]] = {
    OptConfig: (
        ("llm.vocab", "llm_model.model.decoder.embed_tokens.weight", 0),
        ("llm.embed", "llm_model.model.decoder.embed_tokens.weight", 1),
        ("llm.width", "llm_model.model.decoder.embed_positions.weight", 1),
        ("llm.ffn", "llm_model.model.decoder.layers.0.fc1.weight", 0),
        ("llm.embed", PROJECTION, 0),
    ),
    LlamaConfig: (
        ("llm.vocab", "llm_model.model.embed_tokens.weight", 0),
        ("llm.width", "llm_model.model.embed_tokens.weight", 1),
        ("llm.ffn", "llm_model.model.layers.0.mlp.gate_proj.weight", 0),
        ("llm.width", PROJECTION, 0),
    ),
    T5Config: (
        ("llm.vocab", "llm_model.shared.weight", 0),
        ("llm.width", "llm_model.shared.weight", 1),
        ("llm.ffn", "llm_model.encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0),
        ("llm.heads", "llm_model.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 1),
        ("llm.buckets", "llm_model.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 0),
        ("llm.width", PROJECTION, 0),
    ),
}
LLM_KINDS: dict[type[LlmConfig], str] = {OptConfig: "OPT", LlamaConfig: "LLaMA", T5Config: "T5"}
VIT_DEPTH = r"visual_encoder\.blocks\.(\d{1,4})\."
ANY_VIT_DEPTH = r"visual_encoder\.(?:transformer\.res)?blocks\.(\d{1,4})\."
READER_DEPTH = r"text_encoder\.encoder\.layer\.(\d{1,4})\."
DECODER_DEPTH = r"text_decoder\.bert\.encoder\.layer\.(\d{1,4})\."
QFORMER_DEPTH = r"Qformer\.bert\.encoder\.layer\.(\d{1,4})\."
DEPTHS: dict[type[Config], dict[str, str]] = {
    BlipConfig: {"vision.depth": VIT_DEPTH, "text.depth": READER_DEPTH},
    Blip2Config: {"vision.depth": ANY_VIT_DEPTH, "qformer.depth": QFORMER_DEPTH},
    BlipCaptionConfig: {"vision.depth": VIT_DEPTH, "decoder.depth": DECODER_DEPTH},
    BlipVqaConfig: {"vision.depth": VIT_DEPTH, "text.depth": READER_DEPTH, "decoder.depth": DECODER_DEPTH},
    Blip2LlmConfig: {
        "vision.depth": ANY_VIT_DEPTH,
        "qformer.depth": QFORMER_DEPTH,
        "llm.depth": r"llm_model\.(?:model\.(?:decoder\.)?layers|(?:en|de)coder\.block)\.(\d{1,4})\.",
    },
}
CROSS = re.compile(r"Qformer\.bert\.encoder\.layer\.(\d{1,4})\.crossattention\.")
KINDS = {EVA: "visual_encoder.cls_token", CLIP: "visual_encoder.class_embedding"}  # of BLIP-2's image encoder

Shown = dict[str, int | str]


def check_sizes(path: Path, config: Config, tensors: Mapping[str, Tensor], llm: type[LlmConfig] | None = None) -> None:
    """Raises UserError when the tensors show other sizes than `config`, with the preset that has theirs. `llm` is the kind of
    language model they are of, None when nothing tells."""
    if llm is None and isinstance(config, Blip2LlmConfig):
        llm = type(config.llm)
    found = _shown(type(config), tensors, llm)
    wrong = {size: held for size, held in found.items() if held != _size(config, size)}
    if "llm" in wrong:  # sizes of another kind are not its own
        wrong = {size: held for size, held in wrong.items() if not size.startswith("llm.")}
    if not wrong:
        return
    name = next((name for name, known in PRESETS.items() if known == config), "the configuration")
    said = [f"{size}: the checkpoint has {held}, {name} has {_size(config, size)}" for size, held in wrong.items()]
    # Of the presets with these sizes, the one that follows the same protocol, and with pictures as it was trained on.
    fitting, pixels = _fitting(type(config), found), _pixels(found, tensors)
    fitting.sort(key=lambda n: (PRESETS[n].protocol != config.protocol, PRESETS[n].vision.image_size != pixels))
    advice = f"Try --model {fitting[0]}." if fitting else "Give its sizes with --config, or a checkpoint of this model."
    raise UserError(f"{path}: {'; '.join(said)}. {advice}")


def preset_of(path: Path, kind: type[Config], tensors: Mapping[str, Tensor], llm: type[LlmConfig] | None = None) -> Config:
    """The preset of a `kind` with the sizes that the tensors show. `llm` as in `check_sizes`. Raises UserError when none has
    them, or several that have different language models."""
    kinds = [llm] if llm or kind is not Blip2LlmConfig else list(LLM_SIZES)
    fitting = [name for each in kinds for name in _fitting(kind, _shown(kind, tensors, each))]
    found = _shown(kind, tensors, llm)
    pixels = _pixels(found, tensors)
    fitting.sort(key=lambda n: PRESETS[n].vision.image_size != pixels)
    if len({known.llm for name in fitting if isinstance(known := PRESETS[name], Blip2LlmConfig)}) > 1:
        raise UserError(f"{path} may be for any of {', '.join(fitting)}: name the one that it was trained for with --model.")
    if not fitting:
        said = ", ".join(f"{size} {held}" for size, held in found.items())
        named = "Name the model with --model, or give" if kind is Blip2LlmConfig else "Give"  # its words may have spare rows
        raise UserError(f"{path}: no preset has its sizes ({said}). {named} them with --config FILE.json.")
    return PRESETS[fitting[0]]


def _shown(kind: type[Config], tensors: Mapping[str, Tensor], llm: type[LlmConfig] | None = None) -> Shown:
    """The sizes that the tensors show, as far as the telling ones are there."""
    found: Shown = {"llm": LLM_KINDS[llm]} if llm else {}
    for size, name, axis in SIZES[kind] + (LLM_SIZES[llm] if llm else ()):
        if size not in found and name in tensors and tensors[name].dim() > axis:
            found[size] = tensors[name].shape[axis]
    for size, pattern in DEPTHS[kind].items():
        layers = [int(match[1]) for name in tensors if (match := re.match(pattern, name))]
        if layers:
            found[size] = max(layers) + 1
    if kind in (Blip2Config, Blip2LlmConfig):
        for encoder, name in KINDS.items():
            if name in tensors:
                found["vision.kind"] = encoder
        crossed = sorted({int(match[1]) for name in tensors if (match := CROSS.match(name))})
        if len(crossed) > 1:
            found["qformer.cross_every"] = crossed[1] - crossed[0]
    return found


def _size(config: Config, size: str) -> int | str | None:
    """What `config` has for a size; None when it has no such part."""
    if size == "llm":
        return LLM_KINDS[type(config.llm)] if isinstance(config, Blip2LlmConfig) else None
    try:
        held: int | str = operator.attrgetter(size)(config)
    except AttributeError:
        return None
    return held


def _fitting(kind: type[Config], found: Shown) -> list[str]:
    """The presets that have these sizes."""
    same_kind = [name for name, known in PRESETS.items() if isinstance(known, kind)]
    return [name for name in same_kind if all(_size(PRESETS[name], size) == held for size, held in found.items())]


def _pixels(found: Shown, tensors: Mapping[str, Tensor]) -> int | None:
    """Picture size that the position embeddings were made for."""
    positions = next((tensors[name] for name in POSITIONS if name in tensors), None)
    patch = found.get("vision.patch")
    if positions is None or positions.dim() < 2 or not isinstance(patch, int):
        return None
    side = side_of(positions)
    return side * patch if side else None
