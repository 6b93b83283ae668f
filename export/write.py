"""Checkpoint to graphs/: every graph written, simplified, checked, measured; the manifest last."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from export import fp16_audit, sizes
from export.calibration import feeds_for, read_pictures
from export.fp16_audit import Audit, audit, write_lists
from export.graphs import module_for
from export.parity import Parity, bound_of, cases_for, cases_opened, measure, refuse_beyond
from export.random_scene import Model
from export.sizes import Sizes
from export.targets import ASCEND, STATIC
from export.to_onnx import traced, write_onnx
from models import manifest
from models.checkpoint import LoadReport, load_generator, load_model
from models.config import Blip2LlmConfig, Config, RetrievalConfig
from models.config_file import to_dict
from models.errors import Misuse
from models.generation_spec import BEAMS, SLOTS
from models.spec import GraphSpec, graph_specs, spec_to_dict
from preprocess.text import CaptionTokenizer
from preprocess.words import Words, load_words

HEADER = f"{'graph':<16} {'output':<16} {'nodes':>6} {'MB':>9}  {'max abs':<7}  {'max rel':<7}  cases (batch, length)"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked of one export."""

    model: str  # a preset's name, or the file that --config named
    config: Config  # texts of a static graph have its protocol.max_length
    checkpoint: Path
    vit_checkpoint: Path | None  # of the image encoder, when `checkpoint` has none
    llm_checkpoint: Path | None  # of the language model, when `checkpoint` has none
    tokenizer: Path
    out: Path
    graphs: Sequence[str]
    target: str
    opset: int
    batchsize: int = 1  # of a static graph
    beams: int = 1  # sequences of each prompt, of a static graph
    slots: int | None = None  # of the buffer of a static graph; None for as many as usual
    rewrites: Sequence[str] = ()  # of export.targets.REWRITES, of a static graph
    audit: bool = False  # whether float16 is tried on static graphs
    calibration: Path | None = None  # pictures for it
    open_length: bool = False  # whether texts of graphs for ASCEND may have any length up to protocol.max_length

    @property
    def is_static(self) -> bool:
        """Whether graphs that write words have a buffer that the caller fills."""
        return self.target in STATIC


def write_graphs(options: Options, say: Callable[[str], None]) -> list[Parity]:
    """Write `options.out`; returns the measured differences. Raises UserError and leaves nothing when one is too large."""
    fixed = sizes.fixed(options.config, options.batchsize, options.beams, options.slots) if options.is_static else None
    specs = wanted_specs(options)
    words = _words(options)
    model, report = _load(options)
    for line in report.lines():
        say(line)
    pictures = read_pictures(options.calibration, options.config) if options.calibration else None
    say(HEADER)
    rows: list[Parity] = []
    audits: list[Audit] = []
    with manifest.new_folder(options.out, "graphs") as folder:
        written = {}
        for spec in specs:
            written[spec.name] = _write_one(model, spec, fixed, folder, options, rows, say)
            if fixed and options.audit:
                feeds = feeds_for(spec.name, model, sizes.of_graph(fixed, spec.name), pictures)
                audits.append(audit(spec.name, folder / f"{spec.name}.onnx", feeds))
        refuse_beyond(rows)
        if audits:
            write_lists(folder, audits)
            for line in [fp16_audit.HEADER, *(line for each in audits for line in each.lines())]:
                say(line)
        tokenizer = _copied(words, folder)
        manifest.write(folder, "graphs", _content(options, fixed, written, tokenizer, report, rows))
    return rows


def wanted_specs(options: Options) -> list[GraphSpec]:
    """The specs of the graphs asked for, their axes symbolic. Raises Misuse for an unknown name."""
    known = graph_specs(options.config, static=options.is_static)
    if unknown := [name for name in options.graphs if name not in known]:
        raise Misuse(f"There is no graph {unknown[0]!r}; known graphs: {', '.join(known)}.")
    return [spec for name, spec in known.items() if name in options.graphs]


def _load(options: Options) -> tuple[Model, LoadReport]:
    config = options.config
    if not isinstance(config, RetrievalConfig):
        return load_generator(config, options.checkpoint, options.vit_checkpoint, options.llm_checkpoint)
    if options.llm_checkpoint:
        raise Misuse("--llm-checkpoint is for BLIP-2's second stage; this model has no language model.")
    return load_model(config, options.checkpoint, options.vit_checkpoint)


def _words(options: Options) -> CaptionTokenizer | Words:
    config = options.config
    if isinstance(config, RetrievalConfig):
        return CaptionTokenizer.load(options.tokenizer, config)
    kind = config.llm.family if isinstance(config, Blip2LlmConfig) else "bert"
    return load_words(options.tokenizer, kind, config.text.vocab, config.protocol.max_length)


