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
from runtime.embed import image_work, text_work
from runtime.graphs import Graphs, read_graphs
from runtime.journal import Journal, even_shards
from runtime.onnx_session import available_provider
from runtime.outputs import I2T, T2I
from runtime.plan import Plan, plan_pairs
from runtime.rerank import pair_shards, pair_work
from runtime.session import open_session

# Shards of some tens of seconds at base size on two cores: that much work is lost at most when a run is stopped.
PICTURES_PER_SHARD = 64
CAPTIONS_PER_SHARD = 2048
PAIRS_PER_SHARD = 4096
# Graphs of each stage: the preferred ones, then what does the same with more work.
PICTURE_GRAPHS = (("image",), ("image_embed", "image_feat"))
CAPTION_GRAPHS = (("text_embed",),)
PAIR_GRAPHS = (("image_kv", "itm_cached"), ("itm",))


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
    for choices in (PICTURE_GRAPHS, CAPTION_GRAPHS, PAIR_GRAPHS):
        graphs.first_of(*choices)  # and before hours of work that a missing graph would end
    k = options.k_test or graphs.config.protocol.k_test
    identity = _identity(options, graphs, data, k)
    if not options.restart and (done := _complete(options.out, identity)):
        say(f"{options.out} already holds this run; nothing to do (--restart runs it again).")
        return done
    if k > max(len(data.images), len(data.captions)):
        size = f"{len(data.images)} pictures, {len(data.captions)} captions"
        say(f"k_test {k} is larger than the set ({size}): every pair is scored.")
    with manifest.new_folder(options.out, "outputs", resumable=True) as folder:
        if options.restart:
            manifest.empty(folder)
        journal = Journal(folder, identity)
        run = _Run(options, graphs, data, folder, journal, k)
        run.embed()
        plan = run.plan()
        say(_describe(plan, k))
        run.rerank(plan)
        content = _content(options, graphs, data, identity, run, journal)
        return manifest.write(folder, "outputs", content)


class _Run:
    """The stages of one run, and the tensors they write."""

    def __init__(self, options: Options, graphs: Graphs, data: RetrievalData, folder: Path, journal: Journal, k: int) -> None:
        self.options, self.graphs, self.data, self.folder, self.journal, self.k = options, graphs, data, folder, journal, k
        self.tensors: dict[str, dict[str, Any]] = {}
        self.used: list[str] = []

    def embed(self) -> None:
        """image_embed, image_feat, text_embed."""
        data, options = self.data, self.options
        pictures, captions = len(data.images), len(data.captions)
        specs = {t.name: t for t in self.graphs.symbolic["image"].outputs}
        with ExitStack() as opened:
            writers = {
                name: opened.enter_context(closing(self._writer(name, dtype, (pictures, *spec.sample_shape))))
                for name, spec in specs.items()
                for dtype in [options.feat_dtype if name == "image_feat" else spec.dtype]
            }
            sessions = self._sessions(*PICTURE_GRAPHS)
            work = image_work(data, sessions, options.batchsize, writers)
            self.journal.run_shards("pictures", even_shards(pictures, PICTURES_PER_SHARD), work, writers.values())
        (text_out,) = self.graphs.symbolic["text_embed"].outputs
        with closing(self._writer(text_out.name, text_out.dtype, (captions, *text_out.sample_shape))) as writer:
            (session,) = self._sessions(*CAPTION_GRAPHS)
            work = text_work(data, session, options.batchsize, writer)
            self.journal.run_shards("captions", even_shards(captions, CAPTIONS_PER_SHARD), work, [writer])

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

        self.journal.run_shards("plan", [(0, len(self.data.images) + len(self.data.captions))], work, [])
        return made[0]

    def rerank(self, plan: Plan) -> None:
        """itm_logits of every planned pair."""
        sessions = self._sessions(*PAIR_GRAPHS)
        (logits,) = self.graphs.symbolic["itm"].outputs
        with closing(self._writer(logits.name, logits.dtype, (len(plan.image), *logits.sample_shape))) as writer:
            work = pair_work(self.data, self._open("image_feat"), plan, sessions, self.options.itm_batchsize, writer)
            self.journal.run_shards("pairs", pair_shards(plan, PAIRS_PER_SHARD), work, [writer])

    def _sessions(self, *choices: tuple[str, ...]) -> list[Any]:
        names = self.graphs.first_of(*choices)
        self.used += names
        return [open_session(self.graphs, name, self.options.provider, self.options.threads) for name in names]

    def _writer(self, name: str, dtype: str, shape: tuple[Any, ...]) -> Writer:
        writer = Writer(self.folder, name, dtype, tuple(int(d) for d in shape))
        self.tensors[name] = writer.info()
        return writer

    def _open(self, name: str) -> Tensor:
        part = manifest.Manifest(self.folder, "outputs", {"layout": PACKED, "tensors": self.tensors}, {}, {})
        return open_tensor(part, name)


def refuse_mixed(graphs: Graphs, data: RetrievalData) -> None:
    """Raise UserError unless `data` was made for graphs of this size and vocabulary."""
    config, found = graphs.config, data.protocol
    mend = f"Write the data again: {manifest.MADE_WITH['data']} --graphs {graphs.source.folder} ..."
    for name, wanted in (
        ("image_size", config.vision.image_size),
        ("vocab", config.text.vocab),
        ("max_length", config.protocol.max_length),
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
    }


def _complete(out: Path, identity: dict[str, Any]) -> manifest.Manifest | None:
    if not (out / manifest.NAME).is_file():
        return None
    found = manifest.read(out, "outputs")
    return found if found.content.get("identity") == identity else None


def _content(
    options: Options, graphs: Graphs, data: RetrievalData, identity: dict[str, Any], run: _Run, journal: Journal
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
            "used": run.used,
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
        "timings": journal.timings(),
    }


def _describe(plan: Plan, k: int) -> str:
    both = int(((plan.direction & (I2T | T2I)) == (I2T | T2I)).sum())
    i2t, t2i = int((plan.direction & I2T).astype(bool).sum()), int((plan.direction & T2I).astype(bool).sum())
    return (
        f"{len(plan.image):,} pairs at k_test {k}: {i2t:,} for the pictures, {t2i:,} for the captions, {both:,} of them for both."
    )
