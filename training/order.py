"""The order in which training sees its samples, computed from three numbers: the seed, the epoch and the batch.

Nothing is remembered between batches, so a training goes on from where it stopped with the batches that were left. N samples,
B samples in a batch of all processes together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from models.errors import Misuse
from training.sources import Part

# What a stream of random numbers is for. It comes first among the numbers that a stream is made of: two uses never share one.
ORDER, CAPTION, PICTURE = 1, 2, 3


def randomness(purpose: int, seed: int, epoch: int, number: int = 0) -> np.random.Generator:
    """The random numbers for one `purpose` (ORDER, CAPTION, PICTURE): those of sample `number` in one epoch. All from 0."""
    return np.random.default_rng([purpose, seed, epoch, number])


@dataclass(frozen=True)
class Position:
    """A batch: its epoch, and its number in that epoch, both from 0. Kept by a checkpoint, with the seed."""

    epoch: int = 0
    batch: int = 0


START = Position()


@dataclass(frozen=True)
class Order:
    """Samples of several parts, shuffled anew in each epoch.

    A part of weight 1 gives each of its samples once in an epoch; with all weights 1 the parts are simply joined. A part of
    weight 2.25 gives each sample twice, and a quarter of them, others in each epoch, once more. So every epoch has the same
    length, and no sample comes more often than its weight rounded up.
    """

    parts: Sequence[Part]
    batchsize: int  # B
    seed: int
    together: int = 1  # so many neighbours in a part stay in one batch: near-duplicates are each other's hard negatives

    def __post_init__(self) -> None:
        if self.batchsize < 1 or self.together < 1:
            raise Misuse(f"batchsize is {self.batchsize} and together is {self.together}; expected whole numbers from 1.")
        if self.seed < 0:
            raise Misuse(f"seed is {self.seed}; expected a whole number from 0.")
        if self.batchsize % self.together:
            nearest = max(self.batchsize // self.together, 1) * self.together
            raise Misuse(f"batchsize is {self.batchsize}, no multiple of together, {self.together}. Choose {nearest}.")
        if self.batches_per_epoch < 1:
            rows = f" in whole rows of {self.together}" if self.together > 1 else ""
            raise Misuse(
                f"batchsize is {self.batchsize:,} over all processes, but an epoch has only {self.length:,} samples{rows} to "
                "choose from. Choose a smaller one."
            )

    @property
    def count(self) -> int:
        """N, all parts together."""
        return sum(part.count for part in self.parts)

    @property
    def length(self) -> int:
        """Samples of an epoch, counted as often as they come."""
        return self.together * sum(part.count // self.together * whole + more for part, whole, more in self._shares())

    @property
    def batches_per_epoch(self) -> int:
        """What is left at the end of an epoch, too little for a batch, is not seen in it."""
        return self.length // self.batchsize

    def draws(self, epoch: int) -> np.ndarray:
        """(length,) int64: the draws of an epoch in order. Draw d is of sample d % N; it is its first when d < N, its second
        when d < 2 N, and so on: a sample that comes twice is cropped in two ways."""
        rng = randomness(ORDER, self.seed, epoch)
        first = 0
        starts: list[np.ndarray] = []
        for part, whole, more in self._shares():
            rows = first + self.together * np.arange(part.count // self.together)  # first samples of its rows
            starts.extend(rows + copy * self.count for copy in range(whole))
            if more:
                starts.append(rng.choice(rows, more, replace=False) + whole * self.count)
            first += part.count
        shuffled = rng.permutation(np.concatenate(starts))  # (length / together,)
        return (shuffled[:, None] + np.arange(self.together)).ravel()  # (length,)

    def batches(self, start: Position = START, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Position, np.ndarray]]:
        """Endless batches from `start` on: where each stands, and its draws, (B / ranks,) int64.

        Of each batch every one of `ranks` processes gets its own part, and the parts, in the order of the ranks, are the batch
        that a single process gets. Raises Misuse when there is no such rank, and when B is no multiple of `ranks`.
        """
        if not 0 <= rank < ranks:
            raise Misuse(f"There is no process {rank} among {ranks}; they count from 0.")
        if self.batchsize % ranks:
            raise Misuse(f"batchsize is {self.batchsize} over all processes, no multiple of the {ranks} that there are.")
        position = self._within(start)
        while True:
            draws = self.draws(position.epoch)
            for number in range(position.batch, self.batches_per_epoch):
                whole = draws[number * self.batchsize : (number + 1) * self.batchsize]  # (B,)
                yield Position(position.epoch, number), np.array_split(whole, ranks)[rank]
            position = Position(position.epoch + 1)

    def after(self, position: Position) -> Position:
        """The batch that follows."""
        return self._within(Position(position.epoch, position.batch + 1))

    def _within(self, position: Position) -> Position:
        """A batch beyond the end of its epoch is one of a later epoch."""
        epochs, batch = divmod(position.batch, self.batches_per_epoch)
        return Position(position.epoch + epochs, batch)

    def _shares(self) -> Iterator[tuple[Part, int, int]]:
        """Each part, how often all of its rows come in an epoch, and how many of them come once more."""
        for part in self.parts:
            whole = int(part.weight)
            yield part, whole, round((part.weight - whole) * (part.count // self.together))
