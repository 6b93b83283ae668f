"""Checkpoint to graphs/: every graph written, simplified, checked, measured; the manifest last."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from export.graphs import module_for, random_inputs
from export.parity import Parity, cases_for, measure, refuse_beyond
from export.to_onnx import ATC, write_onnx
from models import manifest
from models.blip import BlipRetrieval
from models.checkpoint import LoadReport, load_retrieval
from models.config import BlipConfig, to_dict
from models.errors import Misuse, UserError
from models.spec import GraphSpec, graph_specs, spec_to_dict
from preprocess.text import CaptionTokenizer

TRACED = (2, 8)  # batch and length of the example inputs; both above 1, which the exporter would take for a constant


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is asked of one export."""

    model: str  # a preset's name, or the file that --config named
    config: BlipConfig
    checkpoint: Path
    tokenizer: Path
    out: Path
    graphs: Sequence[str]
    target: str
    opset: int
    batchsize: int  # of a static graph
    length: int  # of a static graph


def write_graphs(plan: Plan, say: Callable[[str], None]) -> list[Parity]:
    """Write `plan.out`; returns the measured differences. Raises UserError and leaves nothing when one is too large."""
    specs = wanted_specs(plan)
    tokenizer = CaptionTokenizer.load(plan.tokenizer, plan.config.protocol)
    if tokenizer.size != plan.config.text.vocab:
        raise UserError(
            f"{tokenizer.file} gives {tokenizer.size} ids with [DEC] and [ENC], but {plan.model} has a vocabulary of "
            f"{plan.config.text.vocab}. Use the vocabulary that the checkpoint was trained with."
        )
    blip, report = load_retrieval(plan.config, plan.checkpoint)
    for line in report.lines():
        say(line)
    rows: list[Parity] = []
    with manifest.new_folder(plan.out, "graphs") as folder:
        nodes = {}
        for spec in specs:
            nodes[spec.name] = _write_one(blip, spec, folder, plan, rows, say)
        refuse_beyond(rows)
        copied = folder / "tokenizer" / tokenizer.file.name
        copied.parent.mkdir()
        shutil.copyfile(tokenizer.file, copied)
        manifest.write(folder, "graphs", _content(plan, specs, nodes, report, rows, tokenizer, copied.relative_to(folder)))
    return rows


def wanted_specs(plan: Plan) -> list[GraphSpec]:
    """The specs of the graphs asked for, their axes fixed for --target atc. Raises Misuse for an unknown name."""
    known = graph_specs(plan.config)
    if unknown := [name for name in plan.graphs if name not in known]:
        raise Misuse(f"There is no graph {unknown[0]!r}; known graphs: {', '.join(known)}.")
    specs = [spec for name, spec in known.items() if name in plan.graphs]
    return [spec.bind(plan.batchsize, plan.length) for spec in specs] if plan.target == ATC else specs


def _write_one(
    blip: BlipRetrieval, spec: GraphSpec, folder: Path, plan: Plan, rows: list[Parity], say: Callable[[str], None]
) -> int:
    module, path = module_for(spec.name, blip), folder / f"{spec.name}.onnx"
    traced = (plan.batchsize, plan.length) if plan.target == ATC else TRACED
    nodes = write_onnx(module, spec, random_inputs(spec.name, blip, *traced, seed=0), path, plan.target, plan.opset)
    max_length = plan.length if plan.target == ATC else plan.config.protocol.max_length
    measured = measure(blip, module, spec, path, cases_for(spec, max_length))
    rows += measured
    for row in measured:
        size = sum(p.stat().st_size for p in folder.glob(f"{path.name}*"))
        say(f"{row.graph:<12} {row.output:<12} {nodes:>6} {size / 1e6:>9.1f}  {row.max_abs:.1e}  {row.max_rel:.1e}  {row.cases}")
    return nodes


def _content(
    plan: Plan,
    specs: list[GraphSpec],
    nodes: dict[str, int],
    report: LoadReport,
    rows: list[Parity],
    tokenizer: CaptionTokenizer,
    copied: Path,
) -> dict[str, object]:
    return {
        "model": plan.model,
        "config": to_dict(plan.config),
        "checkpoint": {"file": report.path.name, "sha256": report.sha256, "layout": report.layout},
        "target": plan.target,
        "opset": plan.opset,
        "precision": "float32",
        "graphs": {spec.name: {**spec_to_dict(spec), "file": f"{spec.name}.onnx", "nodes": nodes[spec.name]} for spec in specs},
        "tokenizer": {"file": copied.as_posix(), "sha256": tokenizer.sha256, "size": tokenizer.size},
        "parity": [dataclasses.asdict(row) for row in rows],
    }
