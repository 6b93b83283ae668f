"""A run that writes texts: pictures are looked at, each once, and what is asked about them is answered. In shards.

N pictures, R requests, in the order of their pictures; P pictures that are looked at together.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from models import manifest
from runtime import run as runs
from runtime.batches import prefetched, slices
from runtime.embed import ShardWork
from runtime.generation_presets import SAMPLED
from runtime.generator import Generator, Request
from runtime.graphs import Graphs
from runtime.how import How, answered
from runtime.listed import Listed
from runtime.outputs import CAPTION, GENERATED, VQA, CaptionOutputs, VqaOutputs, read_caption, read_vqa
from runtime.picture_input import read_pictures
from runtime.place import smaller_batches
from runtime.rows import Row, Rows, lines_of
from runtime.run import Data, Run, already_done, begun, identity_of
from runtime.writing import Written

REQUESTS_PER_SHARD = 64  # some tens of seconds with a captioner of base size: that much is lost at most when a run is stopped
READERS: dict[str, Callable[[Path], CaptionOutputs | VqaOutputs]] = {CAPTION: read_caption, VQA: read_vqa}


@dataclass(frozen=True, kw_only=True)
class Options(runs.Options):
    """What the user asked of a run that writes texts."""

    preset: str | None  # one of generation_presets.AS
    asked: dict[str, Any]  # of generation_presets.OPTIONS, what was given
    use_past: bool = True
    images: str | None = None  # paths with commas between, in the place of `data`


@dataclass(frozen=True)
class Job:
    """What is asked for, of which data, and how it is answered."""

    task: str
    stage: str  # what the bar counts
    key: str  # what the number of a request is of: "image" or "question"
    graphs: Graphs
    data: Data
    read: Callable[[list[int]], np.ndarray]  # pictures by number, (P, 3, S, S)
    requests: list[Request]  # R, in the order of the data
    how: How
    results: Callable[[list[Row]], tuple[str, list[Row]]]  # of all rows: the file of results, and what is in it


def run_texts(job: Job, options: Options, say: Callable[[str], None]) -> tuple[manifest.Manifest, list[Row]]:
    """Write outputs/; goes on where a stopped run ended, and does nothing when the same run is complete. Returns what was
    generated, in the order of the data.

    Raises what `job.how.check` raises before a folder is begun, UserError when the work fails.
    """
    requests = sorted(job.requests, key=lambda request: request.picture)
    identity = _identity(job, options)
    notes: list[str] = []  # said once it is sure that the run begins
    done = already_done(options, identity, notes.append)
    if done:
        say(notes[0])
        return done, READERS[job.task](options.out).generated
    generator = Generator(job.graphs, options.provider, options.threads, options.use_past)
    notes += smaller_batches(job.graphs, dict.fromkeys(job.graphs.written, options.batchsize))  # all of them are open now
    for line in [*notes, *job.how.check(generator, [request.prompt for request in requests]), described(job)]:
        say(line)
    with begun(options, job.graphs, job.data, identity) as run:
        shards = list(_shards(requests, REQUESTS_PER_SHARD))
        rows = Rows(run.folder)
        run.journal.run_shards(job.stage, shards, lambda: _work(job, generator, requests, rows, _together(job, options)), [])
        generated = rows.merged(GENERATED, shards, job.key)
        name, results = job.results(generated)
        manifest.write_text(run.folder / name, lines_of(results))
        say(spoken(run, generated))
        return run.complete(list(job.graphs.written), {"use_past": options.use_past}, _content(job)), generated


def described(job: Job) -> str:
    """What is asked for, and the options that decide the texts, on one line."""
    content = job.how.content()
    silent = {"as", "answers", *(() if content.get("do_sample") else ("seed", *SAMPLED))}
    values = ", ".join(f"{name} {value!r:.80}" for name, value in content.items() if name not in silent)
    return f"{len(job.requests):,} {job.stage} as {content['as']}: {values}."


def on_one_line(text: str) -> str:
    """What a terminal shows of a text that a model wrote: nothing in it moves the cursor or changes colours."""
    return "".join(each if each.isprintable() else " " for each in text)


def spoken(run: Run, generated: list[Row]) -> str:
    """How long the texts took, all sittings together."""
    tokens = sum(sum(row["tokens"]) for row in generated)
    seconds = sum(stage["seconds"] for stage in run.journal.timings())
    return f"{tokens:,} tokens in {seconds:.1f} s: {tokens / max(seconds, 1e-9):,.1f} tokens/s."


def reader(data: Any, graphs: Graphs) -> Callable[[list[int]], np.ndarray]:
    """How pictures are read by number: from the tensor of a data/ folder, or from files."""
    if isinstance(data, Listed):
        return lambda chosen: read_pictures([data.paths[n] for n in chosen], chosen[0], graphs.config)
    return lambda chosen: np.ascontiguousarray(data.img[chosen])


def _identity(job: Job, options: Options) -> dict[str, Any]:
    """Hashes stand for lists: a message may name what differs."""
    content = job.how.content()
    if "answers" in content:
        content["answers"] = _hash(content["answers"])
    prompts = _hash([[request.picture, request.prompt] for request in job.requests])
    others = {"use_past": options.use_past, "prompts": prompts, "shards": [REQUESTS_PER_SHARD]}
    others["batchsize"] = _together(job, options)  # an answer that looks at the padding of others depends on it
    return identity_of(job.task, options, job.graphs, job.data, **content, **others)


def _together(job: Job, options: Options) -> int:
    """Pictures and requests at a time: a batch for each NPU."""
    return options.batchsize * max(1, len(job.graphs.devices))


def _hash(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _content(job: Job) -> dict[str, Any]:
    content: dict[str, Any] = {"options": job.how.content()}
    if isinstance(job.data, Listed):
        content["data"] = {"digest": job.data.source.digest, "images": job.data.images, "folder": str(Path().absolute())}
    return content


def _shards(requests: list[Request], size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of shards of at least `size` requests, but the last, that never part those about one picture."""
    start = 0
    for stop in range(1, len(requests) + 1):
        last = stop == len(requests)
        if last or (stop - start >= size and requests[stop].picture != requests[stop - 1].picture):
            yield start, stop
            start = stop


