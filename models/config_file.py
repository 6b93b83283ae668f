"""Configurations as JSON: what a manifest keeps, and what a user types for sizes that no preset has. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from models.config import (
    CLIP,
    EVA,
    INTERPOLATIONS,
    VIT,
    Blip2Config,
    Blip2LlmConfig,
    BlipCaptionConfig,
    BlipConfig,
    BlipVqaConfig,
    Config,
    Protocol,
    QformerConfig,
    TextConfig,
    VisionConfig,
)
from models.errors import UserError
from models.llm_config import BAICHUAN, GELU, GELU_TANH, LLAMA, OPT, T5, VICUNA, LlamaConfig, LlmConfig, OptConfig, T5Config

SAFETENSORS = ".safetensors"
LARGEST_HEAD = 100 << 20  # bytes, as the format has it
LARGEST = 1 << 20  # that a size may be; products of them must be numbers that PyTorch can count to
FAMILIES: dict[str, type] = {OPT: OptConfig, **dict.fromkeys((LLAMA, VICUNA, BAICHUAN), LlamaConfig), T5: T5Config}


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON values; `from_dict` gives the same configuration back."""
    return dataclasses.asdict(config)


def from_dict(values: object, where: str) -> Config:
    """Read `to_dict`'s form, with every name and type checked; which model it is, its parts tell. What the protocol leaves out
    is the model's default. `where` names the source in the error (UserError)."""
    kind = _kind_of(values)
    if isinstance(values, dict) and isinstance(given := values.get("protocol"), dict):
        values = values | {"protocol": dataclasses.asdict(kind.protocol) | given}
    config: Config = _read(kind, values, where)
    kinds = (EVA, CLIP) if isinstance(config, Blip2Config | Blip2LlmConfig) else (VIT,)
    if config.vision.kind not in kinds:
        raise UserError(f"{where}: vision.kind is {config.vision.kind!r}, expected {' or '.join(kinds)}.")
    if config.vision.image_size % config.vision.patch:
        size, patch = config.vision.image_size, config.vision.patch
        raise UserError(f"{where}: vision.image_size by vision.patch does not divide ({size} / {patch}).")
    for part in dataclasses.fields(config):
        found = getattr(config, part.name)
        if isinstance(found, VisionConfig | TextConfig | OptConfig | LlamaConfig) and found.width % found.heads:
            raise UserError(f"{where}: {part.name}.width by {part.name}.heads does not divide ({found.width} / {found.heads}).")
    _check_protocol(config, where)
    if isinstance(config, Blip2LlmConfig):
        _check_llm(config.llm, where)
    return config


def _kind_of(values: object) -> type[Config]:
    held = values if isinstance(values, dict) else {}
    if "llm" in held:
        return Blip2LlmConfig
    if "qformer" in held:
        return Blip2Config
    if "decoder" in held:
        return BlipVqaConfig if "text" in held else BlipCaptionConfig
    return BlipConfig


def _check_llm(llm: LlmConfig, where: str) -> None:
    if isinstance(llm, LlamaConfig) and llm.width // llm.heads % 2:
        raise UserError(f"{where}: llm.width / llm.heads is {llm.width // llm.heads}; rotated positions need an even number.")
    if isinstance(llm, T5Config) and llm.activation not in (GELU, GELU_TANH):
        raise UserError(f"{where}: llm.activation is {llm.activation!r}, expected {GELU!r} or {GELU_TANH!r}.")
    if isinstance(llm, T5Config) and not (llm.buckets % 4 == 0 and llm.farthest > llm.buckets // 2):
        raise UserError(
            f"{where}: llm.buckets is {llm.buckets} and llm.farthest {llm.farthest}; expected a multiple of 4, and more than "
            "half of it."
        )


def _check_protocol(config: Config, where: str) -> None:
    protocol = config.protocol
    if protocol.interpolation not in INTERPOLATIONS:
        raise UserError(f"{where}: protocol.interpolation is {protocol.interpolation!r}, expected {' or '.join(INTERPOLATIONS)}.")
    if min(protocol.std) <= 0:
        raise UserError(f"{where}: protocol.std must be above 0 in every channel, found {list(protocol.std)}.")
    if protocol.max_length < 3:
        raise UserError(f"{where}: protocol.max_length is {protocol.max_length}, but [CLS], a token and [SEP] take 3.")
    if protocol.max_length > (positions := config.text.positions):
        reader = next(field.name for field in dataclasses.fields(config) if getattr(config, field.name) is config.text)
        raise UserError(f"{where}: protocol.max_length is {protocol.max_length}, but {reader}.positions is only {positions}.")


def from_file(path: Path) -> Config:
    """Sizes typed by the user: a JSON file in the form of `to_dict`, whose fields with a default may be left out. Or those that
    a training has written into its weights (.safetensors)."""
    try:
        values = json.loads(_within(path) if path.suffix == SAFETENSORS else path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    return from_dict(values, str(path))


def _within(path: Path) -> str:
    """The sizes in the head of a file of weights, which is read alone: its length in 8 bytes, and JSON."""
    with path.open("rb") as file:
        head = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), LARGEST_HEAD)))
    about = head.get("__metadata__") if isinstance(head, dict) else None
    if not isinstance(about, dict) or "config" not in about:
        raise UserError(f"{path} says nothing of its sizes; only weights of blip-train do. Give a JSON file.")
    return str(about["config"])


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


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{where} must be true or false, found {value!r}.")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise UserError(f"{where} must be a text, found {value!r}.")
    return value


def _three(value: object, where: str) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise UserError(f"{where} must be three numbers, found {value!r}.")
    return tuple(_number(v, where) for v in value)


def _llm(value: object, where: str) -> LlmConfig:
    family = value.get("family") if isinstance(value, dict) else None
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{where}: family is {family!r}, expected one of {', '.join(FAMILIES)}.")
    found: LlmConfig = _read(FAMILIES[family], value, where)
    return found


_READERS: dict[str, Any] = {
    "bool": _flag,
    "int": _whole,
    "float": _positive,
    "str": _text,
    "tuple[float, float, float]": _three,
    "VisionConfig": lambda value, where: _read(VisionConfig, value, where),
    "TextConfig": lambda value, where: _read(TextConfig, value, where),
    "QformerConfig": lambda value, where: _read(QformerConfig, value, where),
    "LlmConfig": _llm,
    "Protocol": lambda value, where: _read(Protocol, value, where),
}
