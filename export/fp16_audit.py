"""What float16 would do to graphs: which tensors it cannot hold, how far the outputs move, and what must stay in float32.

An operation stays in float32 when it makes or reads a value that float16 rounds to infinity, and infinity minus infinity or times
0 to NaN. Large activations squared within a norm are the common case. Rarer is a divisor that becomes 0, with the eps that guards
it: where an output is infinite for that, what makes and reads it stays in float32 too; so does what becomes 0 on the way to an
output that is finite and far off. ATC takes the list as --keep_dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from export.atc_precision import AUDIT, KEPT_OF_GRAPH
from export.cann import ORIGIN
from export.half import Feeds, Seen, exploding, observe, run, simulate

FAR = 0.1  # of its largest value: an output that is further off is of no use
LISTED = 10  # of the largest tensors, in the record
FOLDER = "fp16"
HEADER = f"{'graph':<16} {'output':<18} {'float16':>9} {'kept':>9}  overflow  kept in float32"


@dataclass(frozen=True)
class Accuracy:
    """How far an output is from float32's, over all feeds: the largest difference over the largest value; infinite for NaN."""

    output: str
    half: float  # all in float16
    kept: float  # but for the operations that stay in float32
    exact: bool = True  # whether float32's own is finite


@dataclass(frozen=True)
class Audit:
    """Of one graph."""

    graph: str
    nodes: int
    overflowing: tuple[Seen, ...]
    largest: tuple[Seen, ...]  # results, the largest first
    vanishing: tuple[Seen, ...]  # those of whose values most become 0
    keep: tuple[str, ...]  # nodes, in the graph's order
    accuracy: tuple[Accuracy, ...]

    def lines(self) -> list[str]:
        """A row for each output, under HEADER; and a sentence for each that nothing helps."""
        kept = f"{len(self.keep)} of {self.nodes} operations"
        return [
            f"{self.graph:<16} {row.output:<18} {row.half:>9.1e} {row.kept:>9.1e}  {len(self.overflowing):>8}  {kept}"
            for row in self.accuracy
        ] + [self._worthless(row) for row in self.accuracy if not row.kept <= FAR]

    def _worthless(self, row: Accuracy) -> str:
        """What is to be said of an output that what is kept does not mend."""
        if not row.exact:
            return f"{row.output} of {self.graph} is infinite or NaN in float32 too: look at the checkpoint, and at the pictures."
        found = f"{row.kept:.0%} of its largest value off" if math.isfinite(row.kept) else "infinite or NaN"
        return (
            f"{row.output} of {self.graph} is {found} in float16 with these kept. Convert that graph in float32: blip-atc "
            f"--precision {self.graph}={ORIGIN}."
        )

    def record(self) -> dict[str, Any]:
        """As JSON has it, which knows no infinity: that is null."""
        found: dict[str, Any] = _finite(asdict(self))
        return found


def audit(graph: str, path: Path, feeds: Sequence[Feeds]) -> Audit:
    """Run the graph in `path` on `feeds`, every tensor looked at, then in float16 and with what must be kept."""
    model = onnx.load(path, load_external_data=False)
    seen = observe(path, feeds)
    keep = keep_list(model, [each.tensor for each in seen if each.overflows])
    outputs = [value.name for value in model.graph.output]
    exact, half = list(run(model, path, outputs, feeds)), simulate(path, feeds)
    kept = simulate(path, feeds, keep) if keep else half
    while not _finite_all(kept) or _far_off(outputs, kept, exact):
        led = [*exploding(path, feeds, keep), *vanishing(model, seen, _far_off(outputs, kept, exact))]
        if not (more := [name for name in led if name not in keep]):
            break
        keep = [node.name for node in model.graph.node if node.name in {*keep, *more}]
        kept = simulate(path, feeds, keep)
    accuracy = [
        Accuracy(name, _worst(half, exact, at), _worst(kept, exact, at), all(np.isfinite(values[at]).all() for values in exact))
        for at, name in enumerate(outputs)
    ]
    results = [each for each in seen if each.node]
    return Audit(
        graph,
        len(model.graph.node),
        tuple(each for each in seen if each.overflows),
        tuple(sorted(results, key=lambda each: -each.largest)[:LISTED]),
        tuple(each for each in sorted(results, key=lambda each: -each.underflow)[:LISTED] if each.underflow),
        tuple(keep),
        tuple(accuracy),
    )


def keep_list(model: onnx.ModelProto, overflowing: Sequence[str]) -> list[str]:
    """The nodes that make or read these tensors, in the graph's order."""
    tensors = set(overflowing)
    return [node.name for node in model.graph.node if tensors & {*node.input, *node.output}]


def vanishing(model: onnx.ModelProto, seen: Sequence[Seen], outputs: Sequence[str]) -> list[str]:
    """The nodes on the way to `outputs` that make or read a result of which values become 0, in the graph's order."""
    makers = {name: node for node in model.graph.node for name in node.output}
    nodes, left = set[str](), [makers[name] for name in outputs if name in makers]
    while left:
        node = left.pop()
        if node.name not in nodes:
            nodes.add(node.name)
            left += [makers[name] for name in node.input if name in makers]
    return [name for name in keep_list(model, [each.tensor for each in seen if each.node and each.underflow]) if name in nodes]


def write_lists(folder: Path, audits: Sequence[Audit]) -> None:
    """`fp16/audit.json` with all that was found, and for each graph that needs it the list that ATC takes as --keep_dtype: an
    operation by name in each line of `fp16/<graph>.keep_dtype`."""
    out = folder / FOLDER
    out.mkdir()
    for each in audits:
        if each.keep:
            (out / f"{each.graph}{KEPT_OF_GRAPH}").write_text("".join(f"{name}\n" for name in each.keep), "utf-8")
    (out / AUDIT).write_text(json.dumps([each.record() for each in audits], indent=1, allow_nan=False) + "\n", "utf-8")


def _finite_all(found: Sequence[Sequence[np.ndarray]]) -> bool:
    return all(np.isfinite(value).all() for values in found for value in values)


def _far_off(outputs: Sequence[str], found: Sequence[Sequence[np.ndarray]], wanted: Sequence[Sequence[np.ndarray]]) -> list[str]:
    """The names of outputs that are finite, and of no use."""
    return [name for at, name in enumerate(outputs) if FAR < _worst(found, wanted, at) < math.inf]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _worst(found: Sequence[Sequence[np.ndarray]], wanted: Sequence[Sequence[np.ndarray]], at: int) -> float:
    """Of output number `at`, over all feeds: largest difference over the largest value."""
    return max(_far(ours[at], theirs[at]) for ours, theirs in zip(found, wanted, strict=True))


def _far(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference over the largest value."""
    if not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - wanted).max()) / max(float(np.abs(wanted).max()), 1e-12)
