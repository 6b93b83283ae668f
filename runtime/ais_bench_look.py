"""Whether an .om takes and gives what its manifest says. ais_bench.sh runs this text by `python -`, where this package is not
installed: it imports nothing of ours, and is for Python 3.7, which CANN 6 comes with.

    look.py GRAPH MODEL DEVICE KIND INPUTS OUTPUTS    tensors as name:dtype:bytes with commas between, in their order; KIND: none,
                                                      batch=N or dims=NAME:N,N;... for an .om that takes several batches
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

# What aclDataType numbers mean, of those that numpy has.
DTYPES = {
    **{0: "float32", 1: "float16", 2: "int8", 3: "int32", 4: "uint8", 6: "int16", 7: "uint16", 8: "uint32"},
    **{9: "int64", 10: "uint64", 11: "float64", 12: "bool"},
}


def main(graph: str, model: str, device: str, kind: str, takes: str, gives: str) -> str:
    """What is wrong, in a sentence; nothing when all is well."""
    try:
        made = importlib.import_module("ais_bench.infer.interface").InferSession
    except (ImportError, AttributeError) as error:
        return (
            f"ais_bench cannot be imported ({_first_line(error)}). Source CANN's set_env.sh in this shell, and install the "
            "wheels aclruntime and ais_bench of Ascend's tools (ais-bench_workload); PyPI has neither of them."
        )
    try:
        session = made(int(device), model)
        if kind.startswith("batch="):
            session.set_dynamic_batchsize(int(kind[len("batch=") :]))
        elif kind.startswith("dims="):
            session.set_dynamic_dims(kind[len("dims=") :])
        inputs, outputs = session.get_inputs(), session.get_outputs()
    except Exception as error:  # whatever ais_bench, aclruntime or CANN raise
        return f"{graph}: {model} cannot be opened on NPU {device}: {_first_line(error)}. It must be compiled for this NPU."
    found, expected = [_described(tensor) for tensor in inputs], [_parsed(text) for text in takes.split(",")]
    if found != expected:
        return _differs(graph, model, "takes", found, expected)
    found, expected = [_described(tensor) for tensor in outputs], [_parsed(text) for text in gives.split(",")]
    named = sorted(name for name, _, _ in found) == sorted(name for name, _, _ in expected)  # else by place, as ATC may do
    several = kind != "none"  # it may say the largest then, or nothing
    if [_loose(each, named, several) for each in found] != [_loose(each, named, several) for each in expected]:
        return _differs(graph, model, "gives", found, expected)
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")


def _described(tensor: Any) -> tuple[str, str, int]:
    """Name, dtype and bytes; an output is called node:index:name."""
    return tensor.name.split(":")[-1], DTYPES.get(int(tensor.datatype), f"aclDataType {tensor.datatype}"), int(tensor.realsize)


def _parsed(text: str) -> tuple[str, str, int]:
    name, dtype, size = text.split(":")
    return name, dtype, int(size)


def _loose(tensor: tuple[str, str, int], named: bool, several: bool) -> tuple[str, str, int]:
    """An output as far as it matters: float16 is widened when it is read."""
    name, dtype, size = tensor
    if dtype == "float16":
        dtype, size = "float32", 2 * size
    return name if named else "", dtype, 0 if several else size


def _differs(graph: str, model: str, verb: str, found: list[tuple[str, str, int]], expected: list[tuple[str, str, int]]) -> str:
    is_, should = (", ".join(f"{name} {dtype} {size:,} bytes" for name, dtype, size in side) for side in (found, expected))
    return f"{graph}: {model} {verb} {is_}; expected {should}. Compile it again with blip-atc."


if __name__ == "__main__":
    wrong = main(*sys.argv[1:])
    if wrong:
        sys.exit(f"ais_bench.sh: {wrong}")
