"""How far a written graph is from the PyTorch module it came from, measured in ONNX Runtime.

Random inputs of several batch sizes and text lengths; a graph with fixed axes is fed its one shape, twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from export.mapped import let_go
from export.random_inputs import random_inputs
from export.random_scene import Model
from export.sizes import Sizes
from export.targets import TANH_GELU
from models.config import Blip2LlmConfig, Config
from models.engine import DISABLED_OPTIMIZERS
from models.errors import UserError
from models.generation_spec import BEAMS, CROSS, PAST, PROMPT_MASK, QUERIES, ROWS
from models.spec import LENGTH, GraphSpec
from models.stored import compute_in_float32

# Of the largest value of the output. Measured on random weights at full base size: 1e-6 (embeddings), 2e-6 (features),
# 3e-6 (keys and values, logits); of BLIP-2 with ViT-g 1.1e-6 at most. The one wrong graph met so far, a fusion that
# scaled twice, was off by 0.1.
BOUND = 5e-5
# T5 does not scale its scores: over its layers it multiplies what is rounded. With 24 of them and random weights that give
# scores of 6.5 PyTorch itself is 1.7e-4 from what it computes in float64, and a graph 3.5e-4 from PyTorch; with scores of
# 1.6 it is 2e-6.
BOUND_OF_T5 = 1e-3
# GELU by tanh is another function, up to 5e-4 away from the model's.
BOUND_OF_TANH = 1e-2
MAPPED = 4 * 2**30  # bytes of a graph from which on its weights are not copied to be measured


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


def cases_for(spec: GraphSpec, config: Config) -> list[Sizes]:
    """Sizes to try of a graph whose axes are dynamic: one sample, odd batches, the shortest and the longest text; of a decoder
    the first step, later ones, and every axis at 1."""
    longest = config.protocol.max_length
    letters = {dim for t in spec.inputs for dim in t.shape}
    if PAST not in letters:
        cases = [(1, longest), (3, min(12, longest)), (2, min(3, longest)), (5, min(8, longest))]
        return [Sizes(*case) for case in (cases if LENGTH in letters else cases[:2])]
    queries = config.qformer.queries if isinstance(config, Blip2LlmConfig) else 0
    seen, shares = queries + min(7, longest), any(t.name == PROMPT_MASK for t in spec.inputs)
    return [
        Sizes(3, min(6, longest), {BEAMS: 1, ROWS: 3, PAST: 0, QUERIES: queries, CROSS: 0 if shares else seen}),
        Sizes(2, 1, {BEAMS: 3, ROWS: 5, PAST: queries + 4, QUERIES: 0, CROSS: seen}),
        Sizes(3, 2, {BEAMS: 2, ROWS: 7, PAST: queries + 2, QUERIES: 0, CROSS: seen}),
        Sizes(1, 1, {BEAMS: 1, ROWS: 1, PAST: 1, QUERIES: 1, CROSS: 1}),
    ]


def cases_opened(spec: GraphSpec, fixed: Sizes) -> list[Sizes]:
    """Sizes to try of a graph for ATC whose batch is open, "B" in `spec`: another batch too, and where the length of its texts
    is open shorter texts, down to one word between the tokens that begin and end it."""
    second, third = fixed._replace(batch=3 * fixed.batch), fixed._replace(batch=2 * fixed.batch)
    if not any(LENGTH in tensor.shape for tensor in spec.inputs):
        return [fixed, second]
    return [fixed, second._replace(length=min(8, fixed.length)), third._replace(length=min(3, fixed.length))]


def bound_of(name: str, rewrites: Collection[str] = ()) -> float:
    """The bound on max_rel of the outputs of graph `name`."""
    if TANH_GELU in rewrites:
        return BOUND_OF_TANH
    return BOUND_OF_T5 if name.startswith("t5") else BOUND


def measure(
    model: Model, module: nn.Module, spec: GraphSpec, path: Path, cases: Sequence[Sizes], bound: float | None = None
) -> list[Parity]:
    """Compare the graph in `path` with `module`; one row per output. Raises UserError when the graph does not run."""
    bound = bound_of(spec.name) if bound is None else bound
    # One after the other, so that weights mapped from a file are in memory once: the model's, then the graph's.
    runs = [_computed(model, module, spec, case, seed) for seed, case in enumerate(cases)]
    let_go(model)
    worst = {t.name: (0.0, 0.0) for t in spec.outputs}
    try:
        session = _session(path)
        for inputs, wanted in runs:
            found = session.run(list(worst), {name: value.numpy() for name, value in inputs.items()})
            for tensor, ours, theirs in zip(spec.outputs, found, wanted, strict=True):
                counts = _counting(tensor.name, inputs, theirs)
                worst[tensor.name] = _worse(worst[tensor.name], ours, theirs.numpy(), counts)
    except Exception as error:  # onnxruntime raises its own classes, which share no base but Exception
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise UserError(f"{spec.name}: ONNX Runtime does not run the graph written: {error}") from error
    shown = " ".join(dict.fromkeys(case.shown(spec) for case in cases))
    return [Parity(spec.name, name, shown, *differences, bound) for name, differences in worst.items()]


def refuse_beyond(rows: Sequence[Parity]) -> None:
    """Raise UserError naming the outputs that are further from PyTorch than their bound."""
    wrong = [row for row in rows if not row.ok]
    if wrong:
        listed = "; ".join(f"{r.graph}.{r.output} differs by {r.max_rel:.1e} of its largest value" for r in wrong)
        raise UserError(f"The graphs are not the model: {listed} (bound {wrong[0].bound:.0e}). Nothing was written.")


def _computed(
    model: Model, module: nn.Module, spec: GraphSpec, case: Sizes, seed: int
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Random inputs by name, and what `module` makes of them."""
    with torch.no_grad(), compute_in_float32(model):
        inputs = random_inputs(spec.name, model, case.batch, case.length, seed, **case.others)
        wanted = module(*(inputs[t.name] for t in spec.inputs))
    return inputs, wanted if isinstance(wanted, tuple) else (wanted,)


