"""Weights of others into our model, every tensor accounted for. The layouts they come in: models/layouts.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.blip import BlipRetrieval
from models.blip2 import Blip2Retrieval, Blip2Stage1, Retrieval
from models.config import Blip2Config, Config
from models.fit import Shape, check_model, check_numbers, check_shapes, shapes_of, shared_out, temperature_of
from models.huggingface import KEYS
from models.layouts import ENCODER, IGNORED, Source, known_as, open_checkpoint, open_image_encoder, with_image_encoder
from models.positions import NAMES as POSITIONS
from models.positions import fit_positions
from models.weights_file import aligned, is_plain, listed


@dataclass(frozen=True)
class LoadReport:
    """What became of everything that the checkpoint holds."""

    path: Path
    layout: str  # models.layouts: ORIGINAL, LAVIS, HUGGINGFACE, MINDSPORE or OURS
    sha256: str  # of the file; of several, of their hashes
    ignored: dict[str, int]  # what it is -> how many entries
    unexpected: tuple[str, ...]  # neither used nor known
    interpolated: tuple[int, int] | None  # pixels: the position embeddings were made for the first, now fit the second
    temperature: float | None  # that similarities are divided by, None when the checkpoint does not say
    vit: tuple[Path, str] | None  # the file of the image encoder and its sha256, where it is one of its own
    notes: tuple[str, ...]  # what else there is to say

    def lines(self) -> list[str]:
        """The report as the user reads it."""
        lines = [f"checkpoint {self.path} ({self.layout} layout, sha256 {self.sha256[:12]})"]
        if self.vit:
            lines.append(f"image encoder {self.vit[0]} (sha256 {self.vit[1][:12]})")
        lines += self.notes
        if self.interpolated:
            lines.append("position embeddings interpolated from {} to {} pixels".format(*self.interpolated))
        if self.temperature is not None:
            lines.append(f"temperature {self.temperature:.4g}")
        if self.ignored:
            lines.append("ignored: " + ", ".join(f"{count} {what}" for what, count in self.ignored.items()))
        if self.unexpected:
            lines.append(f"unexpected, not used: {listed(self.unexpected)}")
        return lines


def load_model(config: Config, path: Path, vit_checkpoint: Path | None = None) -> tuple[Retrieval, LoadReport]:
    """The model of `config` with the weights of `path`: float32, for inference, and what else the file held.

    BLIP-2's image encoder may lie in a file of its own, `vit_checkpoint`. float32 weights are not copied: they stay mapped
    from the file, which must not be written over in place while the model is used (replacing or removing it is fine).
    Raises UserError when a file cannot be read, is of another model, contradicts the sizes of `config`, or lacks,
    misshapes or spoils a tensor; Misuse when there are two image encoders.
    """
    with torch.device("meta"):
        model: Retrieval = Blip2Retrieval(config) if isinstance(config, Blip2Config) else BlipRetrieval(config)
    return model, _fill(model, config, path, vit_checkpoint)


def load_stage1(config: Blip2Config, path: Path, vit_checkpoint: Path | None = None) -> tuple[Blip2Stage1, LoadReport]:
    """The same with the head over the vocabulary and the temperature, as BLIP-2's first stage is trained."""
    with torch.device("meta"):
        model = Blip2Stage1(config)
    return model, _fill(model, config, path, vit_checkpoint)


def load_image_encoder(model: Blip2Stage1, path: Path) -> LoadReport:
    """Fill the image encoder of `model` from a file that holds one alone. Raises UserError as `load_model` does."""
    encoder = {name: shape for name, shape in shapes_of(model).items() if name.startswith(ENCODER)}
    source = open_image_encoder(path, model.cfg)
    tensors, interpolated = _read(source, model.cfg, encoder)
    model.load_state_dict(tensors, strict=False)
    return _report([source], encoder, interpolated)


def _fill(model: Retrieval, config: Config, path: Path, vit_checkpoint: Path | None) -> LoadReport:
    expected = shapes_of(model)
    sources = with_image_encoder(open_checkpoint(path), vit_checkpoint, config)
    used: dict[str, Tensor] = {}
    interpolated = None
    for source, its_own in zip(sources, shared_out(expected, sources), strict=True):
        tensors, resized = _read(source, config, its_own)
        used |= tensors
        interpolated = resized or interpolated
    model.load_state_dict(used, assign=True)
    model.eval().requires_grad_(False)
    return _report(sources, expected, interpolated)


def _report(sources: list[Source], expected: Iterable[str], interpolated: tuple[int, int] | None) -> LoadReport:
    main, vit = sources[0], sources[1] if len(sources) > 1 else None
    ignored, unexpected = _account(sources, expected)
    return LoadReport(
        path=main.path,
        layout=main.layout,
        sha256=main.weights.sha256(),
        ignored=ignored,
        unexpected=unexpected,
        interpolated=interpolated,
        temperature=temperature_of(main),
        vit=(vit.path, vit.weights.sha256()) if vit else None,
        notes=tuple(note for source in sources for note in source.notes),
    )


def _read(source: Source, config: Config, expected: Mapping[str, Shape]) -> tuple[dict[str, Tensor], tuple[int, int] | None]:
    """The expected tensors, checked, in float32; and the sizes in pixels when the position embeddings had another one."""
    check_model(source, config, expected)
    tensors = {name: aligned(source.tensors[name]) for name in expected if name in source.tensors}
    interpolated = None
    for name in tensors.keys() & set(POSITIONS):
        tensors[name], interpolated = fit_positions(tensors[name], config.vision, source.path)
    check_shapes(source, config, expected, tensors)
    tensors = {name: t.detach().to(torch.float32).contiguous() for name, t in tensors.items()}
    keys = ((name, aligned(tensor)) for name, tensor in source.tensors.items() if name.endswith(KEYS) and is_plain(tensor))
    check_numbers(source, [*tensors.items(), *keys])  # a bias of keys changes no result as long as it is a number
    return tensors, interpolated


def _account(sources: Iterable[Source], used: Iterable[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """What is not `used`: known for what it is, or unexpected."""
    ignored: Counter[str] = Counter()
    unexpected, known = [], {*used, "temp"}
    for source in sources:
        for name in [*(name for name in source.tensors if name not in known), *source.weights.beside]:
            if what := known_as(name, IGNORED):
                ignored[what] += 1
            else:
                unexpected.append(source.spell(name))
        ignored.update(source.left)
    return dict(ignored), tuple(unexpected)
