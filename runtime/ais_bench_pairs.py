"""The candidates of a run that ais_bench does, as files that it takes: `blip-run pairs`, between its two stages.

A file of each input of itm_cached holds a whole batch, R captions of one picture: text_ids and text_atten_mask (R, L), a short
last batch filled with copies, and cross_kv (1, ...), the keys and values that image_kv gave of the picture. These are 42 MB for
each picture of BLIP base, 212 GB for the 5,000 of COCO: they are hard links to image_kv's own files where the disk allows it, and
copied once for each picture where it does not. P pairs, L tokens.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from models import manifest
from models.errors import Misuse, UserError
from models.spec import TensorSpec
from preprocess.dataset import RetrievalData
from preprocess.tensors import FILE_MODE, FOLDER_MODE, PACKED, Writer, open_tensor
from runtime.ais_bench import SUFFIX, BinFiles, parts
from runtime.ais_bench_batches import chunks, named, tag_of, too_many
from runtime.ais_bench_run import IMAGE_KV, ITM, MOST_FILES, PAIRS, AisRun, bytes_of, read_run, size
from runtime.plan import Plan, plan_pairs
from runtime.rerank import itm_ids

KIND = "pairs"
CROSS_KV = "cross_kv"
FIELDS = {"pair_image": "image", "pair_text": "text", "pair_direction": "direction", "pair_sim": "sim"}  # of a Plan


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    data: Path
    ais_bench: Path  # what ais_bench wrote of the first stage
    out: Path | None  # None: beside it
    k_test: int | None  # None takes that of the script
    rows: int | None  # None takes the batch of itm_cached


def write_pairs(options: Options, say: Callable[[str], None]) -> Path:
    """Write the folder of pairs, and return it; says before what disk it takes.

    Raises UserError when what ais_bench wrote is not whole, or the disk has not the space; Misuse for rows that itm_cached does
    not take.
    """
    run = read_run(options.ais_bench)
    data = run.open_data(options.data)
    image_embed, text_embed = run.embeddings(data)
    kv = run.outputs(IMAGE_KV, len(data.images))[CROSS_KV]
    entry, k = run.entry(ITM), options.k_test or int(run.content["k_test"])
    rows = options.rows or entry.batch
    if rows != entry.batch:
        raise Misuse(f"--rows is {rows}, and ais_bench.sh runs {entry.file}, which takes {entry.batch}. Leave it out.")
    plan = plan_pairs(image_embed, text_embed, k)
    batches, tag = chunks(plan.image, rows), tag_of(plan, rows)
    if len(batches) > MOST_FILES:
        raise UserError(too_many(f"{len(batches):,}", rows, len(data.images), len(data.captions), k))
    out = options.out or run.source.folder / PAIRS
    takes = {tensor.name: tensor for tensor in entry.spec.inputs}
    with manifest.new_folder(out, KIND) as folder:
        folder.chmod(FOLDER_MODE)
        linked = kv.stored == np.dtype(takes[CROSS_KV].dtype) and _links(kv.paths[0], folder)
        captions = 2 * len(batches) * rows * math.prod(data.ids.shape[1:]) * data.ids.dtype.itemsize
        say(f"{len(plan.image):,} pairs at k_test {k}, in {len(batches):,} batches of {rows} captions of one picture.")
        _check_disk(folder, captions, bytes_of(takes[CROSS_KV]), len(np.unique(plan.image)), linked, say)
        names = named(tag, len(batches))
        _write_captions(folder, data, plan, dict(zip(names, batches, strict=True)), rows)
        _write_kv(folder, plan, dict(zip(names, batches, strict=True)), kv, takes[CROSS_KV], linked)
        content = {
            "task": "pairs",
            "layout": PACKED,
            "tensors": _write_plan(folder, plan),
            "inputs": {name: {"dtype": tensor.dtype, "shape": list(tensor.shape)} for name, tensor in takes.items()},
            "tag": tag,
            "rows": rows,
            "k_test": k,
            "ais_bench": run.source.digest,
            "data": {"digest": data.source.digest, "folder": str(options.data.absolute())},
        }
        # Without cross_kv: they are files of image_kv, and hashing them would take longer than the NPU does.
        ours = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name != CROSS_KV)
        files = {path.relative_to(folder).as_posix(): manifest.file_record(path) for path in ours}
        manifest.write(folder, KIND, content, files)
    return out


@dataclass(frozen=True)
class Pairs:
    """A folder of pairs, read again."""

    plan: Plan
    rows: int  # captions of a batch
    k_test: int
    folder: Path

    def logits(self, run: AisRun) -> np.ndarray:
        """itm_logits (P, 2) of what ais_bench wrote of itm_cached, without the rows that filled a batch. Raises UserError when it
        ran over other pairs, as well."""
        batches, tag = chunks(self.plan.image, self.rows), tag_of(self.plan, self.rows)
        for part in parts(run.ais / ITM):
            (first, *_), _ = next(part.samples())
            if not Path(first).name.startswith(f"{tag}_"):
                raise UserError(
                    f"{part.summary} is of other pairs than {self.folder}: {ITM} was fed {first}, and the files of these begin "
                    f"with {tag}_. Run it again: bash ais_bench.sh {ITM}."
                )
        held = run.outputs(ITM, len(batches) * self.rows, named(tag, len(batches)))["itm_logits"]
        held.refuse_nan("itm_logits")
        kept = [number * self.rows + np.arange(part.stop - part.start) for number, part in enumerate(batches)]
        return held[np.concatenate(kept)] if kept else held[:]


def read_pairs(folder: Path, run: AisRun, verify: bool = False) -> Pairs:
    """Open a folder of pairs. Raises UserError when it is damaged, or of another run."""
    found = manifest.read(folder, KIND, verify)
    again = f"Write it again with {manifest.MADE_WITH[KIND]}."
    try:
        rows, k_test, digest = int(found.content["rows"]), int(found.content["k_test"]), found.content["ais_bench"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / manifest.NAME} lacks or garbles {error}. {again}") from error
    if digest != run.source.digest or rows != run.entry(ITM).batch:
        raise UserError(f"{folder} holds the pairs of another run than {run.source.folder}. {again}")
    plan = Plan(**{field: np.asarray(open_tensor(found, name)[:]) for name, field in FIELDS.items()})
    if found.content.get("tag") != tag_of(plan, rows):
        raise UserError(f"{folder / manifest.NAME} does not say which pairs its files are of. {again}")
    return Pairs(plan, rows, k_test, folder)


def _check_disk(folder: Path, captions: int, each: int, pictures: int, linked: bool, say: Callable[[str], None]) -> None:
    """Say what will be written, in bytes, and raise UserError when there is no space for it."""
    kv = f"{size(each)} for each of {pictures:,} pictures, {size(each * pictures)} in all"
    how = f"linked to the files of {IMAGE_KV}, which takes no disk" if linked else "copied"
    say(f"It takes {size(captions)} for the captions; keys and values ({kv}) are {how}.")
    needed, free = captions + (0 if linked else each * pictures), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"The pairs take {size(needed)}, and the disk of {folder.parent} has {size(free)} free.")


def _write_captions(folder: Path, data: RetrievalData, plan: Plan, batches: dict[str, slice], rows: int) -> None:
    for name, values in (("text_ids", itm_ids(data)), ("text_atten_mask", np.asarray(data.mask[:]))):  # (M, L)
        held = _folder(folder / name)
        for stem, part in batches.items():
            _write(held / f"{stem}{SUFFIX}", values[_filled(plan.text[part], rows)])


def _filled(texts: np.ndarray, rows: int) -> np.ndarray:
    """With copies of the last one."""
    return np.pad(texts, (0, rows - len(texts)), mode="edge")


def _write_kv(folder: Path, plan: Plan, batches: dict[str, slice], kv: BinFiles, wanted: TensorSpec, linked: bool) -> None:
    """One file a batch; the second and later ones of a picture are links to its first."""
    held = _folder(folder / CROSS_KV)
    first: dict[int, Path] = {}
    for stem, part in tqdm(batches.items(), CROSS_KV, unit=" files", disable=None):
        picture, path = int(plan.image[part.start]), held / f"{stem}{SUFFIX}"
        source = first.setdefault(picture, kv.paths[picture] if linked else path)
        if source != path:
            os.link(source, path)
            continue
        _write(path, kv[picture].astype(wanted.dtype))


def _folder(path: Path) -> Path:
    path.mkdir()
    path.chmod(FOLDER_MODE)
    return path


def _write(path: Path, values: np.ndarray) -> None:
    path.write_bytes(values.tobytes())
    path.chmod(FILE_MODE)


def _write_plan(folder: Path, plan: Plan) -> dict[str, Any]:
    infos = {}
    for name, field in FIELDS.items():
        values = getattr(plan, field)
        with closing(Writer(folder, name, values.dtype.name, values.shape)) as writer:
            writer.write(0, values)
            infos[name] = {**writer.info(), "layout": PACKED}
    return infos


def _links(path: Path, folder: Path) -> bool:
    """Whether a file may have a second name in `folder`: not on another disk, nor on one that has no such thing."""
    name = folder / ".linked"
    try:
        os.link(path, name)
    except OSError:
        return False
    name.unlink()
    return True
