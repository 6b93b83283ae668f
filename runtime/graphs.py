"""The graphs/ folder as the runtime sees it: which graphs there are, in which form, and which of them to use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import manifest
from models.config import Config, from_dict
from models.errors import UserError
from models.spec import BATCH, LENGTH, GraphSpec, graph_specs, spec_from_dict

KEPT = ("model", "config", "opset", "target", "precision", "checkpoint", "parity")  # what outputs/ say of their graphs
MEND = f"Write the folder again with {manifest.MADE_WITH['graphs']}."


@dataclass(frozen=True)
class Graphs:
    """A complete graphs/ folder."""

    source: manifest.Manifest
    config: Config
    symbolic: dict[str, GraphSpec]  # every graph of this model, batch and length symbolic
    written: dict[str, GraphSpec]  # the graphs in the folder, as they were exported

    @property
    def content(self) -> dict[str, Any]:
        return self.source.content

    def path(self, name: str) -> Path:
        """The file of graph `name`."""
        return self.source.folder / str(self.content["graphs"][name]["file"])

    @property
    def tokenizer(self) -> Path:
        """The vocabulary that was copied beside the graphs."""
        return self.source.folder / str(self.content["tokenizer"]["file"])

    def first_of(self, *choices: tuple[str, ...]) -> tuple[str, ...]:
        """The first group of graphs that is all here. Raises UserError naming what is missing."""
        for names in choices:
            if all(name in self.written for name in names):
                return names
        missing = [name for name in choices[0] if name not in self.written]
        raise UserError(
            f"{self.source.folder} has no graph {missing[0]!r}. Export it: blip-export --graphs {','.join(choices[0])} ..."
        )


def read_graphs(folder: Path, verify: bool = False) -> Graphs:
    """Open a graphs/ folder. Raises UserError when it is damaged, incomplete or of another release."""
    found = manifest.read(folder, "graphs", verify)
    try:
        config = from_dict(found.content["config"], str(folder / manifest.NAME))
        symbolic = graph_specs(config)
        written = {name: spec_from_dict(name, values) for name, values in found.content["graphs"].items()}
        if lacking := [part for part in KEPT if part not in found.content]:
            raise KeyError(lacking[0])  # now, and not when the work is done
        str(found.content["tokenizer"]["sha256"])
        listed = {str(values["file"]) for values in found.content["graphs"].values()} | {str(found.content["tokenizer"]["file"])}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / manifest.NAME} lacks or garbles {error}. {MEND}") from error
    if missing := sorted(listed - found.files.keys()):
        raise UserError(f"{folder / manifest.NAME} does not list its own file {missing[0]!r}. {MEND}")
    for name, spec in written.items():
        if name not in symbolic:
            raise UserError(f"{folder} holds a graph {name!r} that this release does not know. {MEND}")
        _form(spec, symbolic[name], folder)
    return Graphs(found, config, symbolic, written)


def fixed_sizes(graphs: Graphs, name: str) -> tuple[int | None, int | None]:
    """Batch and text length that graph `name` was exported for; None where it takes any."""
    return _form(graphs.written[name], graphs.symbolic[name], graphs.source.folder)


def _form(written: GraphSpec, symbolic: GraphSpec, folder: Path) -> tuple[int | None, int | None]:
    """Bind `symbolic` to what was written; a graph that cannot be had that way is not ours."""
    sizes: dict[str, int | str] = {}
    same = len(written.inputs) == len(symbolic.inputs) and len(written.outputs) == len(symbolic.outputs)
    for ours, theirs in zip(symbolic.inputs + symbolic.outputs, written.inputs + written.outputs, strict=False):
        same = same and (ours.name, ours.dtype, len(ours.shape)) == (theirs.name, theirs.dtype, len(theirs.shape))
        for dim, found in zip(ours.shape, theirs.shape, strict=False):
            same = same and (sizes.setdefault(dim, found) if isinstance(dim, str) else dim) == found
    if not same:
        raise UserError(f"The graph {written.name!r} in {folder} has other inputs or outputs than this release expects. {MEND}")
    batch, length = sizes.get(BATCH), sizes.get(LENGTH)
    return (batch if isinstance(batch, int) else None), (length if isinstance(length, int) else None)
