"""What people watch while a model is trained: a bar, a line now and then, a log of them, TensorBoard, and in the end a picture.

out/log.jsonl has a line for what was called, one for the means of each `run.log_every` steps and one for each measurement.
Of several processes the first one writes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from models import manifest
from training.curves import draw
from training.gather import processes, rank
from training.settings import Settings

LOG, CURVES = "log.jsonl", "curves.png"
SKIPPED = 4  # first steps, slower than the others, that the speed of the whole leaves out (PaddleMIX's benchmark mode does)


@dataclass
class _Interval:
    """Steps since the last line."""

    since: float  # time
    steps: int = 0
    samples: int = 0
    norms: list[float] = field(default_factory=list)  # of the gradient; without the steps that fp16 leaves out
    losses: dict[str, list[float]] = field(default_factory=dict)  # of each step that has it


class Watch:
    """Follows one training."""

    def __init__(self, out: Path, settings: Settings, total_steps: int, resumed: int = 0) -> None:
        """Begin the log in `out`; with `resumed` steps done go on with it, without the lines of later steps.

        Args:
            total_steps: the last step of this run.
        """
        self._writes = rank() == 0
        self._out, self._every, self._total, self._step = out, settings.run.log_every, total_steps, resumed
        self._started = time.monotonic()
        self._new = _Interval(self._started)
        self._whole: tuple[float, int] | None = None  # when, and how many samples, at the end of the skipped steps
        self._samples, self._steps_here = 0, 0
        self._speed: float | None = None
        self._by = settings.best  # name of the figure ...
        self._best: tuple[float, int] | None = None  # ... the best so far, and after which step it was
        if not self._writes:
            return
        out.mkdir(parents=True, exist_ok=True)
        head = {"step": resumed, "command": manifest.command(), "processes": processes(), "versions": manifest.versions()}
        earlier = _kept(out / LOG, resumed) if resumed else []
        for row in earlier:
            self._is_best(row["step"], row.get("metrics", {}))
        if resumed:
            click.echo(f"going on after step {resumed:,}")
        lines = [json.dumps(row) for row in (*earlier, head)]
        manifest.write_text(out / LOG, "".join(line + "\n" for line in lines))
        self._log = (out / LOG).open("a", encoding="utf-8")
        self._board = _tensorboard(out, resumed)
        self._bar = tqdm(total=total_steps, initial=resumed, desc="training", unit=" steps", disable=None)

    def step(self, step: int, losses: Mapping[str, float], lr: float, samples: int, grad_norm: float) -> None:
        """Step `step`, from 1, is done.

        Args:
            losses: each, by name.
            samples: that this process had in the step.
            grad_norm: before clipping.
        """
        self._step = step
        self._steps_here += 1
        self._samples += samples * processes()
        self._new.steps += 1
        self._new.samples += samples * processes()
        if math.isfinite(grad_norm):
            self._new.norms.append(grad_norm)
        for name, loss in losses.items():
            self._new.losses.setdefault(name, []).append(loss)
        if self._steps_here == SKIPPED:
            self._whole = (time.monotonic(), self._samples)
        if not self._writes:
            return
        shown = {name: f"{loss:.3f}" for name, loss in losses.items()} | {"lr": f"{lr:.2e}"}
        if self._speed:
            shown["samples/s"] = f"{self._speed:.1f}"
        self._bar.set_postfix(shown | {"memory": _size(memory())}, refresh=False)
        self._bar.update(step - self._bar.n)
        if step % self._every == 0 or step == self._total:
            self._line(lr)

    def measured(self, step: int, metrics: Mapping[str, float]) -> None:
        """The model was measured after `step` steps. The time that it took does not count as training."""
        if self._writes:
            self._write({"step": step, "metrics": dict(metrics)})
            best = f"  (best {self._by} so far)" if self._is_best(step, metrics) else ""
            figures = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self._say(f"step {step:,}/{self._total:,}  {figures}{best}")
            self._scalars(step, {f"metric/{name}": value for name, value in metrics.items()})

    def stopped(self, step: int, why: str, where: str) -> None:
        """Step `step` cannot be done, for its batch."""
        if self._writes:
            self._write({"step": step, "stopped": why, "at": where})

    def pause(self, seconds: float) -> None:
        """So much of the time since the last step went into something else, such as measuring or saving."""
        self._new.since += seconds
        self._started += seconds
        if self._whole:
            self._whole = (self._whole[0] + seconds, self._whole[1])

    @property
    def samples_per_second(self) -> float:
        """Of all processes and all steps but the first few."""
        began, before = self._whole if self._whole and self._samples > self._whole[1] else (self._started, 0)
        return (self._samples - before) / max(time.monotonic() - began, 1e-9)

    def close(self) -> None:
        """Say how fast it was on the whole, and draw the curves."""
        if not self._writes or self._log.closed:
            return
        self._bar.close()
        if self._samples:
            click.echo(f"{self._step:,} of {self._total:,} steps done  {_speeds(self.samples_per_second)}")
        if self._best:
            click.echo(f"best {self._by} {self._best[0]:.4g}, after step {self._best[1]:,}")
        self._log.close()
        if self._board is not None:
            self._board.close()
        if draw(_rows(self._out / LOG), self._out / CURVES):
            click.echo(f"Log in {self._out / LOG}, curves in {self._out / CURVES}.")

    def _is_best(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the best state is that of this step, as training/fit.py chooses it."""
        value = metrics.get(self._by)
        found = value is not None and (self._best is None or value > self._best[0])
        if found and value is not None:
            self._best = (value, step)
        return found

    def _line(self, lr: float) -> None:
        now, new = time.monotonic(), self._new
        self._speed = new.samples / max(now - new.since, 1e-9)
        left = (now - new.since) / new.steps * (self._total - self._step)
        losses = {name: sum(values) / len(values) for name, values in new.losses.items()}
        norm = sum(new.norms) / len(new.norms) if new.norms else None
        record: dict[str, Any] = {"step": self._step, "minutes": round((now - self._started) / 60, 4), "lr": lr, "losses": losses}
        record |= {"grad_norm": norm, "samples_per_second": self._speed, "memory_bytes": memory()}
        self._write(record)
        said = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        said_norm = "every step left out" if norm is None else f"grad norm {norm:.3g}"
        self._say(
            f"step {self._step:,}/{self._total:,}  {said}  lr {lr:.4e}  {said_norm}  {_speeds(self._speed)}  "
            f"memory {_size(memory())}  ETA {tqdm.format_interval(left)}"
        )
        scalars = {f"loss/{name}": loss for name, loss in losses.items()}
        norms = {} if norm is None else {"grad_norm": norm}
        self._scalars(self._step, scalars | norms | {"lr": lr, "samples_per_second": self._speed})
        self._new = _Interval(now)

    def _write(self, record: dict[str, Any]) -> None:
        self._log.write(json.dumps(record) + "\n")
        self._log.flush()

    def _say(self, text: str) -> None:
        self._bar.clear()
        click.echo(text)
        self._bar.refresh()

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items() if self._board is not None else ():
            self._board.add_scalar(name, value, step)


def memory() -> int:
    """Bytes: the most that PyTorch had of the accelerator; on a CPU the most that this process had."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    if hasattr(torch, "npu"):
        return int(torch.npu.max_memory_reserved())
    import resource  # not on every system that PyTorch runs on

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _speeds(speed: float) -> str:
    """As LAVIS on Ascend and PaddleMIX log it."""
    return f"fps: {speed:.4f}  ips: {speed:.5f} sample/sec"


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _rows(log: Path) -> list[dict[str, Any]]:
    rows = []
    for line in log.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # cut short when the training was killed
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _kept(log: Path, resumed: int) -> list[dict[str, Any]]:
    """The rows of an earlier log up to the step from which a training goes on."""
    return [row for row in _rows(log) if row["step"] <= resumed] if log.is_file() else []


def _tensorboard(out: Path, resumed: int) -> Any:
    """A writer; None where the extra `watch` is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=resumed + 1 if resumed else None)
