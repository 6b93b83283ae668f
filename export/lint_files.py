"""What lies beside a graph, and what its files are called. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onnx import TensorProto, helper

from export.lint_rules import Case
from export.static_shapes import graphs_in

STEM = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Place:
    """Where a weight lies."""

    file: Path
    offset: int  # bytes
    length: int


def external_data(case: Case) -> Iterator[str]:
    """Weights that are not in the file lie in a file beside it, which is there: ATC looks in the folder of the graph."""
    missing: dict[str, str] = {}
    for graph in graphs_in(case.model.graph):
        attributes = (a.t for node in graph.node for a in node.attribute)
        for tensor in (*graph.initializer, *attributes):
            if tensor.data_location == TensorProto.EXTERNAL and case.file is not None:
                location, said = _wrong(tensor, case.file)
                if said:
                    missing.setdefault(location, f"the weights of {tensor.name!r} {said}")
    yield from missing.values()


def file_name(case: Case) -> Iterator[str]:
    """The .om is named after its graph, and ais_bench cuts names at the first dot, and takes none but of plain ASCII letters,
    digits, _ and -. It never sees the .onnx, so the folder of that may have any name."""
    stems = [case.spec.name] if case.file is None else [case.spec.name, case.file.stem]
    for stem in dict.fromkeys(stems):
        if not STEM.fullmatch(stem):
            yield f"{stem!r} is the stem of a file for ais_bench: letters, digits, _ and - only, and no dot. Rename the graph."


def place(tensor: TensorProto, file: Path | None) -> Place | None:
    """Where the weights of `tensor` lie that are not in the graph `file`; None when they are not there."""
    if file is None or _wrong(tensor, file)[1]:
        return None
    said = {entry.key: entry.value for entry in tensor.external_data}
    return Place(file.parent / said["location"], int(said.get("offset", 0)), _bytes(tensor))


def _wrong(tensor: TensorProto, file: Path) -> tuple[str, str]:
    """The file that a weight is said to lie in, and what is wrong with that; empty when nothing is."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    location, end = said.get("location", ""), int(said.get("offset", 0)) + _bytes(tensor)
    if not location or Path(location).name != location:
        return location, f"are to lie at {location!r}, expected the name of a file beside {file.name}."
    beside = file.parent / location
    if not beside.is_file():
        return location, f"are to lie in {beside}, which is missing. Keep both files together."
    if beside.stat().st_size < end:
        return location, f"end at byte {end:,} of {beside}, which has {beside.stat().st_size:,}. Copy it again."
    return location, ""


def _bytes(tensor: TensorProto) -> int:
    size: int = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return size
