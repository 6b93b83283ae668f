"""The sizes of a model and the protocol its data follow. Imports no torch: the NPU host reads it too.

A preset is a name for one frozen `BlipConfig` or `Blip2Config`. Sizes and protocol of the published files: salesforce/BLIP,
models/vit.py, configs/med_config.json, configs/retrieval_{coco,flickr}.yaml; salesforce/LAVIS, models/eva_vit.py,
models/clip_vit.py, models/blip2_models/Qformer.py, configs/models/blip2.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import Misuse, UserError

INTERPOLATIONS = ("bicubic", "bilinear")  # the resizes that a protocol may name
VIT, EVA, CLIP = "vit", "eva", "clip"  # the image encoders: BLIP's, and the two of BLIP-2
LARGEST = 1 << 20  # that a size may be; products of them must be numbers that PyTorch can count to


@dataclass(frozen=True)
class VisionConfig:
    """A pre-norm ViT. EVA's and CLIP's end before their last block, which BLIP-2 leaves out."""

    image_size: int  # pixels, the pictures are square
    patch: int  # pixels
    width: int
    depth: int
    heads: int
    mlp: int  # width of the feed-forward layer
    eps: float = 1e-6  # of every LayerNorm
    kind: str = VIT  # VIT, EVA or CLIP

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch) ** 2 + 1


@dataclass(frozen=True)
class TextConfig:
    """BERT with cross-attention in every layer (salesforce/BLIP models/med.py)."""

    vocab: int  # with the special tokens that the model adds: [DEC], and BLIP's [ENC]
    width: int
    depth: int
    heads: int
    ffn: int
    positions: int
    eps: float = 1e-12


@dataclass(frozen=True)
class QformerConfig(TextConfig):
    """BERT that reads captions, and pictures by learnt queries (salesforce/LAVIS models/blip2_models/Qformer.py)."""

    queries: int = 32
    cross_every: int = 2  # layers 0, 2, ... of the queries look at the picture

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with cross-attention."""
        return tuple(range(0, self.depth, self.cross_every))


@dataclass(frozen=True)
class Protocol:
    """How pictures and captions become tensors. Part of the model: another protocol gives other numbers."""

    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    max_words: int = 30  # captions are cut to so many words before tokenising
    max_length: int = 35  # tokens, with [CLS] and [SEP]
    pad_token: str = "[PAD]"
    decode_token: str = "[DEC]"  # begins a caption in the decoder
    encode_token: str = "[ENC]"  # takes the place of [CLS] when a caption is matched with a picture; BLIP-2 keeps [CLS]
    k_test: int = 256  # candidates re-ranked per query


STAGE1 = Protocol(max_words=50, encode_token="[CLS]", k_test=128)  # BLIP-2's


@dataclass(frozen=True)
class BlipConfig:
    """BLIP for retrieval: two encoders, their projections, the matching head."""

    vision: VisionConfig
    text: TextConfig
    embed: int = 256  # width of the space that pictures and captions share
    protocol: Protocol = Protocol()


@dataclass(frozen=True)
class Blip2Config:
    """BLIP-2's first stage: an image encoder, and a Q-Former that reads it and captions."""

    vision: VisionConfig
    qformer: QformerConfig
    embed: int = 256  # width of the space that queries and captions share
    protocol: Protocol = STAGE1

    @property
    def text(self) -> QformerConfig:
        """What reads the captions: the Q-Former."""
        return self.qformer


Config = BlipConfig | Blip2Config

VIT_B = VisionConfig(image_size=384, patch=16, width=768, depth=12, heads=12, mlp=3072)
VIT_L = VisionConfig(image_size=384, patch=16, width=1024, depth=24, heads=16, mlp=4096)
MED = TextConfig(vocab=30524, width=768, depth=12, heads=12, ffn=3072, positions=512)
FLICKR = Protocol(k_test=128)
EVA_G = VisionConfig(image_size=224, patch=14, width=1408, depth=39, heads=16, mlp=6144, kind=EVA)
CLIP_L = VisionConfig(image_size=224, patch=14, width=1024, depth=23, heads=16, mlp=4096, eps=1e-5, kind=CLIP)
QFORMER = QformerConfig(vocab=30523, width=768, depth=12, heads=12, ffn=3072, positions=512)

# Trained from nothing on the drawn pictures of demo/shapes.py; the vocabulary is demo/tokenizer/vocab.txt.
BLIP_DEMO = BlipConfig(
    VisionConfig(image_size=48, patch=8, width=128, depth=4, heads=4, mlp=512),
    TextConfig(vocab=85, width=128, depth=3, heads=4, ffn=512, positions=40),
    embed=64,
    protocol=Protocol(k_test=32),
)
# The same pictures and the same image encoder, with a Q-Former on top.
BLIP2_DEMO = Blip2Config(
    dataclasses.replace(BLIP_DEMO.vision, kind=EVA),
    QformerConfig(vocab=84, width=128, depth=4, heads=4, ffn=512, positions=40, queries=8),
    embed=64,
    protocol=dataclasses.replace(STAGE1, k_test=32),
)

