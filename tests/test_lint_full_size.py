"""The lint on graphs of full size, as blip-export writes them for Ascend. Each of their weights is one number throughout, so that
memory holds none of them, and each graph is gone before the next is written. Slow: minutes, and 5 GB of disk for ViT-g."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import models.bert
from export import sizes
from export.graphs import module_for
from export.hollow import hollow
from export.lint import Finding, lint_model
from export.targets import ASCEND, DEFAULT_OPSET
from export.to_onnx import write_onnx
from export.write import blank_inputs
from models.fit import retrieval_of
from models.presets import preset
from models.spec import graph_specs

BASE, VIT_G = "blip-retrieval-base-coco", "blip2-stage1-vit-g"
BATCHES = {BASE: (1, 4, 8, 16, 32, 64), VIT_G: (1, 16)}
EVERY = [(name, graph) for name in BATCHES for graph in graph_specs(preset(name), static=True)]


def linted(name: str, graph: str, path: Path) -> list[Finding]:
    """What CANN 7 and 8 would not take of a graph of that preset, at each of its batches."""
    config = preset(name)
    with torch.device("meta"):
        model = retrieval_of(config)  # type: ignore[arg-type]
    fixed = sizes.fixed(config, 1, 1, None)
    symbolic = graph_specs(config, static=True)[graph]
    spec = fixed.opened(symbolic)
    write_onnx(
        hollow(module_for(graph, model, static=True)),
        spec,
        blank_inputs(fixed.bind(symbolic)),
        path / f"{graph}.onnx",
        ASCEND,
        DEFAULT_OPSET[ASCEND],
    )
    asked = [fixed._replace(batch=batch) for batch in BATCHES[name]]
    found = [finding for cann in (7, 8) for finding in lint_model(path / f"{graph}.onnx", spec, cann, asked)]
    for file in path.glob(f"{graph}.onnx*"):
        file.unlink()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "graph"), EVERY)
def test_it_passes(tmp_path: Path, name: str, graph: str) -> None:
    assert linted(name, graph, tmp_path) == []


@pytest.mark.slow
def test_what_is_planted_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.bert, "MASKED", -1e9)
    found = linted(BASE, "text_embed", tmp_path)
    assert {finding.rule for finding in found} == {"fp16"}
    assert "holds 1e+09" in found[0].said
