"""A features run: what BLIP-2's Q-Former says of pictures, of captions, and of each caption with its own picture.

N pictures, M captions, L tokens, T image tokens. Modes and tensors are those of `extract_features` in salesforce/LAVIS
models/blip2_models/blip2_qformer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from models import manifest
from models.config import Blip2Config
from models.errors import Misuse, UserError
from models.spec import LENGTH
from preprocess.dataset import RetrievalData, read_retrieval
from preprocess.tensors import Writer
from runtime import run as runs
from runtime.batches import prefetched, slices
from runtime.embed import ShardWork, look_at, picture_batch, refuse_nan, text_batches
from runtime.graphs import Graphs, read_graphs
from runtime.place import check_files, placed, smaller_batches
from runtime.run import PICTURES_PER_SHARD, Run, already_done, begun, identity_of, refuse_mixed, shards
from runtime.session import Session

CAPTIONS_PER_SHARD = 1024
IMAGE, TEXT, MULTIMODAL = "image", "text", "multimodal"
# Of each mode: tensor -> graph and the output of it.
TENSORS = {
    IMAGE: {"image_embeds": ("qformer", "query_embed"), "image_embeds_proj": ("qformer", "image_embed")},
    TEXT: {"text_embeds": ("text_feat", "text_feat"), "text_embeds_proj": ("text_feat", "text_feat_proj")},
    MULTIMODAL: {"multimodal_embeds": ("multimodal", "multimodal_embed")},
}
MODES = tuple(TENSORS)

Writers = dict[str, Writer]  # by the output of a graph


@dataclass(frozen=True, kw_only=True)
class Options(runs.Options):
    """What the user asked of a features run."""

    modes: str  # of MODES, with commas between


def run_features(options: Options, say: Callable[[str], None]) -> manifest.Manifest:
    """Write outputs/; goes on where a stopped run ended, and does nothing when the same run is complete.

    Raises Misuse for an unknown mode, UserError when the graphs are not of BLIP-2, when graphs and data do not fit each
    other, or when the work fails.
    """
    modes = modes_of(options.modes)
    graphs, data = read_graphs(options.graphs, options.verify), read_retrieval(options.data, options.verify)
    refuse_blip(graphs)
    refuse_mixed(graphs, data)
    graphs = placed(graphs, options.provider, options.device, options.batchsize)
    looking, matching, reading = graphs_of(graphs, modes)
    identity = identity_of("features", options, graphs, data, modes=modes, shards=[PICTURES_PER_SHARD, CAPTIONS_PER_SHARD])
    if done := already_done(options, identity, say):
        return done
    rows = dict.fromkeys([*looking, *matching, *reading], options.batchsize)
    for line in smaller_batches(graphs, rows):
        say(line)
    check_files(graphs, rows)
    with begun(options, graphs, data, identity) as run, ExitStack() as opened:
        writers = {mode: _writers(run, data, mode, opened) if mode in modes else {} for mode in MODES}
        by_picture = writers[IMAGE] | writers[MULTIMODAL]
        if by_picture:
            run.journal.run_shards(
                "pictures",
                shards(len(data.images), PICTURES_PER_SHARD),
                lambda: picture_work(data, run.sessions(looking), run.sessions(matching), options.batchsize, by_picture),
                by_picture.values(),
            )
        if writers[TEXT]:
            run.journal.run_shards(
                "captions",
                shards(len(data.captions), CAPTIONS_PER_SHARD),
                lambda: text_work(data, run.sessions(reading)[0], options.batchsize, writers[TEXT]),
                writers[TEXT].values(),
            )
        return run.complete([*looking, *matching, *reading], {}, {"modes": modes})


def refuse_blip(graphs: Graphs) -> None:
    """Raise UserError when the graphs are of BLIP, which has no Q-Former."""
    if not isinstance(graphs.config, Blip2Config):
        folder = graphs.source.folder
        raise UserError(f"{folder} holds graphs of BLIP, but features are of BLIP-2's Q-Former: give graphs of BLIP-2.")


def modes_of(text: str) -> list[str]:
    """The modes in `text`, each once, in the order of MODES. Raises Misuse for one that is none."""
    asked = [mode.strip() for mode in text.split(",")]
    if unknown := [mode for mode in asked if mode not in MODES]:
        raise Misuse(f"There is no mode {unknown[0]!r}; known modes, with commas between: {','.join(MODES)}.")
    return [mode for mode in MODES if mode in asked]


def graphs_of(graphs: Graphs, modes: list[str]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The graphs that look at a picture, that match a caption with it, that read a caption. Raises UserError when one is
    not there."""
    looking: tuple[str, ...] = ()
    if IMAGE in modes:
        looking = graphs.first_of(("image",), ("image_feat", "qformer"))
    elif MULTIMODAL in modes:
        looking = graphs.first_of(("image_feat",), ("image",))
    matching = graphs.first_of(("multimodal",)) if MULTIMODAL in modes else ()
    reading = graphs.first_of(("text_feat",)) if TEXT in modes else ()
    return looking, matching, reading


