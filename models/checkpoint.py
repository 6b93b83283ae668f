"""Weights of others into our model, every tensor accounted for.

Three layouts, told by their tensors' names: the original `.pth` of salesforce/BLIP (`visual_encoder.*`, in a PyTorch
file), transformers' BlipForImageTextRetrieval (`vision_model.*`), and our own (the original names, in safetensors).
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from models.blip import BlipRetrieval
from models.config import PRESETS, BlipConfig, VisionConfig
from models.errors import UserError
from models.huggingface import huggingface_config, to_our_name, to_their_name
from models.weights_file import Weights, read_weights

ORIGINAL, HUGGINGFACE, OURS = "original", "huggingface", "ours"
LISTED = 10  # names in one message
POSITIONS = "visual_encoder.pos_embed"

# What a training run saves and retrieval does not need: pattern from the start of the name -> what it is.
IGNORED = {
    r"(visual_encoder|text_encoder|text_decoder|vision_proj|text_proj)_m\.": "momentum copies",
    r"(image|text|idx|ptr)_queue$|queue_ptr$": "training queues",
    r"temp$": "temperature",
    r"text_decoder\.": "text decoder",
    r".*\.position_ids$": "position ids",
    r"(optimizer|config|epoch|scaler)$": "records of the training run",
}

# Size in the configuration -> a tensor and the axis that shows it.
SIZES = {
    "vision.width": ("visual_encoder.cls_token", 2),
    "vision.patch": ("visual_encoder.patch_embed.proj.weight", 3),
    "vision.mlp": ("visual_encoder.blocks.0.mlp.fc1.weight", 0),
    "text.vocab": ("text_encoder.embeddings.word_embeddings.weight", 0),
    "text.width": ("text_encoder.embeddings.word_embeddings.weight", 1),
    "text.positions": ("text_encoder.embeddings.position_embeddings.weight", 0),
    "text.ffn": ("text_encoder.encoder.layer.0.intermediate.dense.weight", 0),
    "embed": ("vision_proj.weight", 0),
}
DEPTHS = {
    "vision.depth": r"visual_encoder\.blocks\.(\d{1,4})\.",
    "text.depth": r"text_encoder\.encoder\.layer\.(\d{1,4})\.",
}


@dataclass(frozen=True)
class LoadReport:
    """What became of everything that the checkpoint holds."""

    path: Path
    layout: str  # ORIGINAL, HUGGINGFACE or OURS
    sha256: str  # of the file; of several, of their hashes
    ignored: dict[str, int]  # what it is -> how many entries
    unexpected: tuple[str, ...]  # neither used nor known
    interpolated: tuple[int, int] | None  # pixels: the position embeddings were made for the first, now fit the second

    def lines(self) -> list[str]:
        """The report as the user reads it."""
        lines = [f"checkpoint {self.path} ({self.layout} layout, sha256 {self.sha256[:12]})"]
        if self.interpolated:
            lines.append("position embeddings interpolated from {} to {} pixels".format(*self.interpolated))
        if self.ignored:
            lines.append("ignored: " + ", ".join(f"{count} {what}" for what, count in self.ignored.items()))
        if self.unexpected:
            lines.append(f"unexpected, not used: {_listed(self.unexpected)}")
        return lines


def load_retrieval(config: BlipConfig, path: Path) -> tuple[BlipRetrieval, LoadReport]:
    """The model of `config` with the weights of `path`: float32, for inference, and what else the file held.

    float32 weights are not copied: they stay mapped from the file, which must not be written over in place while the
    model is used (replacing or removing it is fine). Raises UserError when the file cannot be read, is of another
    model, contradicts the sizes of `config`, or lacks, misshapes or spoils a tensor.
    """
    weights = read_weights(path)
    theirs = not _has(weights.tensors, "visual_encoder") and _has(weights.tensors, "vision_model")
    tensors = {to_our_name(name): t for name, t in weights.tensors.items()} if theirs else weights.tensors
    spell = to_their_name if theirs else str
    with torch.device("meta"):
        model = BlipRetrieval(config)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}

    _check_parts(path, weights, tensors, expected)
    _check_sizes(path, config, tensors)
    used = {name: tensors[name] for name in expected if name in tensors}
    interpolated = None
    if POSITIONS in used:
        used[POSITIONS], interpolated = fit_positions(used[POSITIONS], config.vision, path)
    problems = [p for name, shape in expected.items() if (p := _problem(spell(name), used.get(name), shape))]
    if problems:
        raise UserError(
            f"{path} does not fit the model: {_listed(problems, '; ')}. Give a complete checkpoint of BLIP for retrieval."
        )
    used = {name: t.detach().to(torch.float32).contiguous() for name, t in used.items()}
    _check_numbers(path, {spell(name): t for name, t in used.items()})

    model.load_state_dict(used, assign=True)
    ignored, unexpected = _account([spell(name) for name in tensors if name not in expected], weights.beside)
    layout = HUGGINGFACE if theirs else OURS if weights.safe else ORIGINAL
    return model.eval().requires_grad_(False), LoadReport(path, layout, weights.sha256(), ignored, unexpected, interpolated)


def to_huggingface(state: Mapping[str, Tensor], config: BlipConfig) -> dict[str, Tensor]:
    """Our tensors under the names of transformers' BlipForImageTextRetrieval.

    `state` is of BlipRetrieval, or of a model that holds more: what retrieval does not use is left out.
    """
    with torch.device("meta"):
        names = BlipRetrieval(config).state_dict().keys()
    return {to_their_name(name): state[name] for name in names}


def fit_positions(positions: Tensor, vision: VisionConfig, path: Path) -> tuple[Tensor, tuple[int, int] | None]:
    """Position embeddings (1, T, D) for the picture size of `vision`, and the sizes in pixels when they had another one.

    The class token's stays; the patches' are a picture that is resized (salesforce/BLIP models/vit.py,
    interpolate_pos_embed: bicubic, align_corners=False). Raises UserError when they are of no square picture.
    """
    if positions.dim() != 3 or not _is_plain(positions) or positions.shape[1] == vision.tokens:
        return positions, None  # what else may be wrong is reported with all the others
    side, wanted = isqrt(max(positions.shape[1] - 1, 0)), vision.image_size // vision.patch
    if side == 0 or side * side + 1 != positions.shape[1]:
        raise UserError(
            f"{path}: the position embeddings are for {positions.shape[1]} tokens, expected a square of patches and the "
            f"class token ({vision.image_size} pixels have {vision.tokens}). Give a checkpoint of BLIP."
        )
    cls, patches = positions[:, :1].to(torch.float32), positions[:, 1:].to(torch.float32)
    grid = patches.reshape(len(patches), side, side, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
    grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)  # (1, D, wanted, wanted)
    fitted = torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)  # (1, T, D)
    return fitted, (side * vision.patch, vision.image_size)


def _check_parts(path: Path, weights: Weights, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """A checkpoint of another model lacks whole parts: say so, instead of listing hundreds of names."""
    parts = dict.fromkeys(name.split(".")[0] for name in expected)
    lacking = [part for part in parts if not _has(tensors, part)]
    if not lacking:
        return
    held = dict.fromkeys(name.split(".")[0] for name in [*weights.tensors, *weights.beside])
    raise UserError(
        f"{path} is not a checkpoint of BLIP for retrieval: it has no {', '.join(lacking)}. "
        f"It holds {_listed(list(held)) or 'nothing'}. Give a retrieval checkpoint, such as model_base_retrieval_coco.pth."
    )


def _check_sizes(path: Path, config: BlipConfig, tensors: Mapping[str, Tensor]) -> None:
    found = _sizes(tensors)
    wrong = {size: held for size, held in found.items() if held != operator.attrgetter(size)(config)}
    if not wrong:
        return
    name = next((name for name, known in PRESETS.items() if known == config), "the configuration")
    listed = [
        f"{size}: the checkpoint has {held}, {name} has {operator.attrgetter(size)(config)}" for size, held in wrong.items()
    ]
    # Of the presets with these sizes, the one that follows the same protocol.
    fitting = [n for n, known in PRESETS.items() if all(operator.attrgetter(s)(known) == held for s, held in found.items())]
    fitting.sort(key=lambda n: PRESETS[n].protocol != config.protocol)
    advice = f"Try --model {fitting[0]}." if fitting else "Give its sizes with --config, or a checkpoint of this model."
    raise UserError(f"{path}: {'; '.join(listed)}. {advice}")


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes that the tensors show, as far as the telling ones are there. Heads leave no trace in a shape."""
    found = {}
    for size, (name, axis) in SIZES.items():
        if name in tensors and tensors[name].dim() > axis:
            found[size] = tensors[name].shape[axis]
    for size, pattern in DEPTHS.items():
        layers = [int(match[1]) for name in tensors if (match := re.match(pattern, name))]
        if layers:
            found[size] = max(layers) + 1
    return found


