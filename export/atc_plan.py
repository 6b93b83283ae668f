"""From a graphs/ folder and what was asked: every call of ATC, and the files that these calls name. Nothing is written here."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.atc_command import Form, Job, job
from export.atc_precision import OP_PRECISION, keep_lists, op_precision_text, precisions_asked, reads_texts, usual_precision
from export.cann import OPSETS_READ, ORIGIN
from export.lengths import lengths_of
from export.sizes import PER_SEQUENCE
from export.targets import ASCEND, STATIC
from models import manifest
from models.errors import Misuse, UserError
from models.generation_spec import BEAMS, SLOTS
from models.om import FIXED, KIND, OmEntry, entry_to_dict
from models.spec import BATCH, GraphSpec, spec_from_dict

USUAL_BATCH = 16  # for graphs that take any
LARGEST_OM = 10 * 10**9  # bytes; ais_bench opens none that is larger
# What ATC's manual allows in a path, with Chinese characters.
PATH = re.compile(r"[A-Za-z0-9_./\u4e00-\u9fa5-]+")


@dataclass(frozen=True)
class Options:
    """What is asked of one conversion."""

    graphs: Path
    out: Path  # where the om/ folder will be; the commands name the graphs from there
    only: Sequence[str] | None  # graphs by name; None for all
    batches: Sequence[int] | None  # None for that of the graphs, or USUAL_BATCH
    soc: str
    cann: int
    precision: str | None  # of every graph, or of single ones by name; None for what suits each
    length: str | None  # of texts: one or several; None for the graphs' longest
    dynamic: str
    keep: Path | None
    op_precision: Path | None
    external_weight: bool


@dataclass(frozen=True)
class Plan:
    """The calls of ATC, in order, and what has to stand beside the .om."""

    source: manifest.Manifest
    options: Options
    jobs: tuple[Job, ...]
    files: dict[str, str]  # name in the om/ folder -> text

    def content(self, entries: Sequence[OmEntry]) -> dict[str, Any]:
        """What the manifest says of the .om files in `entries`."""
        graphs = {job.graph: self.source.content["graphs"][job.graph] for job in self.jobs}
        precisions = {entry.precision for entry in entries}
        return {
            **self.source.content,
            "target": KIND,
            "precision": precisions.pop() if len(precisions) == 1 else "by graph",
            "graphs": {name: {"inputs": values["inputs"], "outputs": values["outputs"]} for name, values in graphs.items()},
            "soc": self.options.soc,
            "cann": self.options.cann,
            "graphs_digest": self.source.digest,
            "oms": [entry_to_dict(entry) for entry in entries],
        }

    @property
    def tokenizer(self) -> list[str]:
        """The files of the vocabulary, as the graphs' manifest names them."""
        held = self.source.content["tokenizer"]
        return [str(name) for name in held.get("files", [held["file"]])]


def plan(options: Options) -> Plan:
    """Every call that `options` ask for.

    Raises Misuse for what these graphs cannot be converted to, UserError when their folder is incomplete or damaged.
    """
    source = manifest.read(options.graphs, "graphs")
    try:
        specs = {name: spec_from_dict(name, values) for name, values in source.content["graphs"].items()}
        named = {name: str(values["file"]) for name, values in source.content["graphs"].items()}
        target, opset, sizes = source.content["target"], int(source.content["opset"]), dict(source.content.get("sizes", {}))
        longest = int(sizes["length"]) if target in STATIC else 0  # tokens of a text
        source.content["tokenizer"]["file"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{source.folder / manifest.NAME} lacks or garbles {error}. Write the folder again with blip-export."
        ) from error
    if target not in STATIC:
        raise Misuse(
            f"The graphs in {options.graphs} were exported with --target {target}, whose axes ATC cannot be told. "
            f"Export them with --target {ASCEND}."
        )
    if opset not in (read := OPSETS_READ[options.cann]):
        raise Misuse(
            f"CANN {options.cann} reads opsets {read[0]} to {read[-1]}, these graphs have {opset}. "
            f"Export them with --opset {min(opset, read[-1])}, or choose another --cann."
        )
    files: dict[str, str] = {}
    jobs: list[Job] = []
    names = wanted(options.graphs, options.only, list(specs))
    common, own = precisions_asked(options.precision, names)
    lists = keep_lists(options.keep, names, [name for name, precision in own.items() if precision == ORIGIN])
    lengths = lengths_of([specs[name] for name in names], options.length, longest)
    for name in names:
        model = _model(options, named[name])
        precision = own.get(name) or common or usual_precision(specs[name])
        more = _op_precision(options, specs[name], files)
        if name in lists:
            more += lists[name].option(name, options.graphs / named[name], precision, files)
        form = Form(options.soc, options.cann, precision, options.dynamic, tuple(more), options.external_weight)
        for length in lengths[name]:
            # Bound with a name for a number, which leaves the batch as it is written.
            spec = specs[name].bind(BATCH, length)  # type: ignore[arg-type]
            bound = _bound(options, spec, sizes, length)
            groups = [[one] for one in bound] if options.dynamic == FIXED else [bound]
            jobs += [job(spec, group, model, form, None if length == longest else length) for group in groups]
    for keep in lists.values():
        keep.refuse_unknown(files, [name for name in names if lists.get(name) is keep])
    return Plan(source, options, tuple(jobs), files)