PRESETS: dict[str, Config] = {
    "blip-retrieval-base-coco": BlipConfig(VIT_B, MED),
    "blip-retrieval-base-flickr": BlipConfig(VIT_B, MED, protocol=FLICKR),
    "blip-retrieval-large-coco": BlipConfig(VIT_L, MED),
    "blip-retrieval-large-flickr": BlipConfig(VIT_L, MED, protocol=FLICKR),
    "blip-demo": BLIP_DEMO,
    "blip2-stage1-vit-g": Blip2Config(EVA_G, QFORMER),
    "blip2-stage1-vit-l": Blip2Config(CLIP_L, QFORMER),
    "blip2-retrieval-coco": Blip2Config(dataclasses.replace(EVA_G, image_size=364), QFORMER),
    "blip2-demo": BLIP2_DEMO,
}
# The names that mindformers' configurations have (mindformers/mindformer_book.py, r1.0).
ALIASES = dict.fromkeys(("blip2_stage1_vit_g", "blip2_stage1_classification", "blip2_stage1_evaluator"), "blip2-stage1-vit-g")


def preset(name: str) -> Config:
    """The configuration called `name`, or that mindformers calls so. Raises Misuse with the nearest known name."""
    name = ALIASES.get(name, name)
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, [*PRESETS, *ALIASES], n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise Misuse(f"No model is called {name!r}.{hint} Known models: {', '.join(PRESETS)}.")


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON values; `from_dict` gives the same configuration back."""
    return dataclasses.asdict(config)


def from_dict(values: object, where: str) -> Config:
    """Read `to_dict`'s form, with every name and type checked: of BLIP-2 when it has a Q-Former. What the protocol leaves out is
    the model's default. `where` names the source in the error (UserError)."""
    is_blip2 = isinstance(values, dict) and "qformer" in values
    kind: type[Config] = Blip2Config if is_blip2 else BlipConfig
    if isinstance(values, dict) and isinstance(given := values.get("protocol"), dict):
        values = values | {"protocol": dataclasses.asdict(kind.protocol) | given}
    config: Config = _read(kind, values, where)
    vision, text = config.vision, config.text
    reader, kinds = ("qformer", (EVA, CLIP)) if is_blip2 else ("text", (VIT,))
    if vision.kind not in kinds:
        raise UserError(f"{where}: vision.kind is {vision.kind!r}, expected {' or '.join(kinds)}.")
    for name, width, part in (
        ("vision.image_size by vision.patch", vision.image_size, vision.patch),
        ("vision.width by vision.heads", vision.width, vision.heads),
        (f"{reader}.width by {reader}.heads", text.width, text.heads),
    ):
        if width % part:
            raise UserError(f"{where}: {name} does not divide ({width} / {part}).")
    _check_protocol(config.protocol, reader, text.positions, where)
    return config


def _check_protocol(protocol: Protocol, reader: str, positions: int, where: str) -> None:
    if protocol.interpolation not in INTERPOLATIONS:
        raise UserError(f"{where}: protocol.interpolation is {protocol.interpolation!r}, expected {' or '.join(INTERPOLATIONS)}.")
    if min(protocol.std) <= 0:
        raise UserError(f"{where}: protocol.std must be above 0 in every channel, found {list(protocol.std)}.")
    if protocol.max_length < 3:
        raise UserError(f"{where}: protocol.max_length is {protocol.max_length}, but [CLS], a token and [SEP] take 3.")
    if protocol.max_length > positions:
        raise UserError(f"{where}: protocol.max_length is {protocol.max_length}, but {reader}.positions is only {positions}.")


def from_file(path: Path) -> Config:
    """Sizes typed by the user: a JSON file in the form of `to_dict`. Fields with a default may be left out."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    return from_dict(values, str(path))


def _read(kind: Any, values: object, where: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object with the fields of {kind.__name__}, found {type(values).__name__}.")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(values.keys() - fields):
        raise UserError(f"{where}: unknown field {unknown[0]!r}; {kind.__name__} has {', '.join(fields)}.")
    read = {}
    for name, field in fields.items():
        if name not in values:
            if field.default is dataclasses.MISSING:
                raise UserError(f"{where}: the field {name!r} is missing.")
            continue
        read[name] = _READERS[str(field.type)](values[name], f"{where}: {name}")
    return kind(**read)


def _whole(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where} must be a whole number above 0, found {value!r}.")
    if value > LARGEST:
        raise UserError(f"{where} is {value:,}, expected at most {LARGEST:,}. Correct it.")
    return value


def _number(value: object, where: str) -> float:
    # The bound keeps out NaN and Infinity, which JSON readers accept, and whole numbers that no float holds.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise UserError(f"{where} must be a number, found {value!r}.")
    return float(value)


def _positive(value: object, where: str) -> float:
    number = _number(value, where)
    if number <= 0:
        raise UserError(f"{where} must be a number above 0, found {value!r}.")
    return number


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise UserError(f"{where} must be a text, found {value!r}.")
    return value


def _three(value: object, where: str) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise UserError(f"{where} must be three numbers, found {value!r}.")
    return tuple(_number(v, where) for v in value)


_READERS: dict[str, Any] = {
    "int": _whole,
    "float": _positive,
    "str": _text,
    "tuple[float, float, float]": _three,
    "VisionConfig": lambda value, where: _read(VisionConfig, value, where),
    "TextConfig": lambda value, where: _read(TextConfig, value, where),
    "QformerConfig": lambda value, where: _read(QformerConfig, value, where),
    "Protocol": lambda value, where: _read(Protocol, value, where),
}
