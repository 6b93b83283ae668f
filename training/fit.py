"""A training from its settings to its last state: batches in, steps of AdamW, records, states to go on from.

Everything that is drawn comes from the seed and the number of the step, so that a training that was stopped goes on with the
same batches and the same hard negatives.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from models import manifest
from models.errors import Misuse, UserError
from training import state
from training.average import Average, average_in, standing_in
from training.features import features_of
from training.gather import averaged, rank
from training.learner import Learner
from training.loader import Loaded
from training.momentum import ramped
from training.optimizer import make_optimizer, make_scaler, set_learning_rate, take_step
from training.order import START
from training.parallel import DDP, NONE, Place, blocks, has_npu, joined, shared
from training.plan import Plan, batches, plan_of
from training.precision import precisely, widened
from training.schedule import learning_rate
from training.settings import Settings
from training.settings_check import SEEDS
from training.state import Origin, Parts, Progress
from training.stop import asked_to_stop
from training.task import Moment, Task, moved, task_of
from training.validate import Metrics, measure_of
from training.watch import Watch
from training.whole import by_the_first
from training.written import BEST, WEIGHTS, write_weights

COOLEST, WARMEST = 0.001, 0.5  # bounds of the temperature, salesforce/BLIP models/blip_pretrain.py
HALVINGS = 20  # of the scale of fp16, from 65536, for one step after the other: it does not get better then
SHA256 = re.compile("sha256 ([0-9a-f]+)")  # what is said of weights
PERF = "perf"  # folder in run.out for the log of a run that measures speed: that of a training stays


@dataclass(frozen=True)
class Fitted:
    """Where a training ended."""

    step: int
    weights: Path | None  # that it ended with; None when it was stopped before, or measured speed alone
    stopped: bool = False  # by a signal


def fit(settings: Settings, resume: bool = False, max_steps: int | None = None, perf: bool = False) -> Fitted:
    """Train as `settings` say, and leave the last state and the weights in `run.out`.

    Args:
        resume: go on from the newest whole state there; from the start when there is none.
        max_steps: steps to stop after, with a state to go on from.
        perf: measure the speed alone: no state is saved.

    Raises UserError, naming the step and its batch, when a loss is no longer a number; UserError and Misuse for files and
    settings that cannot be used.
    """
    refuse_contradictions(settings)
    device = device_of(settings)
    with joined(device, settings.parallel.mode, settings.parallel.backend) as place, _alone_in(settings.run.out, place):
        return _fit(settings, place, resume, max_steps, perf)


@contextmanager
def _alone_in(out: Path, place: Place) -> Iterator[None]:
    """Hold the folder of a training, so that no other one writes into it."""
    if place.rank:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Misuse(f"run.out is {out}, which cannot be made ({error.strerror}). Set run.out to a folder of yours.") from error
    with manifest.locked(out, f"Another training writes into {out} now. Choose another run.out."):
        yield


def device_of(settings: Settings) -> str:
    """What runs the training. Raises Misuse where it cannot compute as asked."""
    device = settings.run.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "npu" if has_npu() else "cpu"
    if device == "cpu" and settings.run.precision == "fp16":
        raise Misuse("run.precision is fp16, which CPUs have no fast products of. Set run.precision to bf16 or fp32.")
    return device


def refuse_contradictions(settings: Settings) -> None:
    """Raise Misuse for settings that do not go together."""
    if settings.model.momentum and settings.parallel.mode not in (NONE, DDP):
        raise Misuse(f"parallel.mode is {settings.parallel.mode}; expected {DDP} with model.momentum, whose copies are whole.")


def _fit(settings: Settings, place: Place, resume: bool, max_steps: int | None, perf: bool) -> Fitted:
    newest = None if perf else _newest(settings, resume)
    torch.manual_seed(settings.run.seed)
    task = task_of(settings)
    plan = plan_of(settings, task.config, place.processes)
    origin = Origin(tuple(SHA256.findall(" ".join(task.said))), "" if perf else by_the_first(plan.digest))
    if newest:
        by_the_first(partial(state.compare_origin, newest, origin, settings))
        if state.step_of(newest) > plan.length.steps:
            raise Misuse(f"{newest} is beyond the {plan.length.steps:,} steps that are asked for now. Choose another run.out.")
    if place.rank == 0:
        learning, whole = (
            sum(p.numel() for p in task.model.parameters() if p.requires_grad or not alone) / 1e6 for alone in (True, False)
        )
        length = f"{plan.length.steps:,} steps, {plan.length.steps_per_epoch:,} to an epoch"
        click.echo("\n".join([*task.said, f"{learning:,.2f} of {whole:,.2f} million weights learn", length]))
    learner = Learner(task.model, task.losses_of).to(place.device)
    measure = None if perf else measure_of(settings, task.config, task.words, learner, place.device)
    if task.momentum:
        task.momentum.to(place.device)
    if settings.run.cache_features and plan.samples:
        with precisely(settings, place.device):
            encoder = task.model.get_submodule("visual_encoder")
            plan = replace(plan, features=features_of(settings, task.config, encoder, plan.samples.pictures, place))
    if settings.run.checkpointing:
        for block in blocks(task.model):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    together = shared(learner, settings.parallel.mode, place, unused=settings.run.itm_after > 0)
    optimizer = make_optimizer(task.model, settings.optimizer)
    others: dict[str, nn.Module] = {"momentum": task.momentum} if task.momentum else {}
    if settings.run.ema is not None:
        others["average"] = Average(task.model, settings.run.ema)
    if place.rank:
        torch.manual_seed(settings.run.seed + place.rank)  # what is left out at random is another share in each process
    parts = Parts(task.model, optimizer, make_scaler(settings.run, place.device), others, origin)
    progress = state.restore(newest, parts, settings) if newest else Progress(0, START)
    ready_to_learn(task.model)
    last = plan.length.steps if max_steps is None else min(plan.length.steps, progress.step + max_steps)
    step = _run(settings, place, task, plan, together, parts, progress, last, perf, measure)
    if perf or step < plan.length.steps:
        return Fitted(step, None, stopped=step < last)
    if average := average_in(parts.others):
        average.exchange(task.model)
    return Fitted(step, write_weights(task.model, task.config, settings))


def _newest(settings: Settings, resume: bool) -> Path | None:
    """The state to go on from; None at the start. What contradicts it is refused here, before hours of features are made."""
    out = settings.run.out
    if not resume and (name := state.begun(out)):
        raise Misuse(f"{out} holds a training already ({name}). Go on with --resume, or choose another run.out.")
    newest = state.latest(out)
    if newest:
        by_the_first(partial(state.refuse_other_settings, newest, settings))
    elif by_the_first((out / WEIGHTS).is_file):
        raise Misuse(f"{out} holds the weights of a training ({WEIGHTS}) and no state to go on from. Choose another run.out.")
    elif resume and rank() == 0:
        click.echo(f"{out} holds no state to go on from: this training begins at the start.")
    return newest


def ready_to_learn(model: nn.Module) -> None:
    """Training mode for what learns; what is frozen stays as it is used, without dropout."""
    model.train()
    for module in model.modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def _run(
    settings: Settings,
    place: Place,
    task: Task,
    plan: Plan,
    learner: nn.Module,
    parts: Parts,
    progress: Progress,
    last: int,
    perf: bool,
    measure: Callable[[nn.Module], Metrics] | None,
) -> int:
    """The loop, to step `last`. Returns the step it came to: fewer when it was asked to stop."""
    run, length, each = settings.run, plan.length, plan.accumulate
    average = average_in(parts.others)
    step, position = progress.step, progress.position
    loaded = batches(plan, settings, step * each, position, place.rank, place.processes)
    watch = Watch(run.out / PERF if perf else run.out, settings, last, step)
    saved, left_out = step, 0  # the step of the last state; steps since the last whose gradient was a number

    def save() -> None:
        state.save(run.out, parts, Progress(step, position, progress.best, progress.best_step), settings)
        state.prune(run.out, run.keep, step, progress.best_step)

    with closing(loaded), asked_to_stop(place.device) as asked, closing(watch), widened(task.model):
        while step < last:
            epoch, in_epoch = divmod(step, length.steps_per_epoch)
            lr = learning_rate(settings.schedule, length, epoch, in_epoch)
            set_learning_rate(parts.optimizer, lr)
            found: dict[str, float] = {}
            try:
                loads = list(islice(loaded, each))  # all of them before the first is learnt, so that a step is whole or not begun
            except UserError as error:
                if perf or place.processes > 1 or step == saved:
                    raise
                save()
                raise UserError(f"{error.message} What was learnt until step {step:,} is saved: go on with --resume.") from error
            for number, batch in enumerate(loads, 1):
                position = plan.after(step * each + number, batch.position, place.processes)
                moment = moment_of(settings, plan, step, number)
                for name, value in _learn(settings, place, task, learner, parts, batch, moment, each, number == each).items():
                    found[name] = found.get(name, 0.0) + value / each
                _refuse_no_number("loss", step + 1, batch, found, watch)
            norm = take_step(parts.optimizer, parts.scaler, settings.optimizer.clip, run.loss_scale)
            left_out = 0 if math.isfinite(norm) else left_out + 1
            never = step + 1 == length.steps and left_out > step  # no step of the whole training has changed a weight
            if never or left_out > (HALVINGS if parts.scaler.is_enabled() else 0):  # which goes on with a smaller scale
                _refuse_no_number("gradient", step + 1, batch, {"norm": norm}, watch)
            if isinstance(temp := getattr(task.model, "temp", None), Tensor):
                with torch.no_grad():
                    temp.clamp_(COOLEST, WARMEST)
            if average:
                average.follow(task.model)
            step += 1
            watch.step(step, found, lr, run.batchsize * each, norm)
            since = time.monotonic()
            if measure and (step == length.steps or _due(run.validate_every, plan, step)):
                with standing_in(average, task.model):
                    metrics = measure(task.model)
                    progress = better(progress, step, metrics[settings.best])
                    if progress.best_step == step:
                        write_weights(task.model, task.config, settings, BEST)
                ready_to_learn(task.model)
                watch.measured(step, metrics)
            stopping = asked()
            if not perf and (stopping or step == last or _due(run.save_every, plan, step) or progress.best_step == step):
                save()
                saved = step
            watch.pause(time.monotonic() - since)
            if stopping:
                break
    return step


def _learn(
    settings: Settings,
    place: Place,
    task: Task,
    learner: nn.Module,
    parts: Parts,
    batch: Loaded,
    moment: Moment,
    each: int,
    exchange: bool,
) -> dict[str, float]:
    """Gradients of one batch on top of those that are there, and its losses, over all processes. `exchange`: whether the
    processes exchange gradients after it, as they do once a step."""
    given = moved(task.batch_of(batch), place.device)
    with _exchanging(learner, exchange):
        with precisely(settings, place.device):
            total, losses = learner(given, moment)
        parts.scaler.scale(total / each).backward()
    return {name: averaged(loss) for name, loss in losses.items()}


def moment_of(settings: Settings, plan: Plan, step: int, number: int) -> Moment:
    """What batch `number` of step `step` depends on."""
    asked, length = settings.model.momentum, plan.length
    generator = torch.Generator().manual_seed((settings.run.seed * 1_000_003 + step * plan.accumulate + number) % SEEDS)
    epoch, in_epoch = divmod(step, length.steps_per_epoch)
    alpha = ramped(asked.alpha, epoch, in_epoch, length.steps_per_epoch, asked.ramp_epochs) if asked else 0.0
    return Moment(generator, step >= settings.run.itm_after, alpha)


def _exchanging(learner: nn.Module, exchange: bool) -> AbstractContextManager[object]:
    if isinstance(learner, DistributedDataParallel) and not exchange:
        return learner.no_sync()
    return nullcontext()


def better(progress: Progress, step: int, metric: float) -> Progress:
    """With this step as the best, if it is."""
    return replace(progress, best=metric, best_step=step) if progress.best is None or metric > progress.best else progress


def _due(every: int | None, plan: Plan, step: int) -> bool:
    """Whether something is to be done after this step: at the end of each epoch unless there is a number of steps."""
    return step % (every or plan.length.steps_per_epoch) == 0


def _refuse_no_number(what: str, step: int, batch: Loaded, found: dict[str, float], watch: Watch) -> None:
    if not all(map(math.isfinite, found.values())):
        said = ", ".join(f"{name} {value:g}" for name, value in found.items())
        where = f"epoch {batch.position.epoch}, batch {batch.position.batch}"
        watch.stopped(step, f"the {what} is not a number: {said}", where)
        raise UserError(
            f"The {what} is not a number at step {step} ({said}; {where}, whose first text is {batch.texts[0]!r:.80}). "
            "Begin again with a smaller schedule.lr or with run.precision fp32, from the weights of the last state if you like "
            "(model.checkpoint, and another run.out)."
        )
