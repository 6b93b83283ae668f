"""A zero-shot classification run: embed the labels, embed the pictures, compare them. Each stage in shards.

N pictures, C labels, Q queries, E embedding.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from models import manifest
from models.config import Blip2Config
from models.errors import Misuse
from preprocess.dataset import ClassifyData, read_classify
from preprocess.pictures import open_graphs
from runtime import run as runs
from runtime.batches import slices
from runtime.embed import ShardWork, image_work
from runtime.graphs import Graphs, read_graphs
from runtime.labels import NO_TEMPERATURE, TEMPLATES, checked_labels, checked_templates, embed_labels, read_labels, temperature_of
from runtime.place import check_files, placed, smaller_batches
from runtime.run import PICTURES_PER_SHARD, Run, already_done, begun, identity_of, refuse_mixed, shards
from runtime.similarity import similarities

SCORES_PER_SHARD = 8192  # pictures
BLOCK_BYTES = 64 << 20  # of one block: vectors and scores
LABEL_GRAPHS = ("text_embed",)
FIRST, MAX = "first", "max"
QUERIES = (FIRST, MAX)  # which query of BLIP-2 speaks for the picture


@dataclass(frozen=True, kw_only=True)
class Options(runs.Options):
    """What the user asked of a classification run."""

    labels: str | None  # with commas between
    labels_file: Path | None  # or one a line; with neither, the classes of the data
    templates: tuple[str, ...]  # none takes the protocol's
    query: str | None  # one of QUERIES, None takes the first
    protocol: str  # one of labels.TEMPLATES
    temperature: float | None  # None takes the checkpoint's


@dataclass(frozen=True)
class Asked:
    """What is computed, as the manifest keeps it."""

    labels: list[str]  # C
    templates: list[str]
    query: str
    protocol: str
    temperature: float
    temperature_from: str  # "option", "checkpoint" or "default"


def run_classify(options: Options, say: Callable[[str], None]) -> manifest.Manifest:
    """Write outputs/; goes on where a stopped run ended, and does nothing when the same run is complete.

    Raises Misuse for labels, templates, a query or a temperature that cannot be, UserError when graphs and data do not fit
    each other, or the work fails.
    """
    graphs, data = read_graphs(options.graphs, options.verify), read_classify(options.data, options.verify)
    refuse_mixed(graphs, data)
    graphs = placed(graphs, options.provider, options.device, options.batchsize)  # before a folder is begun
    looking = graphs.first_of(*picture_graphs(graphs))  # nor should hours of work end at a missing graph
    reading = graphs.first_of(LABEL_GRAPHS)
    asked = _asked(options, graphs, data)
    content = vars(asked)
    identity = identity_of(
        "classify",
        options,
        graphs,
        data,
        # The hash in place of the labels: a message may name it.
        **{**content, "labels": hashlib.sha256(json.dumps(asked.labels).encode()).hexdigest()},
        shards=[PICTURES_PER_SHARD, SCORES_PER_SHARD],  # the journal counts in these
    )
    if done := already_done(options, identity, say):
        return done
    if asked.temperature_from == "default":
        say(f"Warning: {NO_TEMPERATURE}")
    say(f"{len(data.images):,} pictures, {len(asked.labels):,} labels as {', '.join(map(repr, asked.templates))}.")
    rows = dict.fromkeys([*reading, *looking], options.batchsize)
    for line in smaller_batches(graphs, rows):
        say(line)
    check_files(graphs, rows)
    with begun(options, graphs, data, identity) as run:
        _embed_labels(run, asked, reading)  # the quick stage first: it finds a label that cannot be before hours of work
        _embed_pictures(run, data, looking)
        _compare(run, data, asked)
        return run.complete([*reading, *looking], {}, content)


def picture_graphs(graphs: Graphs) -> list[tuple[str, ...]]:
    """The graphs of this model that give image_embed, those with the least work first."""
    choices: tuple[tuple[str, ...], ...] = (("image_embed",), ("image",), ("image_feat", "qformer"))
    return [names for names in choices if all(name in graphs.symbolic for name in names)]


def query_of(graphs: Graphs, asked: str | None) -> str:
    """Which query speaks for the picture. Raises Misuse for a model that has none, and for a name that is none."""
    if asked is None:
        return FIRST
    if asked not in QUERIES:
        raise Misuse(f"There is no query {asked!r}; expected {' or '.join(map(repr, QUERIES))}.")
    if not isinstance(graphs.config, Blip2Config):
        raise Misuse(f"The query {asked!r} was asked for, but these graphs are of BLIP, which has one vector for a picture.")
    return asked


def probabilities(image_embed: np.ndarray, label_embed: np.ndarray, query: str, temperature: float) -> np.ndarray:
    """Softmax over the labels of similarity / temperature: (n, E) or (n, Q, E), and (C, E), to (n, C) float32.

    With Q queries the similarity is the first one's (`query` FIRST), or the largest (MAX).
    """
    if image_embed.ndim == 3 and query == FIRST:
        image_embed = image_embed[:, 0]  # (n, E)
    sims = similarities(image_embed, label_embed).astype(np.float64)  # (n, C)
    weights = np.exp((sims - sims.max(axis=1, keepdims=True)) / temperature)
    found: np.ndarray = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return found


def _asked(options: Options, graphs: Graphs, data: ClassifyData) -> Asked:
    if options.labels is not None and options.labels_file is not None:
        raise Misuse("Both --labels and --labels-file are given; choose one.")
    labels = checked_labels(data.classes)  # for half a character, which a manifest can hold
    if options.labels_file is not None:
        labels = read_labels(options.labels_file)
    elif options.labels is not None:
        labels = checked_labels(options.labels.split(","))
    templates = checked_templates(options.templates or [TEMPLATES[options.protocol]])
    query = query_of(graphs, options.query)
    return Asked(labels, templates, query, options.protocol, *temperature_of(graphs, options.temperature))


def _embed_labels(run: Run, asked: Asked, names: Sequence[str]) -> None:
    """label_embed."""
    count, (spec,) = len(asked.labels), run.graphs.symbolic["text_embed"].outputs
    with closing(run.writer("label_embed", spec.dtype, (count, *spec.sample_shape))) as writer:

        def begin() -> ShardWork:
            (session,) = run.sessions(names)
            config, tokenizer = open_graphs(run.options.graphs)

            def work(start: int, stop: int, bar: tqdm[Any]) -> None:
                batchsize, positions = run.options.batchsize, config.text.positions
                writer.write(start, embed_labels(session, tokenizer, asked.labels, asked.templates, positions, batchsize))
                bar.update(stop - start)

            return work

        run.journal.run_shards("labels", [(0, count)], begin, [writer])


def _embed_pictures(run: Run, data: ClassifyData, names: Sequence[str]) -> None:
    """image_embed."""
    spec = run.graphs.symbolic["image"].output("image_embed")
    with closing(run.writer(spec.name, spec.dtype, (len(data.images), *spec.sample_shape))) as writer:
        run.journal.run_shards(
            "pictures",
            shards(len(data.images), PICTURES_PER_SHARD),
            lambda: image_work(data, run.sessions(names), run.options.batchsize, {spec.name: writer}),
            [writer],
        )


def _compare(run: Run, data: ClassifyData, asked: Asked) -> None:
    """probability."""
    pictures, labels = len(data.images), len(asked.labels)
    with closing(run.writer("probability", "float32", (pictures, labels))) as writer:

        def begin() -> ShardWork:
            image_embed, label_embed = run.open("image_embed"), run.open("label_embed")[:]
            rows = max(1, BLOCK_BYTES // (4 * math.prod(image_embed.shape[1:]) + 8 * labels))

            def work(start: int, stop: int, bar: tqdm[Any]) -> None:
                for part in slices(start, stop, rows):
                    writer.write(part.start, probabilities(image_embed[part], label_embed, asked.query, asked.temperature))
                    bar.update(part.stop - part.start)

            return work

        run.journal.run_shards("scores", shards(pictures, SCORES_PER_SHARD), begin, [writer])
