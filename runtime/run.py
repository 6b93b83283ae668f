"""What every run is made of, whatever its task: the folder it fills in shards, its sessions and tensors, its manifest."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from models import manifest
from models.config import Blip2Config, Blip2LlmConfig, BlipCaptionConfig, BlipConfig, BlipVqaConfig
from models.errors import UserError
from preprocess.tensors import PACKED, Tensor, Writer, open_tensor
from runtime.batches import slices
from runtime.graphs import KEPT, Graphs
from runtime.journal import Journal
from runtime.outputs import CAPTION, VQA
from runtime.place import batches_of, engine_of, place_of
from runtime.session import Session, open_session

# What the models are called, and the tasks of each.
MODELS: dict[type, tuple[str, tuple[str, ...]]] = {
    BlipConfig: ("BLIP's first form", ("retrieval", "classify")),
    Blip2Config: ("BLIP-2's first stage", ("retrieval", "classify", "features")),
    BlipCaptionConfig: ("BLIP's captioner", (CAPTION,)),
    BlipVqaConfig: ("BLIP for questions", (VQA,)),
    Blip2LlmConfig: ("BLIP-2 with a language model", (CAPTION, VQA)),
}
PICTURES_PER_SHARD = 64  # some tens of seconds at base size on two cores: that much is lost at most when a run is stopped


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asks of any run."""

    graphs: Path
    data: Path
    out: Path
    batchsize: int
    provider: str
    threads: int | None
    restart: bool = False
    verify: bool = False
    device: str | None = None  # NPUs of an om/ folder with commas between; None takes 0


class Data(Protocol):
    """A data/ folder of any task."""

    @property
    def source(self) -> manifest.Manifest: ...

    @property
    def protocol(self) -> dict[str, Any]: ...


class Run:
    """One run over `data`: the folder that becomes its outputs/, what is done of it, and the tensors begun."""

    def __init__(self, options: Options, graphs: Graphs, data: Data, folder: Path, identity: dict[str, Any]) -> None:
        self.options, self.graphs, self.data, self.folder, self.identity = options, graphs, data, folder, identity
        self.journal = Journal(folder, identity)
        self.tensors: dict[str, dict[str, Any]] = {}

    def sessions(self, names: Sequence[str], *rows: int) -> list[Session]:
        """The graphs `names`, loaded. `rows`: how many each is fed at a time, where it is not the batch size asked for."""
        graphs = [self.graphs.at(size) for size in rows] or [self.graphs] * len(names)
        options = self.options
        return [open_session(of, name, options.provider, options.threads) for of, name in zip(graphs, names, strict=True)]

    def writer(self, name: str, dtype: str, shape: tuple[Any, ...], layout: str = PACKED) -> Writer:
        """Begin one tensor of the outputs, or go on with it."""
        writer = Writer(self.folder, name, dtype, tuple(int(d) for d in shape), layout)
        self.tensors[name] = writer.info() if layout == PACKED else {**writer.info(), "layout": layout}
        return writer

    def open(self, name: str) -> Tensor:
        """Read a tensor that an earlier stage has written."""
        part = manifest.Manifest(self.folder, "outputs", {"layout": PACKED, "tensors": self.tensors}, {}, {})
        return open_tensor(part, name)

    def complete(self, used: Sequence[str], backend: dict[str, Any], content: dict[str, Any]) -> manifest.Manifest:
        """Write the manifest: which graphs, data and backend, what the numbers depend on, how long each stage took.

        `used` names the graphs that ran; `backend` and `content` are what the task adds.
        """
        options, graphs = self.options, self.graphs
        common = {
            "task": self.identity["task"],
            "layout": PACKED,
            "tensors": self.tensors,
            "graphs": {
                "digest": graphs.source.digest,
                "folder": str(options.graphs.absolute()),
                "used": list(used),
                **{key: graphs.content[key] for key in KEPT},
            },
            "data": {"digest": self.data.source.digest, "folder": str(options.data.absolute())},
            "backend": {
                **engine_of(graphs, options.provider),
                **place_of(graphs),
                "threads": None if graphs.is_om else options.threads,
                "machine": platform.machine(),
                "batchsize": options.batchsize,
                **batches_of(graphs, dict.fromkeys(used, options.batchsize)),
                **backend,
            },
            "identity": self.identity,
            "timings": self.journal.timings(),
        }
        return manifest.write(self.folder, "outputs", common | content)


