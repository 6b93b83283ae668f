"""One graph at one text length, and one batch or several, as the command that ATC is called with.

Options and their limits: ATC's manual. Everything is relative to the om/ folder, in which the command is run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from export.atc_precision import reads_pictures
from export.cann import precision_option
from models.errors import Misuse
from models.om import DYNAMIC_BATCH, DYNAMIC_DIMS, FIXED, OmEntry, om_stem
from models.spec import GraphSpec

ONNX = 5  # the framework
MOST_GEARS, LARGEST_GEAR = 100, 2048  # batches of one .om, rows of each
NEEDS_QUOTES = re.compile(r"[^\w./,:=+-]")


@dataclass(frozen=True)
class Job:
    """One call of ATC."""

    stem: str  # of the .om: its name without suffix
    model: str  # the .onnx, as it is named from the om/ folder
    argv: tuple[str, ...]
    entries: tuple[OmEntry, ...]  # one for each batch that the .om takes

    @property
    def graph(self) -> str:
        return self.entries[0].graph


@dataclass(frozen=True)
class Form:
    """How the .om of one graph is asked for."""

    soc: str
    cann: int
    precision: str
    dynamic: str = FIXED
    more: tuple[str, ...] = ()  # options with files, for this graph
    external_weight: bool = False


def job(spec: GraphSpec, bound: Sequence[GraphSpec], model: str, form: Form, length: int | None = None) -> Job:
    """The call for the graph in the file `model`.

    Args:
        spec: as it was exported, open axes by their letters, but with one text length.
        bound: the same with numbers alone, for each batch that the .om is to take, growing; one where `form` is static.
        length: that of the texts, when it is not the graph's longest and the .om is to be named after it.

    Raises Misuse when `form.dynamic` cannot express these batches.
    """
    batches = [_rows(one) for one in bound]
    stem = om_stem(spec.name, batches, length)
    argv = [
        "atc",
        f"--framework={ONNX}",
        f"--model={model}",
        f"--output={stem}",
        f"--input_format={'NCHW' if reads_pictures(spec) and form.dynamic != DYNAMIC_DIMS else 'ND'}",
        *_shapes(spec, bound, form.dynamic),
        precision_option(form.cann, form.precision),
        *form.more,
        *(["--external_weight=1"] if form.external_weight else []),
        f"--soc_version={form.soc}",
        "--log=error",
    ]
    entries = (
        OmEntry(spec.name, batch, f"{stem}.om", one, tuple(argv), form.precision, form.dynamic)
        for batch, one in zip(batches, bound, strict=True)
    )
    return Job(stem, model, tuple(argv), tuple(entries))


def shell(argv: Sequence[str], between: str = " ") -> str:
    """`argv` as it is typed in a shell: the values that need it in double quotes, as in --input_shape="a:1,35;b:1,35"."""
    return between.join(_quoted(part) for part in argv)


def _quoted(part: str) -> str:
    option, equals, value = part.partition("=")
    if not NEEDS_QUOTES.search(part):
        return part
    if equals and not NEEDS_QUOTES.search(option) and not re.search(r'["$`\\!\n]', value):
        return f'{option}="{value}"'
    return shlex.quote(part)


def _shapes(spec: GraphSpec, bound: Sequence[GraphSpec], dynamic: str) -> list[str]:
    """--input_shape, and the sizes that stand for each -1 in it."""
    if dynamic == FIXED:
        return [f"--input_shape={_written(bound[0])}"]
    if not 2 <= len(bound) <= MOST_GEARS or _rows(bound[-1]) > LARGEST_GEAR:
        raise Misuse(
            f"--dynamic {dynamic} takes 2 to {MOST_GEARS} batches of up to {LARGEST_GEAR}, such as --batchsize 1,4,8; for "
            f"{spec.name} there are {len(bound)}, up to {_rows(bound[-1])}."
        )
    gears = [_opened(spec, one) for one in bound]
    if dynamic == DYNAMIC_DIMS:
        return [f"--input_shape={_written(spec)}", "--dynamic_dims=" + ";".join(",".join(map(str, g)) for g in gears)]
    leads = [axis for tensor in spec.inputs for axis, dim in enumerate(tensor.shape) if isinstance(dim, str)]
    if any(leads) or any(len(set(gear)) > 1 for gear in gears):
        raise Misuse(
            f"--dynamic {DYNAMIC_BATCH} gives every open axis the batch, and those of {spec.name} differ. "
            f"Use --dynamic {DYNAMIC_DIMS}."
        )
    return [f"--input_shape={_written(spec)}", f"--dynamic_batch_size={','.join(str(gear[0]) for gear in gears)}"]


def _written(spec: GraphSpec) -> str:
    """name:1,35;name:1,35, with -1 for what is open in `spec`."""
    return ";".join(
        f"{tensor.name}:" + ",".join("-1" if isinstance(dim, str) else str(dim) for dim in tensor.shape) for tensor in spec.inputs
    )


def _opened(spec: GraphSpec, bound: GraphSpec) -> list[int]:
    """The sizes in `bound` of the axes that are open in `spec`, in order."""
    return [
        int(size)
        for open_, one in zip(spec.inputs, bound.inputs, strict=True)
        for dim, size in zip(open_.shape, one.shape, strict=True)
        if isinstance(dim, str)
    ]


def _rows(spec: GraphSpec) -> int:
    return int(spec.inputs[0].shape[0])
