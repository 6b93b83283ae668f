"""How far a written graph is from the PyTorch module it came from, measured in ONNX Runtime.

Random inputs of several batch sizes and text lengths; a graph with fixed axes is fed its one shape, twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from export.graphs import random_inputs
from models.blip2 import Retrieval
from models.engine import DISABLED_OPTIMIZERS
from models.errors import UserError
from models.spec import GraphSpec

# Of the largest value of the output. Measured on random weights at full base size: 1e-6 (embeddings), 2e-6 (features),
# 3e-6 (keys and values, ITM logits); of BLIP-2 with ViT-g 1.1e-6 at most. The one wrong graph met so far, a fusion that
# scaled twice, was off by 0.1.
BOUND = 5e-5

Case = tuple[int, int]  # batch, text length


@dataclass(frozen=True)
class Parity:
    """Worst difference of one output over all cases."""

    graph: str
    output: str
    cases: str
    max_abs: float
    max_rel: float  # max_abs over the largest value that PyTorch gave
    bound: float  # on max_rel

    @property
    def ok(self) -> bool:
        return self.max_rel <= self.bound  # False for NaN


def cases_for(spec: GraphSpec, max_length: int) -> list[Case]:
    """Batch sizes and lengths to try: one sample, odd batches, the shortest and the longest caption."""
    if spec.is_static:
        batch = next(int(t.shape[0]) for t in spec.outputs)
        return [(batch, max_length)] * 2
    cases = [(1, max_length), (3, min(12, max_length)), (2, 3), (5, min(8, max_length))]
    return cases if spec.inputs[0].name == "text_ids" else cases[:2]


def measure(
    model: Retrieval, module: nn.Module, spec: GraphSpec, path: Path, cases: Sequence[Case], bound: float = BOUND
) -> list[Parity]:
    """Compare the graph in `path` with `module`; one row per output. Raises UserError when the graph does not run."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    worst = {t.name: (0.0, 0.0) for t in spec.outputs}
    try:
        # Optimised as the runtime has it: what is measured is what will run.
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED_OPTIMIZERS["cpu"]
        )
        for seed, (batch, length) in enumerate(cases):
            inputs = random_inputs(spec.name, model, batch, length, seed)
            with torch.no_grad():
                wanted = module(*(inputs[t.name] for t in spec.inputs))
            wanted = wanted if isinstance(wanted, tuple) else (wanted,)
            found = session.run([t.name for t in spec.outputs], {name: value.numpy() for name, value in inputs.items()})
            for tensor, ours, theirs in zip(spec.outputs, found, wanted, strict=True):
                worst[tensor.name] = _worse(worst[tensor.name], ours, theirs.numpy())
    except Exception as error:  # onnxruntime raises its own classes, which share no base but Exception
        if isinstance(error, UserError) or not type(error).__module__.startswith("onnxruntime"):
            raise
        raise UserError(f"{spec.name}: ONNX Runtime does not run the graph written: {error}") from error
    shown = " ".join(f"({b}, {n})" if spec.inputs[0].name == "text_ids" else f"({b})" for b, n in dict.fromkeys(cases))
    return [Parity(spec.name, name, shown, *differences, bound) for name, differences in worst.items()]


def refuse_beyond(rows: Sequence[Parity]) -> None:
    """Raise UserError naming the outputs that are further from PyTorch than their bound."""
    wrong = [row for row in rows if not row.ok]
    if wrong:
        listed = "; ".join(f"{r.graph}.{r.output} differs by {r.max_rel:.1e} of its largest value" for r in wrong)
        raise UserError(f"The graphs are not the model: {listed} (bound {wrong[0].bound:.0e}). Nothing was written.")


def _worse(before: tuple[float, float], found: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    if found.shape != wanted.shape:
        return (float("inf"), float("inf"))
    difference = float(np.abs(found.astype(np.float64) - wanted).max())
    relative = difference / max(float(np.abs(wanted).max()), 1e-12)
    # np.maximum, unlike max, keeps a NaN.
    return (float(np.maximum(before[0], difference)), float(np.maximum(before[1], relative)))