@contextmanager
def begun(options: Options, graphs: Graphs, data: Data, identity: dict[str, Any]) -> Iterator[Run]:
    """The run in the folder beside `options.out`, where a stopped one is found again; it takes the place of `out` when
    the block, which completes it, ends well."""
    task = None if options.restart else identity["task"]
    with manifest.new_folder(options.out, "outputs", resumable=True, task=task) as folder:
        if options.restart:
            manifest.empty(folder)
        yield Run(options, graphs, data, folder, identity)


def identity_of(task: str, options: Options, graphs: Graphs, data: Data, **others: Any) -> dict[str, Any]:
    """What the numbers depend on, `others` being the task's own: runs that agree here give the same files."""
    return {
        "task": task,
        "graphs": graphs.source.digest,
        "data": data.source.digest,
        "batchsize": options.batchsize,
        **engine_of(graphs, options.provider),
        **others,
    }


def already_done(options: Options, identity: dict[str, Any], say: Callable[[str], None]) -> manifest.Manifest | None:
    """The complete run of this `identity` that `out` holds, unless it is to be run again. Says what is there.

    Raises Misuse when `out` holds a complete run of another task.
    """
    if options.restart or not (options.out / manifest.NAME).is_file():
        return None
    done = manifest.read(options.out, "outputs")
    manifest.refuse_task(options.out, "outputs", identity["task"])
    held = done.content.get("identity", {})
    if held == identity:
        say(f"{options.out} already holds this run; nothing to do (--restart runs it again).")
        return done
    others = ", ".join(sorted(key for key in {*held, *identity} if held.get(key) != identity.get(key)))
    say(f"{options.out} holds a complete run that differs in {others}; it is replaced once this one is complete.")
    return None


def refuse_mixed(graphs: Graphs, data: Data) -> None:
    """Raise UserError unless the graphs do the task of `data`, and `data` was made for graphs of this size and vocabulary.

    Texts that the run makes tokens of itself, prompts and questions, fit every vocabulary.
    """
    config, found = graphs.config, data.protocol
    task = data.source.content["task"]
    refuse_model(graphs, task)
    mend = f"Write the data again: {manifest.MADE_WITH['data']} {task} --graphs {graphs.source.folder} ..."
    pictures = {
        "image_size": config.vision.image_size,
        "mean": list(config.protocol.mean),
        "std": list(config.protocol.std),
    }
    texts = {
        "vocab": config.text.vocab,
        "max_length": config.protocol.max_length,
        "max_words": config.protocol.max_words,
        "tokenizer_sha256": graphs.content["tokenizer"]["sha256"],
    }
    for name, wanted in (pictures if task in (CAPTION, VQA) else pictures | texts).items():
        if found.get(name) != wanted:
            raise UserError(f"{data.source.folder} was made with {name} {found.get(name)}, the graphs want {wanted}. {mend}")


def refuse_model(graphs: Graphs, task: str) -> None:
    """Raise UserError unless the graphs are of a model that does `task`."""
    model, tasks = MODELS[type(graphs.config)]
    if task not in tasks:
        raise UserError(
            f"{graphs.source.folder} holds graphs of {model}, for {', '.join(tasks)}; {task} wants graphs of another model."
        )


def shards(total: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of consecutive shards of at most `size` items."""
    return [(part.start, part.stop) for part in slices(0, total, size)]
