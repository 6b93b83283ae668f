"""A tiny training that can be saved, killed, and shared by processes. Run by tests/test_state.py.

python -m tests.one_training killed|any-moment OUT, or full OUT BYTES ...; or with the environment of torchrun
python -m tests.one_training shared OUT FOLDER:MODE:STEPS ..., one after the other.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from models.errors import UserError
from tests.one_process import batch_of, learner_of
from tests.tiny import TINY2
from training import state
from training.optimizer import make_optimizer, make_scaler, set_learning_rate, take_step
from training.order import Position
from training.parallel import DDP, NONE, Place, joined, shared
from training.settings import Data, Model, Run, Settings, Source
from training.state import Parts, Progress

SETTINGS = Settings(
    "stage1",
    Data((Source(annotations=Path("a.json"), images=Path("i")),)),
    Model(name="blip2-demo", checkpoint=Path("w.safetensors")),
    run=Run(steps=6, precision="fp32", device="cpu"),
)
CALLS = 9  # moments at which a save can be cut short
TURNS = 12  # processes that are killed at random


@dataclass
class Tiny(Parts):
    """With what computes its losses."""

    learner: nn.Module = field(default_factory=nn.Module)


def begin(mode: str = NONE, place: Place | None = None) -> Tiny:
    """The training before its first step."""
    torch.manual_seed(11)
    learner, _ = learner_of("stage1")
    wrapped = shared(learner, mode, place or Place(0, 1, torch.device("cpu")))
    optimizer = make_optimizer(learner.model, SETTINGS.optimizer)
    scaler = make_scaler(SETTINGS.run, torch.device("cpu"))
    return Tiny(learner.model, optimizer, scaler, learner=wrapped)


def go_on(parts: Tiny, progress: Progress, steps: int, rows: slice = slice(0, 4)) -> Progress:
    """So many steps more."""
    batch = batch_of(rows, TINY2.text.vocab)
    for _ in range(steps):
        noise = torch.randn(batch.image.shape)
        total, _losses = parts.learner(replace(batch, image=batch.image + 0.1 * noise))
        total.backward()
        set_learning_rate(parts.optimizer, 1e-3 * (progress.step + 1))
        take_step(parts.optimizer, parts.scaler, 1.0)
        progress = Progress(progress.step + 1, Position(0, progress.step + 1), 0.5, 1)
    return progress


def killed(out: Path) -> None:
    """In folder 0, 1, ... a process that saves step 4 after step 3 dies at that one of the moments."""
    parts = begin()
    progress = go_on(parts, Progress(), 3)
    for call in range(CALLS):
        state.save(out / str(call), parts, progress, SETTINGS)
    progress = go_on(parts, progress, 1)
    for call in range(CALLS):
        if os.fork() == 0:
            dies_at(call, out / str(call), parts, progress)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL


def dies_at(call: int, out: Path, parts: Tiny, progress: Progress) -> None:
    """Before a file of the state, with half of it written, before or after the rename."""
    seen = 0

    def moment() -> None:
        nonlocal seen
        if seen == call:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    def watched(function: Any, torn: bool = False) -> Any:
        def inner(*given: Any, **named: Any) -> Any:
            moment()
            found = function(*given, **named)
            if torn:
                if seen == call:
                    os.truncate(given[1], Path(given[1]).stat().st_size // 2)
                moment()
            return found

        return inner

    state.save_file = watched(state.save_file, torn=True)  # type: ignore[assignment]
    state.torch.save = watched(torch.save, torn=True)
    state.manifest.write = watched(state.manifest.write)  # type: ignore[assignment]
    Path.rename = watched(Path.rename)  # type: ignore[method-assign]
    state.save(out, parts, progress, SETTINGS)
    moment()


def killed_at_any_moment(out: Path) -> None:
    """Processes that save on and on in OUT/going are killed one after the other; OUT/0, 1, ... is what each has left."""
    rng = random.Random(0)
    parts = begin()
    go_on(parts, Progress(), 1)
    state.save(out / "going", parts, Progress(1, best=marked(parts, 1)), SETTINGS)
    for turn in range(TURNS):
        if (child := os.fork()) == 0:
            saves_on(out / "going", parts, turn)
        time.sleep(rng.uniform(0.1, 0.4))
        os.kill(child, signal.SIGKILL)
        os.wait()
        shutil.copytree(out / "going", out / str(turn))


def saves_on(out: Path, parts: Tiny, turn: int) -> None:
    for number in range(1, 1_000_000):
        step = 1 + number % 3  # the same numbers over and over: states are replaced too
        state.save(out, parts, Progress(step, best=marked(parts, 1000 * turn + number)), SETTINGS)
        state.prune(out, 2, step)


def marked(parts: Tiny, mark: int) -> float:
    """Weights that say which they are."""
    with torch.no_grad():
        parts.model.temp.fill_(mark)
    return float(mark)


def full(out: Path, limits: Sequence[int]) -> None:
    """Goes on from step 3 and tries to save where no file may be larger than each of `limits`, in bytes. Each time prints what is
    said, and what is there then."""
    parts = begin()
    progress = go_on(parts, state.restore(out / "step-0000003", parts, SETTINGS), 1)
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            state.save(out, parts, progress, SETTINGS)
        except UserError as error:
            print(error.message, *(path.name for path in out.iterdir()))


def together(out: Path, jobs: Sequence[str]) -> None:
    """As one of several processes, each job in OUT/FOLDER."""
    torch.set_num_threads(1)
    with joined("cpu", DDP) as place:
        for folder, mode, steps in (job.split(":") for job in jobs):
            shared_training(out / folder, mode, int(steps), place)  # what DistributedDataParallel holds is freed when it returns
            distributed.barrier()


def shared_training(out: Path, mode: str, steps: int, place: Place) -> None:
    """Goes on to `steps` and saves."""
    parts = begin(mode, place)
    torch.manual_seed(100 + place.rank)
    found = state.latest(out)
    progress = state.restore(found, parts, SETTINGS) if found else Progress()
    per = 4 // place.processes
    progress = go_on(parts, progress, steps - progress.step, slice(place.rank * per, (place.rank + 1) * per))
    state.save(out, parts, progress, SETTINGS)
    state.prune(out, 3, steps)


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    if what == "killed":
        killed(Path(folder))
    elif what == "any-moment":
        killed_at_any_moment(Path(folder))
    elif what == "full":
        full(Path(folder), [int(limit) for limit in rest])
    else:
        together(Path(folder), rest)