def files_of(source: manifest.Manifest, graph: str) -> list[str]:
    """The files of a graph, as `source` lists them: its own, and that with its weights where it is large."""
    file = str(source.content["graphs"][graph]["file"])
    return [name for name in (file, f"{file}.data") if name in source.files]  # the second is where blip-export puts them


def too_large(made: Plan) -> list[str]:
    """A sentence for each graph whose .om ais_bench would refuse for its size, as far as that can be told from its weights:
    float32 as they are, of which float16 takes half."""
    said = []
    precisions = {} if made.options.external_weight else {each.graph: each.entries[0].precision for each in made.jobs}
    for graph, precision in precisions.items():
        size = sum(int(made.source.files[name]["bytes"]) for name in files_of(made.source, graph))
        if (size := size // (1 if precision == ORIGIN else 2)) > LARGEST_OM:
            said.append(
                f"The .om of {graph} will hold some {size / 1e9:.1f} GB of weights; ais_bench refuses one of more than "
                f"{LARGEST_OM / 1e9:.0f} GB. Add --external-weight."
            )
    return said


def wanted(folder: Path, only: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Those of `known`, the graphs in `folder`, that `only` names, in the order of the folder; None names all.

    Raises Misuse for a name that is not known.
    """
    if only is None:
        return list(known)
    if unknown := [name for name in only if name not in known]:
        raise Misuse(f"{folder} has no graph {unknown[0]!r}; it has: {', '.join(known)}.")
    return [name for name in known if name in only]


def _bound(options: Options, spec: GraphSpec, sizes: dict[str, Any], length: int) -> list[GraphSpec]:
    """`spec` with numbers alone, at each batch asked for, growing, and texts of `length` tokens."""
    own = spec.inputs[0].shape[0]
    if isinstance(own, int):
        fixed = int(sizes.get("batchsize", own))
        asked = options.batches or [fixed]
        if list(asked) != [fixed] or options.dynamic != FIXED:
            wish = f"--dynamic {options.dynamic}" if options.dynamic != FIXED else f"--batchsize {','.join(map(str, asked))}"
            raise Misuse(
                f"{spec.name} was exported for batches of {fixed} alone, asked was {wish}. "
                f"Export it with --target {ASCEND}, which leaves the batch open."
            )
        return [_complete(spec, spec)]
    others = {axis: int(sizes[key]) for axis, key in ((BEAMS, "beams"), (SLOTS, "slots")) if key in sizes}
    each = others.get(BEAMS, 1) if own == BATCH and spec.name in PER_SEQUENCE else 1
    batches = sorted(options.batches or [USUAL_BATCH])
    return [_complete(spec, spec.bind(batch * each, length, **others)) for batch in batches]


def _complete(spec: GraphSpec, bound: GraphSpec) -> GraphSpec:
    for tensor in bound.inputs + bound.outputs:
        if left := [str(dim) for dim in tensor.shape if not isinstance(dim, int)]:
            raise UserError(
                f"{tensor.name} of {spec.name} has an open axis {left[0]!r} beside its batch, which ATC cannot be told. "
                f"Export it with --target {ASCEND}."
            )
    return bound


def _model(options: Options, file: str) -> str:
    """The graph's file as the om/ folder sees it."""
    folder = os.path.relpath(os.path.realpath(options.graphs), os.path.realpath(options.out))
    model = Path(folder, file).as_posix()
    if not PATH.fullmatch(model):
        strange = next(letter for letter in model if not PATH.fullmatch(letter))
        raise Misuse(
            f"ATC reads no path with {strange!r}, and {options.out} names a graph {model!r}. "
            "Choose --graphs and --out without it: letters, digits, '_', '-' and '.' are read."
        )
    return model


def _op_precision(options: Options, spec: GraphSpec, files: dict[str, str]) -> list[str]:
    """The option that names op_precision.ini: for every graph when it was given, else where the Ascend recipe has it."""
    if options.op_precision is None and not reads_texts(spec):
        return []
    files[OP_PRECISION] = op_precision_text(options.op_precision)
    return [f"--op_precision_mode={OP_PRECISION}"]