def _counting(name: str, inputs: Mapping[str, Tensor], output: Tensor) -> np.ndarray | float:
    """1 where an output counts, 0 for keys and values (N, ..., L, K) of padding. Padding on the left sees nothing but padding,
    all of it at scores near -1e4, whose last digits decide there: two right results differ by 1e-4, and nobody looks."""
    if not name.startswith("present") or "text_atten_mask" not in inputs:
        return 1.0
    mask = inputs["text_atten_mask"].flatten(0, -2)  # (N, L)
    counts = np.ones(output.shape, np.float32)
    counts[..., -mask.shape[1] :, :] *= mask.reshape(len(mask), *(1,) * (output.dim() - 3), -1, 1).numpy()
    return counts


def _session(path: Path) -> onnxruntime.InferenceSession:
    """Optimised as the runtime has it: what is measured is what will run. But the weights of a large graph stay where they are,
    mapped from their file, and are not copied into another order: the same products, in memory that holds half as much."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*")) > MAPPED:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED_OPTIMIZERS["cpu"], enable_fallback=0
    )


def _worse(
    before: tuple[float, float], found: np.ndarray, wanted: np.ndarray, counts: np.ndarray | float = 1.0
) -> tuple[float, float]:
    if found.shape != wanted.shape:
        return (float("inf"), float("inf"))
    found, wanted = found.astype(np.float64) * counts, wanted * counts
    difference = float(np.abs(found - wanted).max())
    relative = difference / max(float(np.abs(wanted).max()), 1e-12)
    # np.maximum, unlike max, keeps a NaN.
    return (float(np.maximum(before[0], difference)), float(np.maximum(before[1], relative)))
