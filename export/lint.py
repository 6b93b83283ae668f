"""Would ATC take these graphs? A check that needs no CANN, no chip and no torch: `blip-atc --check`.

The rules are in export/lint_rules.py, lint_numbers.py and lint_files.py; the list of operators, export/atc_ops.txt, can be
replaced by that of another release. What it finds would stop the conversion, spoil numbers in fp16, or stop ais_bench. That it
finds nothing proves none of these: a chip may still lack an operator for a type or a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from export import lint_files, lint_numbers, lint_rules
from export.atc_plan import wanted
from export.cann import RELEASES
from export.lengths import lengths_of
from export.lint_rules import Asked, Case, Rule
from export.op_table import OpTable, read_table
from export.sizes import Sizes
from export.static_shapes import resolve
from models import manifest
from models.errors import Misuse, UserError
from models.generation_spec import BEAMS, SLOTS
from models.spec import GraphSpec, spec_from_dict

# By the names that a finding bears, in the order they are read.
RULES: dict[str, Rule] = {
    "domain": lint_rules.domain,
    "opset": lint_rules.opset,
    "operator": lint_rules.operator,
    "control-flow": lint_rules.control_flow,
    "function": lint_rules.function,
    "tensors": lint_rules.tensors,
    "scatter": lint_rules.scatter,
    "interface": lint_rules.interface,
    "batch-axis": lint_rules.batch_axis,
    "static": lint_rules.static,
    "int64": lint_rules.int64,
    "float64": lint_rules.float64,
    "fp16": lint_numbers.fp16,
    "external-data": lint_files.external_data,
    "file-name": lint_files.file_name,
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a graph."""

    graph: str
    rule: str  # one of RULES
    said: str  # what was found, where, and what to do


def lint_folder(
    folder: Path,
    cann: int,
    batches: Sequence[int],
    table: OpTable | None = None,
    only: Sequence[str] | None = None,
    length: str | None = None,
) -> list[Finding]:
    """What ATC of CANN `cann` (6, 7 or 8) would not take of a graphs/ folder, in the order of its graphs.

    Args:
        batches: the batch sizes that graphs with an open batch "B" are to be converted for; fixed graphs have their own.
        table: in place of export/atc_ops.txt.
        only: graphs by name; None for all.
        length: of texts, as blip-atc --length takes it; None for the graphs' longest.

    Raises:
        UserError: when the folder is not complete, or a file in it is no ONNX file.
        Misuse: for another CANN, for no batch, for a graph that is not there, and for lengths that it cannot have.
    """
    content = manifest.read(folder, "graphs").content
    table, found = table or read_table(), []
    if not batches or min(batches) < 1:
        raise Misuse(f"The batch sizes to check are {list(batches)}, expected numbers from 1 on.")
    try:
        written = {name: (folder / str(graph["file"]), spec_from_dict(name, graph)) for name, graph in content["graphs"].items()}
        fixed = {name: int(size) for name, size in content.get("sizes", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"The manifest of {folder} is damaged: {error!r}. Write the graphs again with blip-export.") from error
    others = {letter: fixed[name] for name, letter in (("beams", BEAMS), ("slots", SLOTS)) if name in fixed}
    chosen = {name: written[name] for name in wanted(folder, only, list(written))}
    longest = fixed.get("length")  # None for other targets, whose open axes are found
    lengths = lengths_of([spec for _, spec in chosen.values()], length, longest) if longest else {}
    for name, (file, spec) in chosen.items():
        sizes = [Sizes(batch, tokens, others) for tokens in lengths.get(name, ()) for batch in batches]
        found += lint_model(file, spec, cann, sizes, table)
    return found


def lint_model(
    graph: Path | onnx.ModelProto, spec: GraphSpec, cann: int, sizes: Sequence[Sizes] = (), table: OpTable | None = None
) -> list[Finding]:
    """What ATC would not take of one graph, a file or a model in memory; weights beside a file are not loaded, but mapped.

    Args:
        spec: what the graph is to be, as its manifest says it.
        sizes: of the axes that are letters in `spec`, one for each batch and length that it is to be converted for; () if there
            are none.

    Raises as `lint_folder` does.
    """
    if cann not in RELEASES:
        raise Misuse(f"There are rules for CANN {', '.join(map(str, RELEASES))}, asked was {cann}.")
    file = graph if isinstance(graph, Path) else None
    model = _load(graph) if isinstance(graph, Path) else graph
    wanted = [spec] if spec.is_static or not sizes else [size.bind(spec) for size in sizes]
    asked = [Asked(bound, resolve(model, bound)) for bound in wanted]
    case = Case(model, spec, cann, table or read_table(), file, asked)
    return [Finding(spec.name, name, said) for name, rule in RULES.items() for said in rule(case)]


def _load(file: Path) -> onnx.ModelProto:
    try:
        return onnx.load(str(file), load_external_data=False)
    except DecodeError as error:
        raise UserError(f"{file} is no ONNX file ({error}). Write the graphs again with blip-export.") from error
