"""Where graphs run: ONNX Runtime's provider, or the NPUs that were asked for."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime

from models.errors import Misuse
from runtime.devices import open_om
from runtime.graphs import Graphs
from runtime.om_session import infer_session
from runtime.onnx_session import available_provider

LARGEST = 255  # number of an NPU, in ais_bench
Device = int | str | Sequence[int]  # "0,1,2,3"


def placed(graphs: Graphs, provider: str, device: Device | None, batchsize: int) -> Graphs:
    """`graphs` where they are to run: of an om/ folder the files for `batchsize` rows, on the NPUs `device` (None: 0).

    Raises Misuse for NPUs of graphs that run in ONNX Runtime, a provider of those that do not, or numbers that cannot be;
    UserError when the provider, or what runs .om files, is not installed.
    """
    folder = graphs.source.folder
    if not graphs.is_om:
        if device is not None:
            raise Misuse(f"--device is of graphs compiled for an NPU, and {folder} holds none: give the folder of blip-atc.")
        available_provider(provider)
        return graphs
    if provider != "cpu":
        raise Misuse(f"--provider is of ONNX Runtime, and {folder} was compiled for an NPU: leave it out, or give --device.")
    devices = numbers(0 if device is None else device)
    infer_session()
    return graphs.at(batchsize).on(devices)


def numbers(device: Device) -> tuple[int, ...]:
    """NPUs: "0,1,2,3", a number, or several. Raises Misuse for what is no number of an NPU, or is there twice."""
    given = device.split(",") if isinstance(device, str) else [device] if isinstance(device, int) else list(device)
    found = [int(each) if str(each).strip().isdecimal() else -1 for each in given]
    if not found or min(found) < 0 or max(found) > LARGEST or len(set(found)) < len(found):
        raise Misuse(f"--device is {device!r}; expected numbers of NPUs from 0 to {LARGEST}, each once, with commas between.")
    return tuple(found)


def engine_of(graphs: Graphs, provider: str) -> dict[str, str]:
    """What computes, and its release: numbers may depend on it."""
    if not graphs.is_om:
        return {"provider": provider, "onnxruntime": onnxruntime.__version__}
    return {"provider": "om", "aclruntime": _release("aclruntime")}


def place_of(graphs: Graphs) -> dict[str, Any]:
    """Which NPUs, of which kind; nothing elsewhere."""
    return {"soc": graphs.content["soc"], "device": list(graphs.devices)} if graphs.is_om else {}


def batches_of(graphs: Graphs, rows: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """For a manifest: how many rows the .om of each graph in `rows` takes that is run when so many are asked for; nothing
    elsewhere."""
    return {"batches": {name: graphs.at(asked).oms[name].batch for name, asked in rows.items()}} if graphs.is_om else {}


def smaller_batches(graphs: Graphs, rows: Mapping[str, int]) -> list[str]:
    """What is to be said when there is no .om for as many rows as were asked for, by graph: one line, or none."""
    ran: dict[tuple[int, int], list[str]] = {}
    for name, batch in batches_of(graphs, rows).get("batches", {}).items():
        if batch < rows[name]:
            ran.setdefault((batch, rows[name]), []).append(name)
    each = [f"{', '.join(names)} in batches of {batch}, not of {asked}" for (batch, asked), names in ran.items()]
    return [f"{graphs.source.folder} has no larger .om: it runs {'; '.join(each)}."] if each else []


def check_files(graphs: Graphs, rows: Mapping[str, int]) -> None:
    """Open every .om that `rows` of each graph take, and close it again. Raises UserError when one cannot be loaded or is not
    what its manifest says: that is to be known before hours of work by others."""
    if graphs.is_om:
        for name, asked in rows.items():
            chosen = graphs.at(asked)
            for entry in (chosen.oms[name], *chosen.shorter[name]):
                open_om(graphs.source.folder, entry, graphs.symbolic[name], graphs.devices).close()


def _release(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
