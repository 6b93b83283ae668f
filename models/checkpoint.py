"""Weights of others into our model, every tensor accounted for. The layouts they come in: models/layouts.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models.blip2 import Blip2Stage1, Retrieval
from models.blip2_llm import Blip2Llm
from models.config import Blip2Config, Blip2LlmConfig, BlipCaptionConfig, Config, GenerationConfig, RetrievalConfig
from models.errors import Misuse
from models.fit import (
    Generator,
    Shape,
    check_model,
    check_numbers,
    check_shapes,
    generator_of,
    retrieval_of,
    shapes_of,
    shared_out,
    temperature_of,
)
from models.huggingface import KEYS
from models.layouts import (
    ENCODER,
    IGNORED,
    IGNORED_BY_CAPTIONS,
    IGNORED_BY_RETRIEVAL,
    WORDS,
    Source,
    has,
    known_as,
    open_checkpoint,
    open_image_encoder,
    with_decoder,
    with_image_encoder,
)
from models.llm_checkpoint import LLM, check_config_json, open_language_model, open_stage2
from models.positions import NAMES as POSITIONS
from models.positions import fit_positions
from models.stored import HALVES
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
    llm: tuple[Path, str] | None  # the same of the language model
    notes: tuple[str, ...]  # what else there is to say

    def lines(self) -> list[str]:
        """The report as the user reads it."""
        lines = [f"checkpoint {self.path} ({self.layout} layout, sha256 {self.sha256[:12]})"]
        if self.vit:
            lines.append(f"image encoder {self.vit[0]} (sha256 {self.vit[1][:12]})")
        if self.llm:
            lines.append(f"language model {self.llm[0]} (sha256 {self.llm[1][:12]})")
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
    misshapes or spoils a tensor; Misuse when there are two image encoders, or when `config` is of a model that writes words.
    """
    with torch.device("meta"):
        model = retrieval_of(config)
    return model, _fill(model, config, with_image_encoder(open_checkpoint(path), vit_checkpoint, config))


def load_stage1(config: Blip2Config, path: Path, vit_checkpoint: Path | None = None) -> tuple[Blip2Stage1, LoadReport]:
    """The same with the head over the vocabulary and the temperature, as BLIP-2's first stage is trained."""
    with torch.device("meta"):
        model = Blip2Stage1(config)
    return model, _fill(model, config, with_image_encoder(open_checkpoint(path), vit_checkpoint, config))


def load_generator(
    config: GenerationConfig,
    path: Path,
    vit_checkpoint: Path | None = None,
    llm_checkpoint: Path | None = None,
    begins: bool = False,
) -> tuple[Generator, LoadReport]:
    """The same of a model that writes words, whose language model may lie in a folder of its own, `llm_checkpoint`.

    A language model keeps the precision it is stored in, so that it stays mapped from its file: run it within
    `models.stored.compute_in_float32`. All else is float32. `begins`: see `models.fit.check_model`. Raises UserError and Misuse
    as `load_model` does, and UserError when the config.json of the language model contradicts `config`.
    """
    if llm_checkpoint and not isinstance(config, Blip2LlmConfig):
        raise Misuse(f"--llm-checkpoint is for BLIP-2's second stage: a checkpoint of BLIP, as {path} should be, holds all.")
    with torch.device("meta"):
        model = generator_of(config)
    main, others = open_checkpoint(path), list[Source]()
    if isinstance(config, Blip2LlmConfig):
        main, others = open_stage2(main, config, llm_checkpoint)
    else:
        main = with_decoder(main, shapes_of(model))
    return model, _fill(model, config, [*with_image_encoder(main, vit_checkpoint, config), *others], begins)


