"""Whether a checkpoint fits a model: its parts, its sizes, every tensor, every number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.blip import BlipRetrieval
from models.blip2 import Blip2Retrieval
from models.config import Blip2Config, Config
from models.errors import UserError
from models.layouts import ENCODER, HUGGINGFACE, WORDS, Source, has
from models.sizes import check_sizes
from models.weights_file import is_plain, listed

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Wanted:
    """What a file is to hold, for messages, and the name of a published one."""

    what: str
    such: str


BLIP = Wanted("BLIP for retrieval", "model_base_retrieval_coco.pth")
BLIP2 = Wanted("BLIP-2's first stage", "blip2_pretrained.pth")
ENCODER_ALONE = Wanted("BLIP-2's image encoder", "eva_vit_g.pth")


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """The tensors that a model consists of."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def retrieval_shapes(config: Config) -> dict[str, Shape]:
    """The tensors that retrieval with a model of `config` needs."""
    with torch.device("meta"):
        return shapes_of(Blip2Retrieval(config) if isinstance(config, Blip2Config) else BlipRetrieval(config))


def shared_out(expected: Mapping[str, Shape], sources: list[Source]) -> list[dict[str, Shape]]:
    """What is expected of each source: of the second, when there are two, the image encoder."""
    if len(sources) == 1:
        return [dict(expected)]
    encoder = {name: shape for name, shape in expected.items() if name.startswith(ENCODER)}
    return [{name: shape for name, shape in expected.items() if name not in encoder}, encoder]


def check_model(source: Source, config: Config, expected: Mapping[str, Shape]) -> None:
    """Raises UserError when the source is of another model, or lacks whole parts, or shows other sizes than `config`."""
    wanted = wanted_of(config, expected)
    if isinstance(config, Blip2Config):
        _refuse_without_head(source, expected)
    _check_parts(source, expected, wanted)
    check_sizes(source.path, config, source.tensors)


def check_shapes(source: Source, config: Config, expected: Mapping[str, Shape], tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError when one of `tensors`, made from the source's, is missing, misshaped or holds no numbers."""
    found = [p for name, shape in expected.items() if (p := _problem(source.spell(name), tensors.get(name), shape))]
    if found:
        raise UserError(
            f"{source.path} does not fit the model: {listed(found, '; ')}. "
            f"Give a complete checkpoint of {wanted_of(config, expected).what}."
        )


def check_numbers(source: Source, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises UserError when one of `tensors` holds NaN or infinity."""
    # A sum is finite only if all its terms are, and needs no second tensor. It may overflow, so look again.
    bad = [name for name, t in tensors if not bool(t.sum().isfinite()) and not bool(t.isfinite().all())]
    if bad:
        raise UserError(
            f"{source.path} holds NaN or infinity in {listed([source.spell(name) for name in bad])}. "
            "Its training failed or the file is damaged; use another one."
        )


def wanted_of(config: Config, expected: Mapping[str, Shape]) -> Wanted:
    """What a file is called of which these tensors are expected."""
    if not isinstance(config, Blip2Config):
        return BLIP
    return BLIP2 if WORDS in expected else ENCODER_ALONE


def temperature_of(source: Source) -> float | None:
    """What the checkpoint divides similarities by; None when it does not say."""
    held = source.tensors.get("temp")
    if held is None:
        return None
    value = float(held) if held.numel() == 1 and is_plain(held) else float("nan")
    if not 0 < value < float("inf"):
        said = f"{value:.4g}" if held.numel() == 1 else str(tuple(held.shape))
        raise UserError(f"{source.path}: temp, the temperature, is {said}, expected one number above 0. Use another checkpoint.")
    return value


def _check_parts(source: Source, expected: Mapping[str, Shape], wanted: Wanted) -> None:
    """A checkpoint of another model lacks whole parts: say so, instead of listing hundreds of names."""
    parts = dict.fromkeys(name.split(".")[0] for name in expected)
    lacking = [part for part in parts if not has(source.tensors, part)]
    if not lacking:
        return
    held = list(dict.fromkeys(name.split(".")[0] for name in [*source.weights.tensors, *source.weights.beside]))
    raise UserError(
        f"{source.path} is not a checkpoint of {wanted.what}: it has no {', '.join(lacking)}. "
        f"It holds {listed(held) or 'nothing'}. Give one, such as {wanted.such}."
    )


def _refuse_without_head(source: Source, expected: Mapping[str, Shape]) -> None:
    if source.layout == HUGGINGFACE and "temp" in expected and "temp" not in source.tensors:
        raise UserError(
            f"{source.path} has neither a head over the vocabulary nor a temperature: Hugging Face's layout has no place for "
            f"them. Give LAVIS's checkpoint, such as {BLIP2.such}."
        )


def _problem(name: str, tensor: Tensor | None, shape: Shape) -> str | None:
    if tensor is None:
        return f"{name} is missing"
    if tuple(tensor.shape) != shape:
        return f"{name} is {tuple(tensor.shape)}, expected {shape}"
    if not is_plain(tensor):
        kind = f"{tensor.dtype} {tensor.layout} on {tensor.device}".replace("torch.", "")
        return f"{name} holds {kind}, expected floating-point numbers"
    return None
