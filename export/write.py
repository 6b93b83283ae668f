"""Checkpoint to graphs/: every graph written, simplified, checked, measured; the manifest last."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from export.graphs import module_for, random_inputs
from export.parity import Parity, cases_for, measure, refuse_beyond
from export.targets import ATC
from export.to_onnx import write_onnx
from models import manifest
from models.blip2 import Retrieval
from models.checkpoint import LoadReport, load_model
from models.config import Config, to_dict
from models.errors import Misuse
from models.spec import GraphSpec, graph_specs, spec_to_dict
from preprocess.text import CaptionTokenizer

TRACED = (2, 8)  # batch and length of the example inputs; both above 1, which the exporter would take for a constant
HEADER = f"{'graph':<12} {'output':<16} {'nodes':>6} {'MB':>9}  {'max abs':<7}  {'max rel':<7}  cases (batch, length)"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked of one export."""

    model: str  # a preset's name, or the file that --config named
    config: Config  # captions of a static graph have its protocol.max_length
    checkpoint: Path
    vit_checkpoint: Path | None  # of the image encoder, when `checkpoint` has none
    tokenizer: Path
    out: Path
    graphs: Sequence[str]
    target: str
    opset: int
    batchsize: int  # of a static graph


def write_graphs(options: Options, say: Callable[[str], None]) -> list[Parity]:
    """Write `options.out`; returns the measured differences. Raises UserError and leaves nothing when one is too large."""
    specs = wanted_specs(options)
    tokenizer = CaptionTokenizer.load(options.tokenizer, options.config)
    model, report = load_model(options.config, options.checkpoint, options.vit_checkpoint)
    for line in report.lines():
        say(line)
    say(HEADER)
    rows: list[Parity] = []
    with manifest.new_folder(options.out, "graphs") as folder:
        nodes = {}
        for spec in specs:
            nodes[spec.name] = _write_one(model, spec, folder, options, rows, say)
        refuse_beyond(rows)
        copied = folder / "tokenizer" / tokenizer.file.name
        copied.parent.mkdir()
        shutil.copyfile(tokenizer.file, copied)
        manifest.write(folder, "graphs", _content(options, specs, nodes, report, rows, tokenizer, copied.relative_to(folder)))
    return rows


def wanted_specs(options: Options) -> list[GraphSpec]:
    """The specs of the graphs asked for, their axes fixed for --target atc. Raises Misuse for an unknown name."""
    known = graph_specs(options.config)
    if unknown := [name for name in options.graphs if name not in known]:
        raise Misuse(f"There is no graph {unknown[0]!r}; known graphs: {', '.join(known)}.")
    specs = [spec for name, spec in known.items() if name in options.graphs]
    if options.target != ATC:
        return specs
    return [spec.bind(options.batchsize, options.config.protocol.max_length) for spec in specs]


def _write_one(
    model: Retrieval, spec: GraphSpec, folder: Path, options: Options, rows: list[Parity], say: Callable[[str], None]
) -> int:
    module, path = module_for(spec.name, model), folder / f"{spec.name}.onnx"
    max_length = options.config.protocol.max_length
    traced = (options.batchsize, max_length) if options.target == ATC else (TRACED[0], min(TRACED[1], max_length))
    nodes = write_onnx(module, spec, random_inputs(spec.name, model, *traced, seed=0), path, options.target, options.opset)
    measured = measure(model, module, spec, path, cases_for(spec, max_length))
    rows += measured
    for row in measured:
        size = sum(p.stat().st_size for p in folder.glob(f"{path.name}*"))
        say(f"{row.graph:<12} {row.output:<16} {nodes:>6} {size / 1e6:>9.1f}  {row.max_abs:.1e}  {row.max_rel:.1e}  {row.cases}")
    return nodes


def _content(
    options: Options,
    specs: list[GraphSpec],
    nodes: dict[str, int],
    report: LoadReport,
    rows: list[Parity],
    tokenizer: CaptionTokenizer,
    copied: Path,
) -> dict[str, object]:
    return {
        "model": options.model,
        "config": to_dict(options.config),
        "checkpoint": _checkpoint(report),
        "temperature": report.temperature,
        "target": options.target,
        "opset": options.opset,
        "precision": "float32",
        "graphs": {spec.name: {**spec_to_dict(spec), "file": f"{spec.name}.onnx", "nodes": nodes[spec.name]} for spec in specs},
        "tokenizer": {"file": copied.as_posix(), "sha256": tokenizer.sha256, "size": tokenizer.size},
        "parity": [dataclasses.asdict(row) for row in rows],
    }


def _checkpoint(report: LoadReport) -> dict[str, object]:
    found: dict[str, object] = {"file": report.path.name, "sha256": report.sha256, "layout": report.layout}
    if report.vit:
        found["vit"] = {"file": report.vit[0].name, "sha256": report.vit[1]}
    return found
