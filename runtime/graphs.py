"""The graphs/ or om/ folder as the runtime sees it: which graphs there are, in which form, and which of them to use."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from models import manifest
from models.config import Config
from models.config_file import from_dict
from models.errors import UserError
from models.om import KIND, SUFFIX, OmEntry, entries
from models.spec import BATCH, LENGTH, GraphSpec, TensorSpec, graph_specs, spec_from_dict

KEPT = ("model", "config", "opset", "target", "precision", "checkpoint", "parity")  # what outputs/ say of their graphs
OM_KEPT = ("soc", "cann")  # and of those compiled for an NPU
MEND = f"Write the folder again with {manifest.MADE_WITH['graphs']}."
STATIC = ("atc", "ascend", KIND)  # targets whose graphs have buffers of fixed size that the caller fills (export/targets.py)


@dataclass(frozen=True)
class Graphs:
    """A complete graphs/ folder, or an om/ folder of which one batch of each graph is chosen."""

    source: manifest.Manifest
    config: Config
    symbolic: dict[str, GraphSpec]  # every graph of this model in the form of the folder's target, axes symbolic
    written: dict[str, GraphSpec]  # the graphs in the folder, as they were exported; of an om/ folder, those chosen
    oms: Mapping[str, OmEntry] = field(default_factory=dict)  # of an om/ folder: the file chosen of each graph
    shorter: Mapping[str, Sequence[OmEntry]] = field(default_factory=dict)  # and those of its batch for shorter texts, growing
    devices: tuple[int, ...] = ()  # of an om/ folder: the NPUs that run it

    @property
    def content(self) -> dict[str, Any]:
        return self.source.content

    def path(self, name: str) -> Path:
        """The file of graph `name`."""
        file = self.oms[name].file if self.is_om else self.content["graphs"][name]["file"]
        return self.source.folder / str(file)

    @property
    def is_om(self) -> bool:
        """Whether the graphs are compiled for an NPU."""
        return self.source.kind == KIND

    @property
    def is_static(self) -> bool:
        """Whether graphs that write words have buffers of fixed size."""
        return self.content["target"] in STATIC

    def at(self, batchsize: int) -> Graphs:
        """The same with, of each graph of an om/ folder, the file of the smallest batch that holds `batchsize` rows, else of
        the largest batch, for the longest texts, and those for shorter ones. Other graphs are as they are."""
        return replace(self, **_chosen(self.source, self.symbolic, batchsize)) if self.is_om else self

    def on(self, devices: tuple[int, ...]) -> Graphs:
        """The same on these NPUs, each of which takes the rows of a batch."""
        return replace(self, devices=devices)

    @property
    def tokenizer(self) -> Path:
        """The vocabulary that was copied beside the graphs, or the first of its files."""
        return self.source.folder / str(self.content["tokenizer"]["file"])

    def first_of(self, *choices: tuple[str, ...]) -> tuple[str, ...]:
        """The first group of graphs that is all here. Raises UserError naming what is missing."""
        for names in choices:
            if all(name in self.written for name in names):
                return names
        missing = [name for name in choices[0] if name not in self.written]
        mend = f"Export it: blip-export --graphs {','.join(choices[0])} ..."
        if self.is_om:
            mend = f"Convert it: blip-atc --only {','.join(sorted({*self.written, *choices[0]}))} ..."
        raise UserError(f"{self.source.folder} has no graph {missing[0]!r}. {mend}")


def read_graphs(folder: Path, verify: bool = False) -> Graphs:
    """Open a graphs/ folder, or an om/ folder: of that the largest batches, on NPU 0. Raises UserError when it is damaged,
    incomplete or of another release."""
    # What its manifest does not say its files do.
    kinds = (KIND, "graphs") if any(folder.glob(f"*{SUFFIX}")) else ("graphs", KIND)
    found = manifest.read_one_of(folder, kinds, verify)
    mend = f"Write the folder again with {manifest.MADE_WITH[found.kind]}."
    try:
        config = from_dict(found.content["config"], str(folder / manifest.NAME))
        symbolic = graph_specs(config, static=found.content["target"] in STATIC)
        written = {name: spec_from_dict(name, values) for name, values in found.content["graphs"].items()}
        if lacking := [part for part in (*KEPT, *(OM_KEPT if found.kind == KIND else ())) if part not in found.content]:
            raise KeyError(lacking[0])  # now, and not when the work is done
        tokenizer = found.content["tokenizer"]
        str(tokenizer["sha256"])
        files = [entry.file for entry in entries(found.content, folder / manifest.NAME)] if found.kind == KIND else []
        listed = set(files or [str(values["file"]) for values in found.content["graphs"].values()])
        listed |= {str(name) for name in (tokenizer["file"], *tokenizer.get("files", ()))}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / manifest.NAME} lacks or garbles {error}. {mend}") from error
    if missing := sorted(listed - found.files.keys()):
        raise UserError(f"{folder / manifest.NAME} does not list its own file {missing[0]!r}. {mend}")
    for name, spec in written.items():
        if name not in symbolic:
            raise UserError(f"{folder} holds a graph {name!r} that this release does not know. {mend}")
        _form(spec, symbolic[name], folder)
    graphs = Graphs(found, config, symbolic, written)
    return graphs.at(sys.maxsize).on((0,)) if graphs.is_om else graphs


def _chosen(source: manifest.Manifest, symbolic: dict[str, GraphSpec], batchsize: int) -> dict[str, Any]:
    """The file of each graph of an om/ folder, and its form as the runtime feeds it."""
    oms: dict[str, OmEntry] = {}
    every = entries(source.content, source.folder / manifest.NAME)
    for entry in sorted(every, key=lambda entry: (entry.batch, -_longest(entry.spec))):
        held = oms.get(entry.graph)
        if held is None or held.batch < min(batchsize, entry.batch):
            oms[entry.graph] = entry
    if missing := sorted(source.content["graphs"].keys() ^ oms.keys()):
        raise UserError(f"{source.folder / manifest.NAME} has graphs and files that are not each other's: {missing[0]!r}.")
    written = {name: _widened(entry.spec, symbolic[name]) for name, entry in oms.items()}
    shorter = {name: _shorter(om, every) for name, om in oms.items()}
    for name, spec in written.items():
        for each in (spec, *(_widened(entry.spec, symbolic[name]) for entry in shorter[name])):
            _form(each, symbolic[name], source.folder)
    return {"oms": oms, "written": written, "shorter": shorter}


def _shorter(om: OmEntry, every: Sequence[OmEntry]) -> list[OmEntry]:
    """The files of the graph and batch of `om` for shorter texts, the shortest first."""
    same = [entry for entry in every if (entry.graph, entry.batch) == (om.graph, om.batch)]
    return [entry for entry in same if entry.length is not None and om.length is not None and entry.length < om.length]


def _longest(spec: GraphSpec) -> int:
    """Of files of one batch that with the longest texts takes all of them."""
    return sum(math.prod(dim for dim in tensor.shape if isinstance(dim, int)) for tensor in spec.inputs)


def _widened(spec: GraphSpec, symbolic: GraphSpec) -> GraphSpec:
    """The graph as it is fed here: float32 where the file has float16, which its session narrows and widens."""

    def tensors(theirs: tuple[TensorSpec, ...], ours: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        dtypes = {tensor.name: tensor.dtype for tensor in ours if tensor.dtype == "float32"}
        return tuple(replace(t, dtype=dtypes.get(t.name, t.dtype)) if t.dtype == "float16" else t for t in theirs)

    return GraphSpec(spec.name, tensors(spec.inputs, symbolic.inputs), tensors(spec.outputs, symbolic.outputs))


def fixed_sizes(graphs: Graphs, name: str) -> tuple[int | None, int | None]:
    """Batch and text length that graph `name` was exported for; None where it takes any."""
    sizes = all_sizes(graphs, name)
    return sizes.get(BATCH), sizes.get(LENGTH)


def all_sizes(graphs: Graphs, name: str) -> dict[str, int]:
    """The sizes that graph `name` was exported for by the letters of its axes, without those that may be any."""
    return _form(graphs.written[name], graphs.symbolic[name], graphs.source.folder)


def _form(written: GraphSpec, symbolic: GraphSpec, folder: Path) -> dict[str, int]:
    """Bind `symbolic` to what was written; a graph that cannot be had that way is not ours."""
    sizes: dict[str, Any] = {}
    for ours, theirs in zip(symbolic.inputs + symbolic.outputs, written.inputs + written.outputs, strict=False):
        for dim, found in zip(ours.shape, theirs.shape, strict=False):
            if str(dim).isalpha() and isinstance(found, int):  # a letter, no sum of letters
                sizes.setdefault(str(dim), found)
    if symbolic.bind(**{"batch": BATCH, "length": LENGTH, **sizes}) != written:
        raise UserError(f"The graph {written.name!r} in {folder} has other inputs or outputs than this release expects. {MEND}")
    return sizes
