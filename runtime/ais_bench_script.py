"""The folder of a retrieval run that ais_bench does: which .om of each graph runs, over which files, is settled here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models import manifest
from models.errors import Misuse, UserError
from models.om import OmEntry, entry_to_dict
from models.spec import TensorSpec
from preprocess.dataset import RetrievalData, read_retrieval
from preprocess.tensors import FILES, FOLDER_MODE
from runtime.ais_bench_bash import FED, SCRIPT, Step, output_bytes, script
from runtime.ais_bench_batches import enough, fewest, too_many
from runtime.ais_bench_run import AIS, FEEDS, IMAGE_KV, ITM, KIND, MOST_FILES, PAIRS, size
from runtime.graphs import KEPT, OM_KEPT, Graphs, read_graphs
from runtime.place import batches_of, smaller_batches
from runtime.retrieval import CAPTION_GRAPHS, PICTURE_GRAPHS
from runtime.run import refuse_mixed

PLAIN = re.compile(r"[A-Za-z0-9_./-]+")  # paths that ais_bench takes


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    om: Path
    data: Path
    out: Path
    batchsize: int
    itm_batchsize: int
    device: int
    k_test: int | None = None  # None takes the model's


def write_script(options: Options, say: Callable[[str], None]) -> None:
    """Write the folder `out`: ais_bench.sh and a manifest that says which .om of each graph it runs, of which data.

    Raises Misuse when `out` holds results that would be lost or the data is not in files, UserError when om/ and data do not
    fit, or ais_bench could not take them as they are.
    """
    graphs, data = read_graphs(options.om), read_retrieval(options.data)
    if not graphs.is_om:
        raise Misuse(f"{options.om} holds graphs that ais_bench cannot run; --om takes the folder of blip-atc.")
    refuse_mixed(graphs, data)
    if data.source.content["layout"] != FILES:
        raise Misuse(
            f"{options.data} is packed, and ais_bench reads files: write it again with blip-pre retrieval --layout {FILES}."
        )
    if held := [name for name in (AIS, PAIRS) if (options.out / name).exists()]:
        raise Misuse(f"{options.out / held[0]} holds results, which would be lost. Move it away, or choose another --out.")
    steps, k = plan(graphs, data, options), options.k_test or graphs.config.protocol.k_test
    rows = {step.graph: options.itm_batchsize if step.graph == ITM else options.batchsize for step in steps}
    notes = [*smaller_batches(graphs, rows), *_pairs_fit(steps, data, k)]
    with manifest.new_folder(options.out, KIND) as folder:
        folder.chmod(FOLDER_MODE)
        path = folder / SCRIPT
        path.write_text(script(steps, options.device), "utf-8")
        path.chmod(0o750)
        used = [step.graph for step in steps]
        content = {
            "task": "retrieval",
            "graphs": {name: graphs.content["graphs"][name] for name in used},
            "oms": [entry_to_dict(step.entry) for step in steps],
            "made_of": {
                "digest": graphs.source.digest,
                "folder": str(options.om.absolute()),
                "used": used,
                **{key: graphs.content[key] for key in KEPT},
            },
            "backend": {
                "provider": "om, by python -m ais_bench",
                **{key: graphs.content[key] for key in OM_KEPT},
                "device": [options.device],
                "batchsize": options.batchsize,
                "itm_batchsize": options.itm_batchsize,
                **batches_of(graphs, rows),
            },
            "data": {"digest": data.source.digest, "folder": str(options.data.absolute())},
            "k_test": k,
        }
        manifest.write(folder, KIND, content, files={})  # not the script: it may be changed
    for step in steps:
        fed = "what blip-run pairs will write"
        if step.files is not None:
            fed = f"{step.files:,} files to {size(step.files * output_bytes(step))}"
        say(f"{step.graph:<12} {step.model}, {fed}, in batches of {step.entry.batch}")
    for note in notes:
        say(note)
    if ITM not in used:
        say(f"{options.om} has not both {IMAGE_KV} and {ITM}: there will be no re-ranking.")


def plan(graphs: Graphs, data: RetrievalData, options: Options) -> list[Step]:
    """The graphs in the order in which they run; those that re-rank only where om/ has both."""
    pictures, captions = graphs.first_of(*PICTURE_GRAPHS), graphs.first_of(*CAPTION_GRAPHS)
    matching = (IMAGE_KV, ITM) if {IMAGE_KV, ITM} <= graphs.written.keys() else ()
    steps: list[Step] = []
    for name in (*captions, *pictures, *matching):
        sized = graphs.at(options.itm_batchsize if name == ITM else options.batchsize)
        steps.append(_step(sized.path(name), sized.oms[name], data, steps, options.out))
    return steps


def _pairs_fit(steps: list[Step], data: RetrievalData, k: int) -> list[str]:
    """Raise UserError when ais_bench cannot take the pairs, before hours of work and a full disk; returns what is to be said when
    that depends on which they are."""
    pictures, captions = len(data.images), len(data.captions)
    for step in steps:
        if step.graph == ITM:
            rows, sufficient = step.entry.batch, enough(pictures, captions, k)
            if (least := fewest(pictures, captions, k, rows)) > MOST_FILES:
                raise UserError(too_many(f"at least {least:,}", rows, pictures, captions, k))
            if sufficient is None or rows < sufficient:
                return [f"{ITM}: blip-run pairs may find more batches of {rows} than ais_bench takes; {sufficient} is enough."]
    return []


def _step(path: Path, entry: OmEntry, data: RetrievalData, before: list[Step], out: Path) -> Step:
    model = _from(out, path)
    if entry.graph == ITM:
        kv = next(step.entry.spec.outputs[0] for step in before if step.graph == IMAGE_KV)
        for tensor in entry.spec.inputs:
            if tensor.name in FEEDS:
                held = getattr(data, FEEDS[tensor.name])
                _same(tensor, entry, str(held.dtype), tuple(held.shape[1:]), str(data.source.folder / FEEDS[tensor.name]))
            elif tensor.sample_shape != kv.sample_shape:
                _same(tensor, entry, tensor.dtype, kv.sample_shape, f"what {IMAGE_KV} gives")
        return Step(entry, model, tuple(f"{PAIRS}/{tensor.name}" for tensor in entry.spec.inputs), None)
    folders, counts, fed_by = [], set[int](), None
    for tensor in entry.spec.inputs:
        if tensor.name in FEEDS:
            held = getattr(data, FEEDS[tensor.name])
            _same(tensor, entry, str(held.dtype), tuple(held.shape[1:]), str(data.source.folder / FEEDS[tensor.name]))
            folders.append(_from(out, data.source.folder / FEEDS[tensor.name]))
            counts.add(len(held))
            continue
        graph, number, given = next(
            (step.entry.graph, number, given)
            for step in before
            for number, given in enumerate(step.entry.spec.outputs)
            if given.name == tensor.name
        )
        _same(tensor, entry, given.dtype, given.sample_shape, f"what {graph} gives")
        folders.append(f"{FED}/{tensor.name}")
        counts.add(len(data.images))
        fed_by = (graph, number, tensor.name)
    (files,) = counts
    if files > MOST_FILES:
        raise UserError(f"{data.source.folder} has {files:,} files in a folder; ais_bench takes {MOST_FILES:,}. Divide the data.")
    return Step(entry, model, tuple(folders), files, fed_by)


def _same(tensor: TensorSpec, entry: OmEntry, dtype: str, shape: tuple[object, ...], where: str) -> None:
    """ais_bench compares bytes alone, and packs whatever fits."""
    if (tensor.dtype, tensor.sample_shape) != (dtype, shape):
        raise UserError(
            f"{entry.file} takes {tensor.name} as {tensor.dtype} {list(tensor.sample_shape)}; {where} is {dtype} {list(shape)}. "
            "Compile it so that both are alike; blip-run needs no such thing."
        )


def _from(out: Path, path: Path) -> str:
    """`path` as it is named from the folder `out`. Raises UserError when ais_bench would refuse it."""
    found = os.path.relpath(os.path.realpath(path), os.path.realpath(out))
    if not PLAIN.fullmatch(found):
        raise UserError(f"ais_bench takes paths of A-Z a-z 0-9 _ . / - alone, and {found!r} has others. Move the folder.")
    return found