def picture_work(
    data: RetrievalData, looking: list[Session], matching: list[Session], batchsize: int, writers: Writers
) -> ShardWork:
    """What one shard of pictures does: each picture is looked at once, and its captions are matched with what was seen.

    `looking` are the graphs that give image_feat, and with mode image query_embed and image_embed; `matching` is
    `multimodal`, or nothing.
    """
    size = picture_batch(looking, batchsize)
    captions = np.argsort(data.image_of_text, kind="stable")  # (M,) by picture
    first = np.searchsorted(data.image_of_text[captions], np.arange(len(data.images) + 1))  # (N + 1,) where its captions begin

    def work(start: int, stop: int, bar: tqdm[Any]) -> None:
        for part, pictures in prefetched(slices(start, stop, size), lambda part: np.ascontiguousarray(data.img[part])):
            found = look_at(looking, pictures)
            for name in writers.keys() & found.keys():
                refuse_nan(name, found[name])
                writers[name].write(part.start, found[name])
            texts = captions[first[part.start] : first[part.stop]]
            for session in matching:
                match(data, session, found["image_feat"], part.start, texts, batchsize, writers)
            bar.update(len(pictures))

    return work


def match(
    data: RetrievalData, session: Session, feats: np.ndarray, start: int, texts: np.ndarray, batchsize: int, writers: Writers
) -> None:
    """The captions `texts` with their pictures, in batches of like length: feats (B, T, D) are of pictures `start`, ..."""
    ids, mask, seen = data.ids[texts], data.mask[texts], data.image_of_text[texts] - start
    for chosen, found in text_batches(session, ids, mask, batchsize, lambda chosen: {"image_feat": feats[seen[chosen]]}):
        for name, rows in found.items():
            writers[name].scatter(texts[chosen], rows)


def text_work(data: RetrievalData, session: Session, batchsize: int, writers: Writers) -> ShardWork:
    """What one shard of captions does: batches of like length, zeros where a caption has ended."""

    def work(start: int, stop: int, bar: tqdm[Any]) -> None:
        ids, mask = data.ids[start:stop], data.mask[start:stop]
        for chosen, found in text_batches(session, ids, mask, batchsize):
            for name, rows in found.items():
                whole = np.zeros((len(rows), *writers[name].shape[1:]), rows.dtype)  # (B, L, D)
                whole[:, : rows.shape[1]] = rows
                writers[name].scatter(start + chosen, whole)
            bar.update(len(chosen))

    return work


def _writers(run: Run, data: RetrievalData, mode: str, opened: ExitStack) -> Writers:
    rows = len(data.images) if mode == IMAGE else len(data.captions)
    writers = {}
    for tensor, (graph, output) in TENSORS[mode].items():
        spec = run.graphs.symbolic[graph].output(output)
        shape = (data.ids.shape[1] if dim == LENGTH else dim for dim in spec.sample_shape)
        writers[output] = opened.enter_context(closing(run.writer(tensor, spec.dtype, (rows, *shape))))
    return writers