def _problem(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> str | None:
    if tensor is None:
        return f"{name} is missing"
    if tuple(tensor.shape) != shape:
        return f"{name} is {tuple(tensor.shape)}, expected {shape}"
    if not _is_plain(tensor):
        kind = f"{tensor.dtype} {tensor.layout} on {tensor.device}".replace("torch.", "")
        return f"{name} holds {kind}, expected floating-point numbers"
    return None


def _is_plain(tensor: Tensor) -> bool:
    """Floating-point numbers in memory: not whole numbers, not sparse, not a shape without content."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and tensor.device.type == "cpu"


def _check_numbers(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # A sum is finite only if all its terms are, and needs no second tensor. It may overflow, so look again.
    bad = [name for name, t in tensors.items() if not bool(t.sum().isfinite()) and not bool(t.isfinite().all())]
    if bad:
        raise UserError(
            f"{path} holds NaN or infinity in {_listed(bad)}. Its training failed or the file is damaged; use another one."
        )


def _account(unused: Sequence[str], beside: Sequence[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """What was not used: known for what it is, or unexpected."""
    ignored: Counter[str] = Counter()
    unexpected = []
    for name in [*unused, *beside]:
        if what := next((what for pattern, what in IGNORED.items() if re.match(pattern, name)), None):
            ignored[what] += 1
        else:
            unexpected.append(name)
    return dict(ignored), tuple(unexpected)


def _has(tensors: Mapping[str, Tensor], part: str) -> bool:
    return any(name.startswith(part + ".") for name in tensors)


def _listed(names: Sequence[str], comma: str = ", ") -> str:
    more = f"{comma}and {len(names) - LISTED} more ({len(names)} in all)" if len(names) > LISTED else ""
    # Names come from the file: one with line breaks or terminal codes is shown quoted.
    return comma.join(name if name.isprintable() else repr(name) for name in names[:LISTED]) + more


__all__ = ["LoadReport", "huggingface_config", "load_retrieval", "to_huggingface"]