def begin_stage2(
    config: Blip2LlmConfig, path: Path, vit_checkpoint: Path | None, llm_checkpoint: Path
) -> tuple[Blip2Llm, LoadReport] | None:
    """The second stage as its training begins: the first stage in `path`, a language model, and a projection of random numbers
    between them (torch's own, as in LAVIS). None when `path` is of no first stage. Raises as `load_generator`."""
    held = open_checkpoint(path).tensors
    if has(held, "llm_proj") or not has(held, "itm_head") or WORDS not in held:
        return None
    words, places = (held[f"Qformer.bert.embeddings.{name}_embeddings.weight"].shape[0] for name in ("word", "position"))
    qformer = replace(config.qformer, vocab=words, positions=places)
    first, report = load_stage1(Blip2Config(config.vision, qformer, held["vision_proj.weight"].shape[0]), path, vit_checkpoint)
    with torch.device("meta"):
        model = Blip2Llm(config)
    language = open_language_model(llm_checkpoint, config.llm)
    wanted = {name: shape for name, shape in shapes_of(model).items() if name.startswith(LLM)}
    check_model(language, config, wanted)
    check_config_json(language, config.llm)
    tensors, _ = _read(language, config, wanted)
    model.llm_proj = nn.Linear(model.llm_proj.in_features, model.llm_proj.out_features)
    tensors |= {name: tensor for name, tensor in first.state_dict().items() if name in shapes_of(model)}
    tensors |= {f"llm_proj.{name}": tensor for name, tensor in model.llm_proj.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    model.eval().requires_grad_(False)
    notes = (*report.notes, *language.notes, "the projection into the language model is new")
    return model, replace(report, llm=(language.path, language.weights.sha256()), notes=notes, temperature=None)


def load_image_encoder(model: Blip2Stage1, path: Path) -> LoadReport:
    """Fill the image encoder of `model` from a file that holds one alone. Raises UserError as `load_model` does."""
    encoder = {name: shape for name, shape in shapes_of(model).items() if name.startswith(ENCODER)}
    source = open_image_encoder(path, model.cfg)
    check_model(source, model.cfg, encoder)
    tensors, interpolated = _read(source, model.cfg, encoder)
    model.load_state_dict(tensors, strict=False)
    return _report([source], model.cfg, encoder, interpolated)


def _fill(model: Retrieval | Generator, config: Config, sources: list[Source], begins: bool = False) -> LoadReport:
    expected = shapes_of(model)
    parts = list(zip(sources, shared_out(expected, sources), strict=True))
    for source, its_own in parts:  # before any number is read
        check_model(source, config, its_own, begins)
        if isinstance(config, Blip2LlmConfig) and any(name.startswith(LLM) for name in its_own):
            check_config_json(source, config.llm)
    used: dict[str, Tensor] = {}
    interpolated = None
    for source, its_own in parts:
        tensors, resized = _read(source, config, its_own)
        used |= tensors
        interpolated = resized or interpolated
    model.load_state_dict(used, assign=True)
    model.eval().requires_grad_(False)
    return _report(sources, config, expected, interpolated)


def _report(sources: list[Source], config: Config, expected: Iterable[str], interpolated: tuple[int, int] | None) -> LoadReport:
    main = sources[0]
    hashes = {source.part: (source.path, source.weights.sha256()) for source in sources}
    ignored, unexpected = _account(sources, config, expected)
    return LoadReport(
        path=main.path,
        layout=main.layout,
        sha256=hashes[main.part][1],
        ignored=ignored,
        unexpected=unexpected,
        interpolated=interpolated,
        temperature=temperature_of(main) if isinstance(config, RetrievalConfig) else None,
        vit=hashes.get(ENCODER) if len(sources) > 1 else None,
        llm=hashes.get(LLM),
        notes=tuple(note for source in sources for note in source.notes),
    )


def _read(source: Source, config: Config, expected: Mapping[str, Shape]) -> tuple[dict[str, Tensor], tuple[int, int] | None]:
    """The expected tensors, checked, in float32 or as a language model stores them; and the sizes in pixels when the position
    embeddings had another one."""
    tensors = {name: aligned(source.tensors[name]) for name in expected if name in source.tensors}
    interpolated = None
    for name in tensors.keys() & set(POSITIONS):
        tensors[name], interpolated = fit_positions(tensors[name], config.vision, source.path)
    check_shapes(source, config, expected, tensors)
    tensors = {name: t.detach().to(_precision(name, t)).contiguous() for name, t in tensors.items()}
    keys = ((name, aligned(tensor)) for name, tensor in source.tensors.items() if name.endswith(KEYS) and is_plain(tensor))
    check_numbers(source, [*tensors.items(), *keys])  # a bias of keys changes no result as long as it is a number
    return tensors, interpolated


def _precision(name: str, tensor: Tensor) -> torch.dtype:
    return tensor.dtype if name.startswith(LLM) and tensor.dtype in HALVES else torch.float32


def _account(sources: Iterable[Source], config: Config, used: Iterable[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """What is not `used`: known for what it is, or unexpected."""
    table, known = IGNORED, {*used}
    if isinstance(config, RetrievalConfig):
        table, known = IGNORED_BY_RETRIEVAL, known | {"temp"}
    elif isinstance(config, BlipCaptionConfig):
        table = IGNORED_BY_CAPTIONS
    ignored: Counter[str] = Counter()
    unexpected = []
    for source in sources:
        for name in [*(name for name in source.tensors if name not in known), *source.weights.beside]:
            if what := known_as(name, table):
                ignored[what] += 1
            else:
                unexpected.append(source.spell(name))
        ignored.update(source.left)
    return dict(ignored), tuple(unexpected)
