"""Learning rates of the conventions that BLIP and BLIP-2 were trained by. Imports no torch.

Epochs count from 0, and so do the optimizer's steps within one. The systems differ in what their cosine runs over: whole
epochs, all steps, or the steps after the warm-up. With `warmup_steps: 0` none of them warms up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["lavis", "lavis-step", "mindformers", "paddle", "blip", "blip-step", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """A convention and its numbers."""

    kind: Kind = "lavis"
    lr: float = 1e-4  # the highest learning rate; only the warm-up of mindformers goes above it
    min_lr: float = 0.0  # the lowest after the warm-up
    warmup_lr: float = 0.0  # where the warm-up begins; `cosine` always begins at lr / warmup_steps
    warmup_steps: int = 0  # steps of the optimizer
    decay_rate: float | None = None  # of `lavis-step` and `blip-step`: each epoch has so much of the lr of the one before


@dataclass(frozen=True)
class Length:
    """How long a training is, in steps of the optimizer."""

    steps_per_epoch: int
    steps: int  # of all epochs; the last one may be cut short

    @property
    def epochs(self) -> int:
        """Epochs that are begun."""
        return math.ceil(self.steps / self.steps_per_epoch)


def learning_rate(schedule: Schedule, length: Length, epoch: int, step: int) -> float:
    """The learning rate of step `step` of epoch `epoch`, both from 0."""
    return SCHEDULES[schedule.kind](schedule, length, epoch, step)


def lavis(schedule: Schedule, length: Length, epoch: int, step: int) -> float:
    """LAVIS's linear_warmup_cosine_lr: the warm-up takes place in epoch 0 and stops with it, then lr to the end of epoch 0,
    then one value per epoch (salesforce/LAVIS lavis/common/optims.py LinearWarmupCosineLRScheduler)."""
    return _risen(schedule, step) if epoch == 0 else blip(schedule, length, epoch, step)


def lavis_step(schedule: Schedule, length: Length, epoch: int, step: int) -> float:
    """LAVIS's linear_warmup_step_lr: as `lavis`, but each epoch has decay_rate times the lr of the one before, and at least
    min_lr (lavis/common/optims.py LinearWarmupStepLRScheduler)."""
    return _risen(schedule, step) if epoch == 0 else max(schedule.min_lr, schedule.lr * (schedule.decay_rate or 1.0) ** epoch)


def mindformers(schedule: Schedule, length: Length, epoch: int, step: int) -> float:
    """mindformers r1.0: the warm-up adds warmup_lr on top, so that it ends above lr; then a cosine over the steps after it
    (mindformers/core/lr/lr_schedule.py CosineWithWarmUpLR, of which later releases have a warm-up that ends at lr)."""
    done = epoch * length.steps_per_epoch + step
    if done < schedule.warmup_steps:
        return schedule.warmup_lr + schedule.lr * done / schedule.warmup_steps
    return _cosine(schedule, done - schedule.warmup_steps, length.steps - schedule.warmup_steps)


def paddle(schedule: Schedule, length: Length, epoch: int, step: int) -> float:
    """PaddleMIX: the cosine runs over all steps, those of the warm-up too, so that lr drops where it takes over
    (paddlemix/optimization.py CosineDecayWithWarmup, develop)."""
    done = epoch * length.steps_per_epoch + step
    return _risen(schedule, done) if done < schedule.warmup_steps else _cosine(schedule, done, length.steps)


def blip(schedule: Schedule, length: Length, epoch: int, step: int) -> float:
    """BLIP's fine-tuning: one value per epoch, no warm-up (salesforce/BLIP utils.py cosine_lr_schedule; train_retrieval.py,
    train_caption.py and train_vqa.py call it at the beginning of each epoch)."""
    return _cosine(schedule, epoch, length.epochs)


def blip_step(schedule: Schedule, length: Length, epoch: int, step: int) -> float:
    """BLIP's pre-training: a warm-up in epoch 0 that stops with it, then decay_rate ** epoch of lr, at least min_lr
    (salesforce/BLIP pretrain.py, utils.py warmup_lr_schedule and step_lr_schedule). The same numbers as `lavis_step`,
    which LAVIS took from here."""
    return lavis_step(schedule, length, epoch, step)


def cosine(schedule: Schedule, length: Length, epoch: int, step: int) -> float:
    """Ours, which trained the demo's weights: a straight rise in `warmup_steps` steps, times a cosine over all steps."""
    done = epoch * length.steps_per_epoch + step
    lowest = schedule.min_lr / schedule.lr
    part = 0.5 * (1 + math.cos(math.pi * min(done, length.steps) / length.steps))
    return schedule.lr * min(1.0, (done + 1) / max(schedule.warmup_steps, 1)) * (lowest + (1 - lowest) * part)


def _risen(schedule: Schedule, step: int) -> float:
    """A straight line from warmup_lr to lr."""
    if step >= schedule.warmup_steps:
        return schedule.lr
    return schedule.warmup_lr + (schedule.lr - schedule.warmup_lr) * step / schedule.warmup_steps


def _cosine(schedule: Schedule, done: int, total: int) -> float:
    """From lr to min_lr, where it stays."""
    total = max(1, total)
    return (schedule.lr - schedule.min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(done, total) / total)) + schedule.min_lr


SCHEDULES: dict[Kind, Callable[[Schedule, Length, int, int], float]] = {
    "lavis": lavis,
    "lavis-step": lavis_step,
    "mindformers": mindformers,
    "paddle": paddle,
    "blip": blip,
    "blip-step": blip_step,
    "cosine": cosine,
}
WITHOUT_WARMUP: tuple[Kind, ...] = ("blip",)
WITH_DECAY: tuple[Kind, ...] = ("lavis-step", "blip-step")
WITHOUT_START: tuple[Kind, ...] = ("blip", "cosine")  # warmup_lr means nothing to them
