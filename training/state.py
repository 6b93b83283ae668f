"""A training's state on disk, from which it goes on as if nothing had happened: one folder per saved step.

    out/step-0001234/  model.safetensors   weights, by the model's names; each once
                       optimizer.pt        moments by the same names, and the loss scale
                       NAME.safetensors    what follows the model: momentum copies, a moving average
                       random.pt           states of the random numbers, of each process
                       manifest.json       step, position, best metric, settings; sha256 and size of each file

It is written beside and renamed when it is complete. Of several processes the first writes and reads; what FSDP shares out
is gathered before and shared out again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.amp.grad_scaler import GradScaler

from models import config_file, manifest
from models.errors import Misuse, UserError
from training.gather import processes, rank
from training.order import START, Position
from training.settings import Settings
from training.settings_file import to_dict
from training.whole import Moments, by_the_first, gathered, gathered_moments, spread, spread_moments, tensors_of

KIND = "state"
MODEL, OPTIMIZER, RANDOM = "model.safetensors", "optimizer.pt", "random.pt"
# What may be another when a training goes on: how long, how it is watched, and who computes it; not what the best is chosen by.
FREE = (
    *("data.workers", "data.prefetch", "parallel.mode", "parallel.backend"),
    *("run.epochs", "run.steps", "run.save_every", "run.keep", "run.trainable_only", "run.out", "run.device", "run.log_every"),
    *("run.checkpointing", "run.eval_batchsize", "run.validate_every", "run.cache_features"),
)


@dataclass(frozen=True)
class Progress:
    """How far a training has come."""

    step: int = 0  # steps done
    position: Position = START  # of the next batch
    best: float | None = None  # metric, so far
    best_step: int | None = None  # that has it


@dataclass(frozen=True)
class Origin:
    """What a training is made from beside its settings, which name files that may have changed."""

    weights: tuple[str, ...] = ()  # the beginnings of their files' sha256
    samples: str = ""  # sha256 of what there is to learn


@dataclass
class Parts:
    """What a state is taken of and put back into."""

    model: nn.Module  # without the wrapper of DistributedDataParallel
    optimizer: torch.optim.AdamW
    scaler: GradScaler
    others: Mapping[str, nn.Module] = field(default_factory=dict)  # by the name of their file; the same on every process
    origin: Origin = field(default_factory=lambda: Origin())


def folder_of(out: Path, step: int) -> Path:
    """Where the state after `step` steps is."""
    return out / f"step-{step:07d}"


def save(out: Path, parts: Parts, progress: Progress, settings: Settings) -> Path:
    """Write the state, and return its folder. All processes call it.

    With `run.trainable_only` frozen weights stay away; their own files hold them. Raises UserError, on every process, when it
    cannot be written: nothing of it is left then, and earlier states are as they were.
    """
    only = settings.run.trainable_only
    tensors = gathered(tensors_of(parts.model, only))
    others = {name: gathered(tensors_of(module)) for name, module in parts.others.items()}
    optimizer = {"moments": gathered_moments(parts.model, parts.optimizer), "scaler": parts.scaler.state_dict()}
    random = _random_of_all(parts)
    content = {"step": progress.step, "position": asdict(progress.position), "best": progress.best}
    content |= {"best_step": progress.best_step, "trainable_only": only, "processes": processes(), "settings": to_dict(settings)}
    content["origin"] = asdict(parts.origin)
    about = {"step": str(progress.step)}
    if hasattr(parts.model, "cfg"):
        about["config"] = json.dumps(config_file.to_dict(parts.model.cfg))  # type: ignore[arg-type]

    def write() -> None:
        with _a_sentence(out, progress.step):
            out.mkdir(parents=True, exist_ok=True)
            _tidy(out)
            if folder_of(out, progress.step).exists():
                _make_way(folder_of(out, progress.step))
            with manifest.new_folder(folder_of(out, progress.step), KIND) as folder:
                save_file(tensors, folder / MODEL, about)
                for name, found in others.items():
                    save_file(found, folder / f"{name}.safetensors")
                torch.save(optimizer, folder / OPTIMIZER)
                torch.save(random, folder / RANDOM)
                for file in folder.iterdir():
                    file.chmod(0o644)  # safetensors leaves its files to their owner alone
                manifest.write(folder, KIND, content)

    by_the_first(write)
    return folder_of(out, progress.step)


def restore(folder: Path, parts: Parts, settings: Settings) -> Progress:
    """Put the state of `folder` into `parts`, and return how far it had come. All processes call it.

    Raises UserError when the folder is damaged; Misuse when it is of other settings or another model, naming what differs.
    """
    tensors: dict[str, dict[str, Tensor]] = {"model": {}, **{name: {} for name in parts.others}}
    moments: Moments = {}

    def read() -> tuple[dict[str, Any], dict[str, Any], list[Any]]:
        found = _checked(folder)
        refuse_other_settings(folder, settings)
        for name, module in {"model": parts.model, **parts.others}.items():
            file = folder / f"{name}.safetensors"
            tensors[name] = load_file(file) if file.name in found["files"] else {}
            _refuse_model(file, tensors[name], tensors_of(module, found["trainable_only"] and name == "model"))
        optimizer = torch.load(folder / OPTIMIZER, weights_only=True)
        moments.update(optimizer["moments"])
        return found, optimizer["scaler"], torch.load(folder / RANDOM, weights_only=True)

    found, scaler, random = by_the_first(read)
    for name, module in {"model": parts.model, **parts.others}.items():
        spread(tensors[name], tensors_of(module, found["trainable_only"] and name == "model"))
    spread_moments(moments, parts.model, parts.optimizer)
    parts.scaler.load_state_dict(scaler)
    if found["processes"] == processes():
        _put_back(parts, random[rank()])
    elif rank() == 0:
        click.echo(
            f"{folder} was written by {found['processes']} processes, and {processes()} go on: batches and random numbers "
            "will be other ones than if it had not been stopped."
        )
    return Progress(found["step"], Position(**found["position"]), found["best"], found["best_step"])


def refuse_other_settings(folder: Path, settings: Settings) -> None:
    """Raise Misuse when the whole state in `folder` is of settings with which this training cannot go on, naming the first."""
    said = json.loads((folder / manifest.NAME).read_text("utf-8"))["settings"]
    theirs, ours = _flat(said), _flat(json.loads(json.dumps(to_dict(settings))))
    for key in sorted(theirs.keys() | ours.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in FREE)
        if not free and theirs.get(key) != ours.get(key):
            their, our = (repr(found[key]) if key in found else "not there" for found in (theirs, ours))
            raise Misuse(
                f"{folder} was trained with {key}: {their}, and now it is {our}. "
                "Go on with the same settings, or choose another run.out."
            )


def compare_origin(folder: Path, now: Origin, settings: Settings) -> None:
    """Say what has changed since the whole state in `folder` was written, though settings name it as before. Raises Misuse where
    what was learnt would be joined to other frozen weights, and where it was trained for longer than is asked for now."""
    found = json.loads((folder / manifest.NAME).read_text("utf-8"))
    then, run = found["origin"], found["settings"]["run"]
    if (found["trainable_only"] or settings.run.trainable_only) and then["weights"] != list(now.weights):
        their, our = (", ".join(weights) or "none" for weights in (then["weights"], now.weights))
        raise Misuse(
            f"{folder} was learnt beside other frozen weights, of the sha256 {their}; now they are {our}. Go on with the same "
            "files, or choose another run.out."
        )
    if then["samples"] != now.samples:
        click.echo(f"What there is to learn has changed since {folder.name}: batches will be other ones than if it had not.")
    for key in ("epochs", "steps"):
        if run[key] != (our := getattr(settings.run, key)):
            click.echo(f"run.{key} was {run[key]} until {folder.name} and is {our} now, from which the learning rate may depend.")


def begun(out: Path) -> str | None:
    """The name of the newest state in `out`, whole or not; None when there is none. All processes call it."""
    return by_the_first(lambda: folders[-1].name if (folders := _folders(out)) else None)


def latest(out: Path) -> Path | None:
    """The newest state in `out` that is whole; None when there is none. A damaged one is named, and the one before it taken.

    All processes call it. Raises UserError when all are damaged.
    """

    def find() -> Path | None:
        folders = _folders(out)
        for folder in reversed(folders):
            try:
                _checked(folder)
            except UserError as error:
                click.echo(f"{error.message} It is passed over.", err=True)
                continue
            return folder
        if folders:
            raise UserError(
                f"None of the {len(folders)} states in {out} is whole. Choose another run.out, or remove them and begin again."
            )
        return None

    return by_the_first(find)


def prune(out: Path, keep: int, step: int, best: int | None = None) -> None:
    """Remove all states but the newest `keep` up to `step`, the last that was saved, and that of step `best`. Those beyond it
    were damaged and passed over when the training went on. All processes call it."""

    def remove() -> None:
        _tidy(out)
        kept = [folder for folder in _folders(out) if step_of(folder) <= step][-keep:]
        for folder in _folders(out):
            if folder not in kept and step_of(folder) != best:
                (folder / manifest.NAME).unlink(missing_ok=True)  # from here on it is no state
                shutil.rmtree(folder)

    by_the_first(remove)


def _folders(out: Path) -> list[Path]:
    """States, the oldest first. A folder without a manifest is what a removal that was cut short has left."""
    return sorted((path for path in _numbered(out) if (path / manifest.NAME).is_file()), key=step_of)


def _numbered(out: Path) -> list[Path]:
    """Folders with the names of states. What has another name, such as somebody's copy of one, is not ours."""
    return [path for path in out.glob("step-*") if path.name[5:].isdecimal() and path.is_dir()]


