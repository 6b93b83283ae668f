"""Reading what `python -m ais_bench` wrote: one .bin per sample and output, and a summary that says what was made of what.

ais_bench pairs the files of several inputs by their place alone, packs them into batches by their bytes, and ends well when
that went wrong. So the summary is believed only where the stems of the files agree, and the files only where they have the
bytes that they must have. Of all its years: `<folder>_summary.json` beside the folder, `*_summary.json` or `sumary.json` in it,
and a folder for each device where there were several. Needs no engine.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import UserError
from models.spec import GraphSpec, TensorSpec
from runtime.batches import slices

PADDING = "padding_infer_fake_file"  # what ais_bench calls a row that fills a batch
SUMMARY = "_summary.json"
OLD_SUMMARY = "sumary.json"  # as it was spelt
SUFFIX = ".bin"
HALF, FLOAT = np.dtype("float16"), np.dtype("float32")
AGAIN = "Remove the folder and run the graph again."
YES = ("yes", "true", "t", "y", "1")  # how ais_bench is told so
ROWS = 4096  # of an output, held at a time


class BinFiles:
    """One output of all samples, in files of `rows` each; float16 is widened. Indexing reads from disk."""

    def __init__(self, paths: Sequence[Path], dtype: np.dtype[Any], shape: tuple[int, ...], rows: int) -> None:
        self.paths, self.stored, self.rows, self.shape = paths, dtype, rows, shape
        self.dtype = FLOAT if dtype == HALF else dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        wanted = np.arange(len(self))[index]
        flat = wanted.reshape(-1)
        out = np.empty((len(flat), *self.shape[1:]), self.dtype)
        order = np.argsort(flat, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(flat[order] // self.rows)) + 1):
            if len(part):
                held = np.fromfile(self.paths[flat[part[0]] // self.rows], self.stored)
                out[part] = held.reshape(self.rows, *self.shape[1:])[flat[part] % self.rows]
        return out.reshape(*wanted.shape, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def refuse_nan(self, name: str) -> None:
        """Raise UserError, with the file's name, when there is NaN or infinity in this output, called `name`."""
        for part in slices(0, len(self), ROWS):
            finite = np.isfinite(self[part]).reshape(part.stop - part.start, -1).all(axis=1)
            if not finite.all():
                path = self.paths[(part.start + int(finite.argmin())) // self.rows]
                raise UserError(
                    f"{path} holds NaN or infinity: {path.parent.name} gave it in {name}, and nothing can be ranked by it. Check "
                    "the checkpoint, and the precision of the graphs."
                )


@dataclass(frozen=True)
class Part:
    """What one device did: its summary, and the folder that it wrote to."""

    summary: Path
    folder: Path
    said: dict[str, Any]

    def samples(self) -> Iterator[tuple[list[str], list[str]]]:
        """The files that each sample was made of, one per input, and those that were made of it, one per output."""
        found = self.said["filesinfo"]
        for key in sorted(found, key=int):
            yield [str(name) for name in found[key]["infiles"]], [str(name) for name in found[key]["outfiles"]]

    def option(self, *names: str) -> str | None:
        """What ais_bench was given with an option; None when it was not."""
        given = [word for arg in self.said.get("args", []) for word in str(arg).split("=", 1)]
        return next((value for name, value in itertools.pairwise(given) if name in names), None)

    def runs(self) -> int | None:
        """How often the graph ran, without what --loop repeats; None when the summary does not tell."""
        count = self.said.get("NPU_compute_time", {}).get("count")
        if not isinstance(count, int) or (self.option("--pipeline") or "").lower() in YES:
            return None
        loop = max(1, int(self.option("--loop", "-l") or 1))
        return None if count % loop else count // loop

    def seconds(self) -> float:
        """How long the NPU computed: copies and files left out."""
        times = self.said.get("NPU_compute_time", {})
        return float(times.get("mean", 0.0)) * int(times.get("count", 0)) / 1000


def read_folder(folder: Path, spec: GraphSpec, samples: int, stems: Sequence[str], sources: Sequence[str]) -> dict[str, BinFiles]:
    """The outputs of a graph for all samples, by name, in the order of `stems`; float16 becomes float32.

    Args:
        folder: what --output and --output_dirname named.
        spec: of the .om that ran, every axis a number, the first of its first input the batch.
        samples: rows wanted. With as many `stems` a file has one row; with fewer it has a whole batch, the last one padded.
        stems: names without suffix of the files of every input, in the order of the samples.
        sources: what the folder of each input's files is called, in the order of the spec's inputs.

    Raises UserError, with the file's name, when one is missing, is of no sample, has other bytes than it must have, or was made
    of inputs that do not belong together; and when ais_bench did not end.
    """
    batch = int(spec.inputs[0].shape[0])
    rows = 1 if len(stems) == samples else batch
    if len(stems) != -(-samples // rows):
        raise ValueError(f"{len(stems)} files of {rows} rows are not {samples} samples")
    wanted, found = set(stems), dict[str, list[Path]]()
    for part in parts(folder):
        made = _made(part, spec, wanted, sources)
        _check_runs(part, spec, len(made), batch // rows)
        _check_surplus(part, made)
        found = made | found  # without --divide_input each device of today does all samples
    if missing := [stem for stem in stems if stem not in found]:
        raise UserError(
            f"{folder} has no {missing[0]}_0{SUFFIX}, nor does its summary name it: {len(missing)} of {len(stems)} files are "
            f"missing. {AGAIN}"
        )
    paths = [[found[stem][number] for stem in stems] for number in range(len(spec.outputs))]
    return {tensor.name: _tensor(tensor, files, rows, samples) for tensor, files in zip(spec.outputs, paths, strict=True)}


def npu_seconds(folder: Path) -> float:
    """How long the NPU computed, by the summary of `folder`; of several devices the longest."""
    return max(part.seconds() for part in parts(folder))


def parts(folder: Path) -> list[Part]:
    """What each device did, in one part unless there were several. Raises UserError when a summary is missing or damaged."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. ais_bench writes it: run ais_bench.sh, of blip-run ais-bench-script.")
    return [_part(each) for each in sorted(folder.glob("device*")) if each.is_dir()] or [_part(folder)]


def _part(folder: Path) -> Part:
    inside = sorted(folder.glob(f"*{SUMMARY}"))
    choices = [folder.with_name(folder.name + SUMMARY), folder / OLD_SUMMARY, *(inside if len(inside) == 1 else [])]
    path = next((choice for choice in choices if choice.is_file()), None)
    if path is None:
        raise UserError(
            f"{folder} has no summary, neither {folder.name}{SUMMARY} beside it nor {OLD_SUMMARY} in it: ais_bench has not come "
            f"to its end. {AGAIN}"
        )
    try:
        said = json.loads(path.read_text("utf-8"))
        part = Part(path, folder, said)
        if not (samples := list(part.samples())):
            raise ValueError("no files")
        if not all(fed for fed, _ in samples):
            raise ValueError("a sample was made of no file")
        part.runs(), part.seconds()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is no summary of ais_bench that names files ({type(error).__name__}: {error}). {AGAIN}"
        ) from error
    return part


def _made(part: Part, spec: GraphSpec, wanted: set[str], sources: Sequence[str]) -> dict[str, list[Path]]:
    """The files of each stem, one per output."""
    found: dict[str, list[Path]] = {}
    for fed, given in part.samples():
        if fed[0] == PADDING:
            continue
        stem = _stem(fed[0])
        if stem not in wanted:
            raise UserError(f"{part.summary} names {fed[0]}, which is no sample of this data. {AGAIN}")
        if len(fed) != len(spec.inputs):
            raise UserError(
                f"{part.summary}: {fed[0]} went with {len(fed)} inputs; {spec.name} takes {len(spec.inputs)}. {AGAIN}"
            )
        for tensor, name in zip(spec.inputs[1:], fed[1:], strict=True):
            if _stem(name) != stem:
                lacking = (
                    f"{stem}{SUFFIX} of {tensor.name}" if name == PADDING else Path(name).with_name(stem + Path(name).suffix)
                )
                raise UserError(
                    f"{part.summary}: {fed[0]} went with {name}, so this and all that follow are shifted: {lacking} was "
                    "missing, or a file too many stood before it. Give all folders files of the same names, and run it again."
                )
        for tensor, source, name in zip(spec.inputs, sources, fed, strict=True):
            if Path(name).parent.name != source:
                raise UserError(
                    f"{part.summary}: {tensor.name} of {spec.name} was fed {name}; expected the files of a folder {source}. Give "
                    f"--input the folders in this order: {', '.join(sources)}. {AGAIN}"
                )
        expected = [f"{stem}_{number}{SUFFIX}" for number in range(len(spec.outputs))]
        names = [Path(name).name for name in given]
        if names != expected or stem in found:
            raise UserError(
                f"{part.summary}: of {fed[0]} it wrote {', '.join(names) or 'nothing'}; expected {', '.join(expected)}, once "
                f"(--outfmt BIN, one file for each output of {spec.name}). {AGAIN}"
            )
        found[stem] = [part.folder / name for name in names]
    return found


def _check_runs(part: Part, spec: GraphSpec, files: int, together: int) -> None:
    """Files of another type than the .om takes have other bytes: ais_bench packs more or fewer of them into a batch, and says
    nothing."""
    runs, expected = part.runs(), -(-files // max(together, 1))
    if runs is not None and runs != expected:
        raise UserError(
            f"{part.summary}: the graph ran {runs} times over {files} files; in batches of {together} that would be {expected}. "
            f"The .om takes {spec.inputs[0].name} in other bytes than the files have, as one compiled for int32 does: its "
            f"numbers are of no use. Compile {spec.name} again with blip-atc."
        )


def _check_surplus(part: Part, made: dict[str, list[Path]]) -> None:
    known = {path.name for paths in made.values() for path in paths}
    for path in sorted(part.folder.iterdir()):
        if path.name not in known and path.name != OLD_SUMMARY and not path.name.endswith(SUMMARY):
            raise UserError(f"{path} is no output that {part.summary} names: it is of another run. {AGAIN}")


def _tensor(tensor: TensorSpec, paths: list[Path], rows: int, samples: int) -> BinFiles:
    """The files of one output, each of them there and of the right bytes."""
    shape = tuple(int(dim) for dim in tensor.sample_shape)
    values = rows * math.prod(shape)
    kinds: list[np.dtype[Any]] = [FLOAT, HALF] if np.dtype(tensor.dtype).kind == "f" else [np.dtype(tensor.dtype)]
    by_size = {values * kind.itemsize: kind for kind in kinds}
    dtype: np.dtype[Any] | None = None
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing, though the summary names it. {AGAIN}")
        size = path.stat().st_size
        if size not in by_size or (dtype or by_size[size]) != by_size[size]:
            form = " or ".join(f"{bytes_:,} as {kind}" for bytes_, kind in by_size.items() if dtype in (None, kind))
            raise UserError(
                f"{path} has {size:,} bytes; {tensor.name} of {rows} sample{'s' if rows > 1 else ''} {list(shape)} has {form}. "
                "It was cut short, or the .om takes its inputs in another type than the files have, and others shared its batch."
            )
        dtype = by_size[size]
    return BinFiles(paths, dtype or FLOAT, (samples, *shape), rows)


def _stem(name: str) -> str:
    """As ais_bench makes it: up to the first dot."""
    return Path(name).name.split(".")[0]