def _work(job: Job, generator: Generator, requests: list[Request], rows: Rows, batchsize: int) -> ShardWork:
    """What one shard does: `batchsize` pictures are looked at together, and as many requests about them answered together."""

    def work(start: int, stop: int, bar: tqdm[Any]) -> None:
        found: list[Row] = []
        asked = requests[start:stop]
        pictures = list(dict.fromkeys(request.picture for request in asked))
        batches = [pictures[part] for part in slices(0, len(pictures), batchsize)]
        speed = Speed(bar)
        for chosen, images in prefetched(batches, job.read):
            place = {picture: n for n, picture in enumerate(chosen)}
            about = [request for request in asked if request.picture in place]
            local = [replace(request, picture=place[request.picture]) for request in about]
            written = answered(job.how, generator, images, local, batchsize, speed)
            found.extend(row_of(job.key, request, text) for request, text in zip(about, written, strict=True))
            bar.update(len(about))
        rows.write(start, found)

    return work


def row_of(key: str, request: Request, written: Written) -> Row:
    """What generated.json keeps."""
    return {key: request.number, "prompt": request.prompt, **vars(written)}


class Speed:
    """Told how many words each step gave, it shows how many there are in a second."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar, self._began, self._words = bar, time.perf_counter(), 0

    def __call__(self, words: int) -> None:
        self._words += words
        seconds = time.perf_counter() - self._began
        self._bar.set_postfix_str(f"{self._words / max(seconds, 1e-9):,.0f} tokens/s", refresh=False)
