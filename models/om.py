"""The om/ folder: what Ascend's converter made of each graph, at which batch and text length, and the command that made it.
Imports no torch.

Its manifest (kind "om") is that of graphs/ with target "om" and, for every .om, an entry: a graph at one batch and length. An
.om that was made for several batches stands there once for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import UserError
from models.spec import GraphSpec, spec_from_dict, spec_to_dict

KIND = "om"
SUFFIX = ".om"
# How an .om takes several batches: not at all, by the first axis of every input, by any axes of any input.
FIXED, DYNAMIC_BATCH, DYNAMIC_DIMS = "none", "batch", "dims"
DYNAMIC = (FIXED, DYNAMIC_BATCH, DYNAMIC_DIMS)


@dataclass(frozen=True)
class OmEntry:
    """A graph at one batch and one length of its texts. Its `spec` has numbers alone, and the dtypes that the .om is fed with and
    returns."""

    graph: str
    batch: int  # rows of the first axis of its first input
    file: str  # in the om/ folder; the converter may have added the host's system to the name that was asked for
    spec: GraphSpec
    command: tuple[str, ...]  # what was called in the om/ folder
    precision: str = "fp16"  # what the converter was asked for: fp16, mixed_float16 or origin
    dynamic: str = FIXED  # one of DYNAMIC
    seconds: float | None = None  # that the conversion took; None when another machine did it

    @property
    def length(self) -> int | None:
        """Tokens of each text; None for a graph that reads none, or one word at a time."""
        return next((int(t.shape[-1]) for t in self.spec.inputs if t.name == "text_atten_mask"), None)


def om_stem(graph: str, batches: Sequence[int], length: int | None = None) -> str:
    """Name of the .om of `graph` at one batch or several, growing, without the suffix: text_embed_bs16, text_embed_bs1to16, and
    for texts of another `length` than the graph's longest text_embed_bs16_len8."""
    several, shorter = f"to{batches[-1]}" if len(batches) > 1 else "", "" if length is None else f"_len{length}"
    return f"{graph}_bs{batches[0]}{several}{shorter}"


def entry_to_dict(entry: OmEntry) -> dict[str, Any]:
    """JSON form of an entry, as the manifest keeps it."""
    return {
        "graph": entry.graph,
        "batch": entry.batch,
        "length": entry.length,
        "file": entry.file,
        **spec_to_dict(entry.spec),
        "precision": entry.precision,
        "dynamic": entry.dynamic,
        "command": list(entry.command),
        "seconds": entry.seconds,
    }


def entries(content: Mapping[str, Any], file: Path | None = None) -> list[OmEntry]:
    """Every entry of an om/ manifest, by graph, batch and text length. Raises UserError, which names `file`, when it is not that
    form."""
    named = file or "The om manifest"
    try:
        found = [_entry(values) for values in content["oms"]]
        known = set(content["graphs"])
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{named} lacks or garbles {error}. Write the folder again with blip-atc.") from error
    if strange := sorted({entry.graph for entry in found} - known):
        raise UserError(f"{named} has no graph {strange[0]!r} for its .om. Write the folder again with blip-atc.")
    return sorted(found, key=lambda entry: (list(content["graphs"]).index(entry.graph), entry.batch, entry.length or 0))


def _entry(values: dict[str, Any]) -> OmEntry:
    spec = spec_from_dict(str(values["graph"]), values)
    batch, dynamic, seconds = values["batch"], str(values["dynamic"]), values["seconds"]
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"the batch {batch!r}")
    if dynamic not in DYNAMIC:
        raise ValueError(f"the kind of .om {dynamic!r}")
    if not spec.inputs or not all(isinstance(size, int) for t in spec.inputs + spec.outputs for size in t.shape):
        raise ValueError(f"the shapes of {spec.name!r}")
    file, command = str(values["file"]), tuple(str(part) for part in values["command"])
    entry = OmEntry(
        spec.name, batch, file, spec, command, str(values["precision"]), dynamic, None if seconds is None else float(seconds)
    )
    if values.get("length", entry.length) != entry.length:
        raise ValueError(f"the text length {values['length']!r}")
    return entry
