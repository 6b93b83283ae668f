"""A retrieval run: embed the pictures, embed the captions, plan the pairs, score them. Each stage in shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from models import manifest
from models.recipe import departures, wanted
from preprocess.dataset import RetrievalData, read_retrieval
from preprocess.tensors import PACKED
from runtime import run as runs
from runtime.embed import ShardWork, image_work, text_work
from runtime.graphs import read_graphs
from runtime.outputs import I2T, LAVIS, T2I, counted
from runtime.place import batches_of, check_files, placed, smaller_batches
from runtime.plan import Plan, plan_pairs
from runtime.rerank import pair_shards, pair_work
from runtime.run import PICTURES_PER_SHARD, Run, already_done, begun, identity_of, refuse_mixed, shards

CAPTIONS_PER_SHARD = 2048
PAIRS_PER_SHARD = 4096
# Graphs of each stage: the preferred ones, then what does the same with more work or in more steps.
Choices = tuple[tuple[str, ...], ...]
PICTURE_GRAPHS: Choices = (("image",), ("image_embed", "image_feat"), ("image_feat", "qformer"))
CAPTION_GRAPHS: Choices = (("text_embed",),)
PAIR_GRAPHS: Choices = (("image_kv", "itm_cached"), ("itm",))
STAGES = (PICTURE_GRAPHS, CAPTION_GRAPHS, PAIR_GRAPHS)
KEPT = ("image_embed", "image_feat")  # of what the graphs say of a picture


@dataclass(frozen=True, kw_only=True)
class Options(runs.Options):
    """What the user asked of a retrieval run."""

    itm_batchsize: int
    k_test: int | None  # None takes the model's
    feat_dtype: str  # in which image_feat is stored
    protocol: str = LAVIS  # one of outputs.PROTOCOLS
    layout: str = PACKED  # one of tensors.LAYOUTS, of what is said of each picture and caption; pairs are always packed
    recipe: str | None = None  # one of models.recipe, whose k_test is taken where none is given


def run_retrieval(options: Options, say: Callable[[str], None]) -> manifest.Manifest:
    """Write outputs/; goes on where a stopped run ended, and does nothing when the same run is complete.

    Raises UserError when graphs and data do not fit each other, or the work fails.
    """
    graphs, data = read_graphs(options.graphs, options.verify), read_retrieval(options.data, options.verify)
    refuse_mixed(graphs, data)
    graphs = placed(graphs, options.provider, options.device, options.batchsize)  # before a folder is begun
    used = [graphs.first_of(*choices) for choices in STAGES]  # nor should hours of work end at a missing one
    k = wanted(options.recipe, "k_test", options.k_test) or graphs.config.protocol.k_test
    identity = identity_of(
        "retrieval",
        options,
        graphs,
        data,
        k_test=k,
        protocol=options.protocol,
        itm_batchsize=options.itm_batchsize,
        feat_dtype=options.feat_dtype,
        **({} if options.layout == PACKED else {"layout": options.layout}),
        shards=[PICTURES_PER_SHARD, CAPTIONS_PER_SHARD, PAIRS_PER_SHARD],  # the journal counts in these
    )
    if done := already_done(options, identity, say):
        return done
    pictures_there, data = len(data.images), counted(data, options.protocol)
    for line in [*_notes(data, pictures_there, k), *departures(options.recipe, {**data.protocol, "k_test": k})]:
        say(line)
    pictures, captions, pairs = used
    rows = dict.fromkeys([*pictures, *captions], options.batchsize)
    rows |= zip(pairs, [*[1] * (len(pairs) - 1), options.itm_batchsize], strict=True)  # one picture, and then its captions
    for line in smaller_batches(graphs, rows):
        say(line)
    check_files(graphs, rows)
    with begun(options, graphs, data, identity) as run:
        embed_pictures(run, data, pictures, options.feat_dtype, options.layout)
        embed_captions(run, data, captions, options.layout)
        plan = planned(run, data, k)
        say(_describe(plan, k))
        rerank(run, data, plan, pairs, rows)
        backend = {"itm_batchsize": options.itm_batchsize, "feat_dtype": options.feat_dtype, **batches_of(graphs, rows)}
        return run.complete(list(rows), backend, {"k_test": k, "protocol": options.protocol})


def embed_pictures(run: Run, data: RetrievalData, graphs: tuple[str, ...], feat_dtype: str, layout: str = PACKED) -> None:
    """image_embed and image_feat."""
    with ExitStack() as opened:
        writers = {}
        for spec in run.graphs.symbolic["image"].outputs:
            if spec.name in KEPT:
                dtype = feat_dtype if spec.name == "image_feat" else spec.dtype
                writer = run.writer(spec.name, dtype, (len(data.images), *spec.sample_shape), layout)
                writers[spec.name] = opened.enter_context(closing(writer))
        run.journal.run_shards(
            "pictures",
            shards(len(data.images), PICTURES_PER_SHARD),
            lambda: image_work(data, run.sessions(graphs), run.options.batchsize, writers),
            writers.values(),
        )


def embed_captions(run: Run, data: RetrievalData, graphs: tuple[str, ...], layout: str = PACKED) -> None:
    """text_embed."""
    (spec,) = run.graphs.symbolic["text_embed"].outputs
    with closing(run.writer(spec.name, spec.dtype, (len(data.captions), *spec.sample_shape), layout)) as writer:
        run.journal.run_shards(
            "captions",
            shards(len(data.captions), CAPTIONS_PER_SHARD),
            lambda: text_work(data, run.sessions(graphs)[0], run.options.batchsize, writer),
            [writer],
        )


def planned(run: Run, data: RetrievalData, k: int) -> Plan:
    """The pairs, computed once and kept: a resumed run scores the same ones."""
    names = {"pair_image": "image", "pair_text": "text", "pair_direction": "direction", "pair_sim": "sim"}
    if run.journal.has("plan", 0):
        found = {field: np.load(run.folder / f"{name}.npy") for name, field in names.items()}
        for name, field in names.items():
            run.tensors[name] = {"dtype": found[field].dtype.name, "shape": list(found[field].shape)}
        return Plan(**found)
    made: list[Plan] = []

    def work(start: int, stop: int, bar: Any) -> None:
        made.append(plan_pairs(run.open("image_embed"), run.open("text_embed"), k))
        for name, field in names.items():
            values = getattr(made[0], field)
            (run.folder / f"{name}.npy").unlink(missing_ok=True)
            with closing(run.writer(name, values.dtype.name, values.shape)) as writer:
                writer.write(0, values)
                writer.flush()
        bar.update(stop - start)

    run.journal.run_shards("plan", [(0, len(data.images) + len(data.captions))], lambda: work, [])
    return made[0]


def rerank(run: Run, data: RetrievalData, plan: Plan, graphs: tuple[str, ...], rows: Mapping[str, int]) -> None:
    """itm_logits of every planned pair; `rows`: how many each graph is fed at a time."""
    (spec,) = run.graphs.symbolic["itm"].outputs
    with closing(run.writer(spec.name, spec.dtype, (len(plan.image), *spec.sample_shape))) as writer:

        def begin() -> ShardWork:
            sessions = run.sessions(graphs, *(rows[name] for name in graphs))
            return pair_work(data, run.open("image_feat"), plan, sessions, rows[graphs[-1]], writer)

        run.journal.run_shards("pairs", pair_shards(plan, PAIRS_PER_SHARD), begin, [writer])


def _notes(data: RetrievalData, pictures_there: int, k: int) -> list[str]:
    """What is worth knowing before the work begins: that fewer pictures count than are there, that k is beyond the set."""
    lines = []
    if missing := pictures_there - len(data.images):
        lines.append(f"{missing} pictures fill no batch of mindformers: they and their captions are left out.")
    if k > max(len(data.images), len(data.captions)):
        size = f"{len(data.images)} pictures, {len(data.captions)} captions"
        lines.append(f"k_test {k} is larger than the set ({size}): every pair is scored.")
    return lines


def _describe(plan: Plan, k: int) -> str:
    both = int(((plan.direction & (I2T | T2I)) == (I2T | T2I)).sum())
    i2t, t2i = int((plan.direction & I2T).astype(bool).sum()), int((plan.direction & T2I).astype(bool).sum())
    return (
        f"{len(plan.image):,} pairs at k_test {k}: {i2t:,} for the pictures, {t2i:,} for the captions, {both:,} of them for both."
    )
