"""In which order a training sees its samples, how they are made, and how long it is."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from models.config import Config
from models.errors import Misuse
from preprocess.workers import workers_of
from training import sources
from training.loader import Loaded, Planned, load, load_features, planned
from training.order import START, Order, Position
from training.schedule import Length
from training.settings import Data, Settings
from training.settings import Source as Asked
from training.shards import Shards, open_shards, planned_shards
from training.sources import Part, Samples, read_sources
from training.transforms import Transform, named

LEARNT = "train"  # the split that is learnt when none is named


@dataclass(frozen=True)
class Plan:
    """What all processes together see, and when."""

    batchsize: int  # of one process
    seed: int
    samples: Samples | None  # in files ...
    order: Order | None
    easy: Order | None  # the order of the first steps, when only easy samples are seen
    easy_batches: int
    shards: Shards | None  # ... or in tar shards
    transforms: tuple[Transform, ...]
    length: Length
    accumulate: int  # batches of a step
    features: np.ndarray | None = None  # (P, T, D) of the pictures of `samples`, where they are kept: no picture is opened

    def digest(self) -> str:
        """sha256 of what there is to learn, but for the pixels."""
        found = hashlib.sha256()
        if self.shards:
            for file in self.shards.files:
                found.update(f"{file} {file.stat().st_size}\n".encode(errors="surrogateescape"))
        else:
            assert self.samples
            found.update(self.samples.picture.tobytes())
            for value in chain(self.samples.pictures, self.samples.texts, self.samples.answers or ()):
                found.update(f"{value!r}\n".encode(errors="surrogateescape"))
        return found.hexdigest()

    def batches(self, done: int, start: Position, rank: int, ranks: int) -> Iterator[Planned]:
        """Endless batches for one process.

        Args:
            done: batches that were seen before.
            start: where to go on, of the easy samples or of all, whichever come then.
        """
        if self.shards:
            yield from planned_shards(self.shards, self.transforms[0], self.seed, self.batchsize, start, rank, ranks)
            return
        assert self.samples
        assert self.order
        of_all = START if done < self.easy_batches else start
        rest = planned(self.samples, self.order, self.transforms, of_all, rank, ranks)
        if self.easy and done < self.easy_batches:
            first = planned(self.samples, self.easy, self.transforms, start, rank, ranks)
            yield from chain(islice(first, self.easy_batches - done), rest)
        else:
            yield from rest

    def after(self, done: int, position: Position, ranks: int) -> Position:
        """Where to go on behind batch `position`, the `done`-th of all, from 1."""
        if self.shards:
            last = position.batch + 1 >= self.shards.batches_per_epoch(self.batchsize, ranks)
            return Position(position.epoch + 1, 0) if last else Position(position.epoch, position.batch + 1)
        order = self.easy if self.easy and done <= self.easy_batches else self.order
        assert order
        return START if self.easy and done == self.easy_batches else order.after(position)


def plan_of(settings: Settings, config: Config, ranks: int) -> Plan:
    """The plan of a training of `ranks` processes. Raises UserError and Misuse as training/sources.py and shards.py do."""
    data, run = settings.data, settings.run
    together = run.batchsize * ranks
    usual = Transform(
        config.vision.image_size, config.protocol.interpolation, data.crop_scale, data.flip, data.rand_augment, data.shift
    )
    transforms = tuple(named(source.transform, usual) for source in data.train)
    if any(source.kind == "shards" for source in data.train):
        return _of_shards(settings, transforms, ranks)
    samples = read_sources([_source(source, data) for source in data.train])
    order = Order(samples.parts, together, run.seed, data.together)
    easy = Order((Part("easy", data.easy),), together, run.seed, data.together) if data.easy_steps else None
    if data.easy > len(samples):
        raise Misuse(f"data.easy is {data.easy:,}; expected at most the {len(samples):,} samples that there are.")
    length = _length(settings, order.batches_per_epoch)
    batches = data.easy_steps * settings.optimizer.accumulate
    return Plan(run.batchsize, run.seed, samples, order, easy, batches, None, transforms, length, settings.optimizer.accumulate)


def batches(plan: Plan, settings: Settings, done: int, start: Position, rank: int, ranks: int) -> Generator[Loaded, None, None]:
    """The batches of one process, made ahead by its workers. Close it to end them."""
    if plan.features is not None:
        return load_features(plan.batches(done, start, rank, ranks), plan.features, settings.data.prefetch)
    workers = workers_of(settings.data.workers)
    return load(plan.batches(done, start, rank, ranks), workers, settings.data.prefetch)


def _of_shards(settings: Settings, transforms: tuple[Transform, ...], ranks: int) -> Plan:
    (source, *others), run = settings.data.train, settings.run
    if others:
        raise Misuse("data.train joins shards with other sources; expected one source of shards alone.")
    assert source.shards
    shards = open_shards(source.shards, source.samples)
    length = _length(settings, shards.batches_per_epoch(run.batchsize, ranks))
    return Plan(run.batchsize, run.seed, None, None, None, 0, shards, transforms, length, settings.optimizer.accumulate)


def _length(settings: Settings, batches_per_epoch: int) -> Length:
    """In steps. Batches that are left at the end of an epoch, too few for a step, go into the first one of the next."""
    each = batches_per_epoch // settings.optimizer.accumulate
    if not each:
        raise Misuse(
            f"optimizer.accumulate is {settings.optimizer.accumulate}, but an epoch has only {batches_per_epoch} batches. "
            "Choose fewer, or a smaller run.batchsize."
        )
    run = settings.run
    return Length(each, run.steps if run.steps is not None else each * (run.epochs or 1))


def _source(asked: Asked, data: Data) -> sources.Source:
    assert asked.annotations  # as training/settings_check.py has seen
    assert asked.images
    return sources.Source(
        asked.kind,
        asked.annotations,
        asked.images,
        asked.questions,
        asked.split or LEARNT,
        asked.weight,
        asked.per_picture,
    )
