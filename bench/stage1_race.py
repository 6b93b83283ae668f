"""BLIP-2's first stage in three ways that take turns: the plain way, ours, and ours with features that are kept.

One model, one optimizer, the same batches. A step is what training does: losses, gradients, AdamW, at a learning rate of 0, so
that all steps are of the same weights and the losses can be compared. Pictures are decoded before: that costs the same in the
first two ways, and nothing in the third.

B pictures with a caption each, L tokens, T tokens of a picture, D width of its encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tqdm import tqdm

from bench.captions import Captions
from bench.compare import WARMUP, Measured
from bench.measure import Work, interleave
from bench.plain_stage1 import plain_losses
from models.blip2 import Blip2Stage1
from models.config import Blip2Config
from models.errors import UserError
from preprocess.text import CaptionTokenizer
from training import stage1
from training.initial import initialise
from training.optimizer import make_optimizer, make_scaler, take_step
from training.settings import Optimizer, Run
from training.step import Batch, Step

PLAIN = "plain: a pass per loss"
FROZEN = "ours: encoder frozen"
KEPT = "ours: features kept"
# Largest difference of a loss or of the norm of the gradients, over its size (at least 1). Rounding gave 4e-6, as at full width.
AGREEMENT = 1e-5


@dataclass(frozen=True)
class Given:
    """What the batches are made of; they come again after the last."""

    image: np.ndarray  # (N, 3, S, S) float32
    captions: Captions  # N of L tokens
    batchsize: int  # B

    def rows(self, number: int) -> np.ndarray:
        """(B,): what batch `number` holds."""
        return (number * self.batchsize + np.arange(self.batchsize)) % len(self.image)

    def batch(self, number: int, image: np.ndarray, cut: bool) -> Batch:
        """With `image` (B, ...), and captions padded to all L tokens, or `cut` to the longest of the batch."""
        rows = self.rows(number)
        ids, mask = self.captions.ids[rows], self.captions.mask[rows]
        length = int(mask.sum(1).max()) if cut else mask.shape[1]
        return Batch(*(torch.from_numpy(array) for array in (rows, image, ids[:, :length], mask[:, :length])))


def race(config: Blip2Config, tokenizer: CaptionTokenizer, given: Given, rounds: int) -> list[Measured]:
    """Ours and ours with features kept, each against the plain way. Raises UserError when the losses differ."""
    model = Blip2Stage1(config)
    initialise(model, 0)
    with TemporaryDirectory() as folder:
        features = _kept(model, given, Path(folder))
        losses: dict[str, list[np.ndarray]] = {PLAIN: [], FROZEN: [], KEPT: []}
        ways = _ways(model, tokenizer, given, features)
        runs = {name: _counted(run, losses[name]) for name, run in ways.items()}
        for run in runs.values():
            run()
        _differences(losses)
        with tqdm(total=len(runs) * (rounds + WARMUP), desc="stage 1", disable=None, leave=False) as bar:
            timings = interleave(runs, rounds, WARMUP, bar.update)
    differing = _differences(losses)
    return [
        Measured(
            work,
            dict.fromkeys((ours, PLAIN), given.batchsize),
            {ours: timings[ours], PLAIN: timings[PLAIN]},
            {PLAIN: differing[ours]},
        )
        for work, ours in (("frozen", FROZEN), ("features", KEPT))
    ]


def _ways(
    model: Blip2Stage1, tokenizer: CaptionTokenizer, given: Given, features: np.ndarray
) -> dict[str, Callable[[int], np.ndarray]]:
    """Each takes the number of a batch, makes one step, and returns its losses and the norm of their gradients (4,)."""
    model.visual_encoder.requires_grad_(False)
    optimizer = make_optimizer(model, Optimizer())
    scaler = make_scaler(Run(precision="fp32"), torch.device("cpu"))

    def stepped(found: Step) -> np.ndarray:
        found.total.backward()  # type: ignore[no-untyped-call]
        norm = take_step(optimizer, scaler, None)
        return np.array([found.itc.item(), found.itm.item(), found.lm.item(), norm])

    def drawn(number: int) -> torch.Generator:
        return torch.Generator().manual_seed(number)

    def plain(number: int) -> np.ndarray:
        model.visual_encoder.requires_grad_(True)
        batch = given.batch(number, given.image[given.rows(number)], cut=False)
        found = stepped(plain_losses(model, tokenizer, batch, drawn(number)))
        model.visual_encoder.zero_grad()
        model.visual_encoder.requires_grad_(False)
        return found

    def frozen(number: int) -> np.ndarray:
        batch = given.batch(number, given.image[given.rows(number)], cut=True)
        return stepped(stage1.losses_of(model, tokenizer, batch, drawn(number), matching=True))

    def kept(number: int) -> np.ndarray:
        batch = given.batch(number, features.take(given.rows(number), axis=0), cut=True)
        return stepped(stage1.losses_of(model, tokenizer, batch, drawn(number), matching=True))

    return {PLAIN: plain, FROZEN: frozen, KEPT: kept}


def _kept(model: Blip2Stage1, given: Given, folder: Path) -> np.ndarray:
    """(N, T, D) float32, mapped from a file, as training/features.py keeps them."""
    vision, path = model.cfg.vision, folder / "features.npy"
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (len(given.image), vision.tokens, vision.width))
    for start in range(0, len(rows), given.batchsize):
        with torch.inference_mode():
            rows[start : start + given.batchsize] = model.visual_encoder(
                torch.from_numpy(given.image[start : start + given.batchsize])
            )
    rows.flush()
    found: np.ndarray = np.load(path, mmap_mode="r").view(np.ndarray)
    return found


def _counted(run: Callable[[int], np.ndarray], losses: list[np.ndarray]) -> Work:
    """`run` with batch 0, 1, ...; what it returns is added to `losses`."""
    numbers: Iterator[int] = count()
    return lambda: losses.append(run(next(numbers)))


def _differences(losses: dict[str, list[np.ndarray]]) -> dict[str, float]:
    """The largest difference of a loss, or of the norm of the gradients, from the plain way, by way. Raises UserError when it is
    more than rounding."""
    plain = np.stack(losses[PLAIN])  # (steps, 4)
    found = {}
    for name in (FROZEN, KEPT):
        differences = np.abs(np.stack(losses[name]) - plain)
        found[name] = float(differences.max())
        if not (differences <= AGREEMENT * np.maximum(1.0, np.abs(plain))).all():
            raise UserError(
                f"The losses come out differently: {name} differs from the plain way by {found[name]:.1e}, so the speeds are not "
                "of equal work."
            )
    return found
