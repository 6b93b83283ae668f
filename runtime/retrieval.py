"""A retrieval run: embed the pictures, embed the captions, plan the pairs, score them. Each stage in shards."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from models import manifest
from models.errors import UserError
from preprocess.dataset import PACKED, RetrievalData, Tensor, Writer, open_tensor, read_retrieval
from runtime.batches import slices
from runtime.embed import ShardWork, image_work, text_work
from runtime.graphs import Graphs, read_graphs
from runtime.journal import Journal
from runtime.onnx_session import available_provider
from runtime.outputs import I2T, T2I
from runtime.plan import Plan, plan_pairs
from runtime.rerank import pair_shards, pair_work
from runtime.session import Session, open_session

# Shards of some tens of seconds at base size on two cores: that much work is lost at most when a run is stopped.
PICTURES_PER_SHARD = 64
CAPTIONS_PER_SHARD = 2048
PAIRS_PER_SHARD = 4096
# Graphs of each stage: the preferred ones, then what does the same with more work.
Choices = tuple[tuple[str, ...], ...]
PICTURE_GRAPHS: Choices = (("image",), ("image_embed", "image_feat"))
CAPTION_GRAPHS: Choices = (("text_embed",),)
PAIR_GRAPHS: Choices = (("image_kv", "itm_cached"), ("itm",))
STAGES = (PICTURE_GRAPHS, CAPTION_GRAPHS, PAIR_GRAPHS)


@dataclass(frozen=True)
class Options:
    """What the user asked of a run."""

    graphs: Path
    data: Path
    out: Path
    batchsize: int
    itm_batchsize: int
    k_test: int | None  # None takes the model's
    provider: str
    threads: int | None
    feat_dtype: str  # in which image_feat is stored
    restart: bool = False
    verify: bool = False


def run_retrieval(options: Options, say: Callable[[str], None]) -> manifest.Manifest:
    """Write outputs/; goes on where a stopped run ended, and does nothing when the same run is complete.

    Raises UserError when graphs and data do not fit each other, or the work fails.
    """
    graphs, data = read_graphs(options.graphs, options.verify), read_retrieval(options.data, options.verify)
    refuse_mixed(graphs, data)
    available_provider(options.provider)  # before a folder is begun
    used = [name for choices in STAGES for name in graphs.first_of(*choices)]  # nor should hours of work end at a missing one
    k = options.k_test or graphs.config.protocol.k_test
    identity = _identity(options, graphs, data, k)
    if not options.restart and (done := _complete(options.out)):
        held = done.content.get("identity", {})
        if held == identity:
            say(f"{options.out} already holds this run; nothing to do (--restart runs it again).")
            return done
        others = ", ".join(sorted(key for key in {*held, *identity} if held.get(key) != identity.get(key)))
        say(f"{options.out} holds a complete run with another {others}; it is replaced once this one is complete.")
    if k > max(len(data.images), len(data.captions)):
        size = f"{len(data.images)} pictures, {len(data.captions)} captions"
        say(f"k_test {k} is larger than the set ({size}): every pair is scored.")
    with manifest.new_folder(options.out, "outputs", resumable=True) as folder:
        if options.restart:
            manifest.empty(folder)
        journal = Journal(folder, identity)
        run = _Run(options, graphs, data, folder, journal, k)
        run.embed_pictures()
        run.embed_captions()
        plan = run.plan()
        say(_describe(plan, k))
        run.rerank(plan)
        content = _content(options, graphs, data, identity, used, run)
        return manifest.write(folder, "outputs", content)


class _Run:
    """The stages of one run, and the tensors they write."""

    def __init__(self, options: Options, graphs: Graphs, data: RetrievalData, folder: Path, journal: Journal, k: int) -> None:
        self.options, self.graphs, self.data, self.folder, self.journal, self.k = options, graphs, data, folder, journal, k
        self.tensors: dict[str, dict[str, Any]] = {}

    def embed_pictures(self) -> None:
        """image_embed and image_feat."""
        data, options = self.data, self.options
        with ExitStack() as opened:
            writers = {}
            for spec in self.graphs.symbolic["image"].outputs:
                dtype = options.feat_dtype if spec.name == "image_feat" else spec.dtype
                writer = self._writer(spec.name, dtype, (len(data.images), *spec.sample_shape))
                writers[spec.name] = opened.enter_context(closing(writer))
            self.journal.run_shards(
                "pictures",
                _shards(len(data.images), PICTURES_PER_SHARD),
                lambda: image_work(data, self._sessions(PICTURE_GRAPHS), options.batchsize, writers),
                writers.values(),
            )

    def embed_captions(self) -> None:
        """text_embed."""
        data, options = self.data, self.options
        (spec,) = self.graphs.symbolic["text_embed"].outputs
        with closing(self._writer(spec.name, spec.dtype, (len(data.captions), *spec.sample_shape))) as writer:
            self.journal.run_shards(
                "captions",
                _shards(len(data.captions), CAPTIONS_PER_SHARD),
                lambda: text_work(data, self._sessions(CAPTION_GRAPHS)[0], options.batchsize, writer),
                [writer],
            )

    def plan(self) -> Plan:
        """The pairs, computed once and kept: a resumed run scores the same ones."""
        names = {"pair_image": "image", "pair_text": "text", "pair_direction": "direction", "pair_sim": "sim"}
        if self.journal.has("plan", 0):
            found = {field: np.load(self.folder / f"{name}.npy") for name, field in names.items()}
            for name, field in names.items():
                self.tensors[name] = {"dtype": found[field].dtype.name, "shape": list(found[field].shape)}
            return Plan(**found)
        made: list[Plan] = []

        def work(start: int, stop: int, bar: Any) -> None:
            made.append(plan_pairs(self._open("image_embed"), self._open("text_embed"), self.k))
            for name, field in names.items():
                values = getattr(made[0], field)
                (self.folder / f"{name}.npy").unlink(missing_ok=True)
                with closing(self._writer(name, values.dtype.name, values.shape)) as writer:
                    writer.write(0, values)
                    writer.flush()
            bar.update(stop - start)

        self.journal.run_shards("plan", [(0, len(self.data.images) + len(self.data.captions))], lambda: work, [])
        return made[0]

    def rerank(self, plan: Plan) -> None:
        """itm_logits of every planned pair."""
        (spec,) = self.graphs.symbolic["itm"].outputs
        with closing(self._writer(spec.name, spec.dtype, (len(plan.image), *spec.sample_shape))) as writer:

            def begin() -> ShardWork:
                sessions = self._sessions(PAIR_GRAPHS)
                return pair_work(self.data, self._open("image_feat"), plan, sessions, self.options.itm_batchsize, writer)

            self.journal.run_shards("pairs", pair_shards(plan, PAIRS_PER_SHARD), begin, [writer])

    def _sessions(self, choices: Choices) -> list[Session]:
        names = self.graphs.first_of(*choices)
        return [open_session(self.graphs, name, self.options.provider, self.options.threads) for name in names]

    def _writer(self, name: str, dtype: str, shape: tuple[Any, ...]) -> Writer:
        writer = Writer(self.folder, name, dtype, tuple(int(d) for d in shape))
        self.tensors[name] = writer.info()
        return writer

    def _open(self, name: str) -> Tensor:
        part = manifest.Manifest(self.folder, "outputs", {"layout": PACKED, "tensors": self.tensors}, {}, {})
        return open_tensor(part, name)


def _shards(total: int, size: int) -> list[tuple[int, int]]:
    return [(part.start, part.stop) for part in slices(0, total, size)]


def refuse_mixed(graphs: Graphs, data: RetrievalData) -> None:
    """Raise UserError unless `data` was made for graphs of this size and vocabulary."""
    config, found = graphs.config, data.protocol
    mend = f"Write the data again: {manifest.MADE_WITH['data']} --graphs {graphs.source.folder} ..."
    for name, wanted in (
        ("image_size", config.vision.image_size),
        ("vocab", config.text.vocab),
        ("max_length", config.protocol.max_length),
        ("max_words", config.protocol.max_words),
        ("mean", list(config.protocol.mean)),
        ("std", list(config.protocol.std)),
        ("tokenizer_sha256", graphs.content["tokenizer"]["sha256"]),
    ):
        if found.get(name) != wanted:
            raise UserError(f"{data.source.folder} was made with {name} {found.get(name)}, the graphs want {wanted}. {mend}")


def _identity(options: Options, graphs: Graphs, data: RetrievalData, k: int) -> dict[str, Any]:
    """What the numbers depend on: runs that agree here give the same files."""
    return {
        "graphs": graphs.source.digest,
        "data": data.source.digest,
        "k_test": k,
        "batchsize": options.batchsize,
        "itm_batchsize": options.itm_batchsize,
        "feat_dtype": options.feat_dtype,
        "provider": options.provider,
        "onnxruntime": onnxruntime.__version__,
        "shards": [PICTURES_PER_SHARD, CAPTIONS_PER_SHARD, PAIRS_PER_SHARD],  # the journal counts in these
    }


def _complete(out: Path) -> manifest.Manifest | None:
    return manifest.read(out, "outputs") if (out / manifest.NAME).is_file() else None


def _content(
    options: Options, graphs: Graphs, data: RetrievalData, identity: dict[str, Any], used: list[str], run: _Run
) -> dict[str, Any]:
    kept = ("model", "config", "opset", "target", "precision", "checkpoint", "parity")
    return {
        "task": "retrieval",
        "layout": PACKED,
        "tensors": run.tensors,
        "k_test": run.k,
        "graphs": {
            "digest": graphs.source.digest,
            "folder": str(options.graphs.absolute()),
            "used": used,
            **{key: graphs.content[key] for key in kept},
        },
        "data": {"digest": data.source.digest, "folder": str(options.data.absolute())},
        "backend": {
            "provider": options.provider,
            "onnxruntime": onnxruntime.__version__,
            "threads": options.threads,
            "machine": platform.machine(),
            "batchsize": options.batchsize,
            "itm_batchsize": options.itm_batchsize,
            "feat_dtype": options.feat_dtype,
        },
        "identity": identity,
        "timings": run.journal.timings(),
    }


def _describe(plan: Plan, k: int) -> str:
    both = int(((plan.direction & (I2T | T2I)) == (I2T | T2I)).sum())
    i2t, t2i = int((plan.direction & I2T).astype(bool).sum()), int((plan.direction & T2I).astype(bool).sum())
    return (
        f"{len(plan.image):,} pairs at k_test {k}: {i2t:,} for the pictures, {t2i:,} for the captions, {both:,} of them for both."
    )
