"""The graphs/ folder as the runtime sees it: which graphs there are, in which form, and which of them to use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import manifest
from models.config import Config
from models.config_file import from_dict
from models.errors import UserError
from models.spec import BATCH, LENGTH, GraphSpec, graph_specs, spec_from_dict

KEPT = ("model", "config", "opset", "target", "precision", "checkpoint", "parity")  # what outputs/ say of their graphs
MEND = f"Write the folder again with {manifest.MADE_WITH['graphs']}."
STATIC = "atc"  # the target whose graphs have fixed axes, and buffers that the caller fills (export/targets.py)


@dataclass(frozen=True)
class Graphs:
    """A complete graphs/ folder."""

    source: manifest.Manifest
    config: Config
    symbolic: dict[str, GraphSpec]  # every graph of this model in the form of the folder's target, axes symbolic
    written: dict[str, GraphSpec]  # the graphs in the folder, as they were exported

    @property
    def content(self) -> dict[str, Any]:
        return self.source.content

    def path(self, name: str) -> Path:
        """The file of graph `name`."""
        return self.source.folder / str(self.content["graphs"][name]["file"])

    @property
    def is_static(self) -> bool:
        """Whether graphs that write words have buffers of fixed size."""
        return bool(self.content["target"] == STATIC)

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
        raise UserError(
            f"{self.source.folder} has no graph {missing[0]!r}. Export it: blip-export --graphs {','.join(choices[0])} ..."
        )


def read_graphs(folder: Path, verify: bool = False) -> Graphs:
    """Open a graphs/ folder. Raises UserError when it is damaged, incomplete or of another release."""
    found = manifest.read(folder, "graphs", verify)
    try:
        config = from_dict(found.content["config"], str(folder / manifest.NAME))
        symbolic = graph_specs(config, static=found.content["target"] == STATIC)
        written = {name: spec_from_dict(name, values) for name, values in found.content["graphs"].items()}
        if lacking := [part for part in KEPT if part not in found.content]:
            raise KeyError(lacking[0])  # now, and not when the work is done
        tokenizer = found.content["tokenizer"]
        str(tokenizer["sha256"])
        listed = {str(values["file"]) for values in found.content["graphs"].values()}
        listed |= {str(name) for name in (tokenizer["file"], *tokenizer.get("files", ()))}
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