def _write_one(
    model: Model,
    spec: GraphSpec,
    fixed: Sizes | None,
    folder: Path,
    options: Options,
    rows: list[Parity],
    say: Callable[[str], None],
) -> dict[str, object]:
    """Write and measure a graph; returns what the manifest says of it."""
    module, path = module_for(spec.name, model, static=fixed is not None), folder / f"{spec.name}.onnx"
    if fixed:
        fixed = sizes.of_graph(fixed, spec.name)
        example, cases = fixed.bind(spec), [fixed] * 2
        if options.target == ASCEND:
            spec = fixed.opened(spec, options.open_length)
            cases = cases_opened(spec, fixed)
        else:
            spec = example
    else:
        example, cases = sizes.traced(options.config).bind(spec), cases_for(spec, options.config)
    inputs = blank_inputs(example)
    nodes = write_onnx(module, spec, inputs, path, options.target, options.opset, options.rewrites)
    measured = measure(model, module, spec, path, cases, bound_of(spec.name, options.rewrites))
    rows += measured
    size = sum(p.stat().st_size for p in folder.glob(f"{path.name}*"))
    for row in _worst_of_layers(measured):
        said = f"{row.max_abs:.1e}  {row.max_rel:.1e}  {row.cases}"
        say(f"{row.graph:<16} {row.output:<16} {nodes:>6} {size / 1e6:>9.1f}  {said}")
    content = {**spec_to_dict(spec), "file": path.name, "nodes": nodes}
    if not options.rewrites:
        return content
    plain = len(traced(module, spec, inputs, options.target, options.opset)[0].graph.node)
    say(f"{spec.name:<16} {', '.join(options.rewrites)}: {nodes} nodes, {plain} without")
    return {**content, "nodes_without_rewrites": plain}


def blank_inputs(spec: GraphSpec) -> dict[str, torch.Tensor]:
    """Zeros for a graph whose axes are all numbers; tracing looks at their shapes."""
    shapes = {t.name: [int(size) for size in t.shape] for t in spec.inputs}
    return {t.name: torch.zeros(shapes[t.name], dtype=getattr(torch, t.dtype)) for t in spec.inputs}


def _worst_of_layers(rows: Sequence[Parity]) -> list[Parity]:
    """One row for all of present.0.key, present.0.value, present.1.key, ..."""
    worst: dict[str, Parity] = {}
    for row in rows:
        name, dot, _ = row.output.partition(".")
        before = worst.setdefault(name + (".*" if dot else ""), row)
        worst[name + (".*" if dot else "")] = row if not row.max_rel <= before.max_rel else before
    return [dataclasses.replace(row, output=name) for name, row in worst.items()]


def _copied(words: CaptionTokenizer | Words, folder: Path) -> dict[str, object]:
    """Copy the vocabulary beside the graphs; returns what the manifest says of it."""
    files = (words.file,) if isinstance(words, CaptionTokenizer) else words.files
    (folder / "tokenizer").mkdir()
    for file in files:
        shutil.copyfile(file, folder / "tokenizer" / file.name)
    names = [f"tokenizer/{file.name}" for file in files]
    return {"file": names[0], "files": names, "sha256": words.sha256, "size": words.size}


def _content(
    options: Options,
    fixed: Sizes | None,
    graphs: dict[str, dict[str, object]],
    tokenizer: dict[str, object],
    report: LoadReport,
    rows: list[Parity],
) -> dict[str, object]:
    return {
        "model": options.model,
        "config": to_dict(options.config),
        "checkpoint": _checkpoint(report),
        "temperature": report.temperature,
        "target": options.target,
        **({"sizes": _said(fixed, options.target)} if fixed else {}),
        **({"rewrites": list(options.rewrites)} if options.rewrites else {}),
        "opset": options.opset,
        "precision": "float32",
        "graphs": graphs,
        "tokenizer": tokenizer,
        "parity": [dataclasses.asdict(row) for row in rows],
    }


def _said(fixed: Sizes, target: str) -> dict[str, int]:
    named = {"length": fixed.length} if target == ASCEND else {"batchsize": fixed.batch, "length": fixed.length}
    return named | {name: fixed.others[at] for name, at in (("beams", BEAMS), ("slots", SLOTS)) if at in fixed.others}


def _checkpoint(report: LoadReport) -> dict[str, object]:
    found: dict[str, object] = {"file": report.path.name, "sha256": report.sha256, "layout": report.layout}
    for part, file in (("vit", report.vit), ("llm", report.llm)):
        if file:
            found[part] = {"file": file[0].name, "sha256": file[1]}
    return found