def step_of(folder: Path) -> int:
    """After which step the state in `folder` was saved."""
    return int(folder.name[5:])


def _tidy(out: Path) -> None:
    """Remove what a training that was killed while it wrote or removed a state has left."""
    for old in out.glob(".step-*.old"):
        if not (folder := out / old.name[1 : -len(".old")]).exists():
            old.rename(folder)  # killed between the two renames that replace a state
    for left in [*out.glob(".step-*.part"), *out.glob(".step-*.old")]:
        if left.name.removeprefix(".step-").split(".")[0].isdecimal():
            shutil.rmtree(left)
    for left in _numbered(out):
        if not (left / manifest.NAME).is_file():
            shutil.rmtree(left)


def _make_way(folder: Path) -> None:
    """Remove a damaged state, which was passed over, where the same step is to be saved again."""
    try:
        _checked(folder)
    except UserError:
        shutil.rmtree(folder)


@contextmanager
def _a_sentence(out: Path, step: int) -> Iterator[None]:
    """What libraries say of a full disk is hard to read, and no OSError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        left = "There is no earlier one: make room, and begin again."
        if out.is_dir() and _folders(out):
            left = "Earlier states are as they were: make room, and go on with --resume."
        raise UserError(
            f"The state of step {step:,} cannot be written to {out}: {' '.join(str(error).split()).rstrip('.')}. "
            f"Is the disk full? {left}"
        ) from error


def _random_of_all(parts: Parts) -> list[dict[str, Any]]:
    """States of the random numbers of each process."""
    device = _device(parts)
    own: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        own[device.type] = torch.get_device_module(device).get_rng_state()
    found: list[Any] = [own] * processes()
    if processes() > 1:
        distributed.all_gather_object(found, own)
    return found


def _put_back(parts: Parts, random: dict[str, Any]) -> None:
    device = _device(parts)
    torch.set_rng_state(random["cpu"])
    if device.type in random and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(random[device.type])


def _device(parts: Parts) -> torch.device:
    return next(parts.model.parameters()).device


def _checked(folder: Path) -> dict[str, Any]:
    """What the manifest of a whole state says. Raises UserError."""
    path = folder / manifest.NAME
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if (found["format"], found["kind"]) != (manifest.FORMAT, KIND):
            raise ValueError(f"it is of kind {found['kind']!r}, format {found['format']!r}")
        records = [(folder / name, record) for name, record in found["files"].items()]
        missing = {"step", "position", "best", "best_step", "trainable_only", "processes", "settings", "origin"} - found.keys()
        if missing or not {MODEL, OPTIMIZER, RANDOM} <= found["files"].keys():
            raise ValueError(f"it says nothing of {', '.join(sorted(missing)) or 'the weights'}")
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no {manifest.NAME}: it is no complete state of a training.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}).") from error
    for file, record in records:
        if not file.is_file():
            raise UserError(f"{file} is missing, {path} lists it.")
        if (size := file.stat().st_size) != record["bytes"]:
            raise UserError(f"{file} has {size:,} bytes, its manifest says {record['bytes']:,}.")
        if manifest.file_record(file)["sha256"] != record["sha256"]:
            raise UserError(f"{file} is not what its manifest describes: the sha256 differs.")
    return found


def _refuse_model(file: Path, theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    for name in sorted(theirs.keys() | ours.keys()):
        their, our = ("nothing" if name not in found else tuple(found[name].shape) for found in (theirs, ours))
        if their != our:
            raise Misuse(f"{file} is of another model: as {name} it has {their}, expected is {our}. Go on with the same model.")


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; a list of dicts as a dict of them by their number."""
    if isinstance(values, list) and any(isinstance(value, dict) for value in values):
        values = {str(number): value for number, value in enumerate(values)}
    if not isinstance(values, dict):
        return {key: values}
    return {name: value for part, inner in values.items() for name, value in _flat(inner, f"{key}.{part}".lstrip(".")).items()}
