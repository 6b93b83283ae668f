"""Plain values, as YAML and JSON have them, to settings: their keys and their types. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from models.errors import Misuse
from training.settings import Settings

PRESET = "preset"  # the key that names what a file begins from
SHOWN = 60  # letters of a value in a message
POWER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.1 takes 1e-4, which has no point, for a text
# What LAVIS, mindformers and PaddleMIX call our keys, where it is not alike.
OF_OTHERS = {
    **dict.fromkeys(("init_lr", "learning_rate"), "schedule.lr"),
    **dict.fromkeys(("lr_end", "eta_min"), "schedule.min_lr"),
    **dict.fromkeys(("warmup_lr_init", "warmup_start_lr"), "schedule.warmup_lr"),
    **dict.fromkeys(("lr_sched", "lr_scheduler_name"), "schedule.kind"),
    **dict.fromkeys(("max_epoch", "num_train_epochs"), "run.epochs"),
    **dict.fromkeys(("batch_size", "batch_size_train", "per_device_train_batch_size"), "run.batchsize"),
    **dict.fromkeys(("batch_size_eval", "batch_size_test", "per_device_eval_batch_size"), "run.eval_batchsize"),
    **dict.fromkeys(("accum_grad_iters", "gradient_accumulation_steps"), "optimizer.accumulate"),
    **dict.fromkeys(("amp", "compute_dtype"), "run.precision"),
    **dict.fromkeys(("use_grad_checkpoint", "vit_grad_ckpt"), "run.checkpointing"),
    **dict.fromkeys(("output_dir", "output"), "run.out"),
    **dict.fromkeys(("max_iters", "max_steps"), "run.steps"),
    **dict.fromkeys(("log_freq", "logging_steps"), "run.log_every"),
    **dict.fromkeys(("max_len", "max_new_tokens"), "run.generation.max_length"),
    "model_type": "model.name",
    "max_txt_len": "data.max_length",
    "max_grad_norm": "optimizer.clip",
    "save_steps": "run.save_every",
    "save_total_limit": "run.keep",
    "min_len": "run.generation.min_length",
}
# What they call our values, where nothing here looks like it, or the wrong one.
VALUES_OF_OTHERS = {
    "gpu": "cuda",
    "fsdp": "full_shard",
    "linear_warmup_cosine_lr": "lavis",
    "linear_warmup_step_lr": "lavis-step",
}


def typed(hint: Any, value: Any, key: str, where: str, whole: bool) -> Any:
    """`value`, which stands under the dotted `key` of the source `where`, as the type `hint`.

    With `whole` False it may lack keys and change items of a list by their number; then only what is refused counts.

    Raises Misuse: an unknown key (the nearest one is named), a missing one, another type, and what `hint` itself refuses.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # of one type and None
        return None if value is None else typed(args[0], value, key, where, whole)
    if dataclasses.is_dataclass(hint):
        return _part(hint, value, key, where, whole)
    if origin is tuple:
        return _list(args, value, key, where, whole)
    if origin is Literal:
        if value not in args:
            theirs = VALUES_OF_OTHERS.get(str(value))
            near = [theirs] if theirs in args else difflib.get_close_matches(str(value), args, n=1)
            raise _wrong(key, value, f"one of {', '.join(args)}{f' (did you mean {near[0]}?)' if near else ''}", where)
        return value
    return SCALARS[hint](value, key, where)


def _part(kind: Any, value: Any, key: str, where: str, whole: bool) -> Any:
    if not isinstance(value, dict):
        raise _wrong(key, value, f"keys with values: {', '.join(_names(kind))}", where)
    for name in value:
        if name not in _names(kind):
            if dotted(key, name) in keys(Settings):  # "run.epochs" as one key
                outer, _, inner = name.rpartition(".")
                raise Misuse(f"{where}: {name} is one key; expected {outer} with {inner} below it. Points are for --set.")
            raise Misuse(
                f"{where}: there is no key {dotted(key, name)}. Did you mean {_nearest(kind, key, str(name))}? "
                f"Known {f'in {key}' if key else 'here'}: {', '.join(_names(kind))}."
            )
    hints = get_type_hints(kind)
    read = {name: typed(hints[name], part, dotted(key, name), where, whole) for name, part in value.items()}
    if not whole:
        return None
    for field in dataclasses.fields(kind):
        default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name not in read and not default:
            raise Misuse(f"{where}: {dotted(key, field.name)} is missing. Give it in the file or with --set.")
    try:
        return kind(**read)
    except Misuse as error:  # out of its range
        raise Misuse(f"{where}: {error.message}") from error


def _list(args: tuple[Any, ...], value: Any, key: str, where: str, whole: bool) -> Any:
    if not whole and by_number(value):
        for number, part in value.items():
            typed(args[0], part, dotted(key, number), where, whole)
        return None
    wanted = "a list" if args[1] is ... else f"a list of {len(args)}"
    wanted += f" ({key}.0 is its first item)" if isinstance(value, dict) else ""
    if not isinstance(value, list) or (args[1] is not ... and len(value) != len(args)):
        raise _wrong(key, value, wanted, where)
    # An item of a list that the file gives is new: nothing is joined with it.
    return tuple(typed(args[0], part, dotted(key, number), where, whole) for number, part in enumerate(value))


def _names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _nearest(kind: Any, key: str, name: str) -> str:
    """The known key that is most like `name`: what it is called elsewhere, one beside it, or one of such a name elsewhere."""
    if name in OF_OTHERS:
        return OF_OTHERS[name]
    if near := difflib.get_close_matches(name, _names(kind), n=1, cutoff=0.6):
        return dotted(key, near[0])
    elsewhere = {path.rpartition(".")[2]: path for path in reversed(list(keys(Settings)))} | {PRESET: PRESET}
    if near := difflib.get_close_matches(name, list(elsewhere), n=1, cutoff=0.6):
        return elsewhere[near[0]]
    return dotted(key, difflib.get_close_matches(name, _names(kind), n=1, cutoff=0.0)[0])


def keys(kind: Any, key: str = "") -> Iterator[str]:
    """Every dotted key below `key`, parts and their fields; those of a list's items without a number."""
    for name, hint in get_type_hints(kind).items():
        yield dotted(key, name)
        for part in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from keys(part, dotted(key, name))


def by_number(value: object) -> bool:
    """Whether it is a mapping that changes items of a list: its keys are numbers."""
    return isinstance(value, dict) and bool(value) and all(type(number) is int for number in value)


def dotted(key: str, name: object) -> str:
    """The key of `name` below `key`."""
    return f"{key}.{name}" if key else str(name)


def _wrong(key: str, value: object, expected: str, where: str) -> Misuse:
    return Misuse(f"{where}: {key} is {shown(value)}; expected {expected}.")


def shown(value: object) -> str:
    """`value` in a message, as YAML would have it, or in a few words."""
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _flag(value: Any, key: str, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false", where)
    return value


def _whole(value: Any, key: str, where: str) -> int:
    number = float(value) if isinstance(value, str) and POWER.fullmatch(value) else value
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool) or not abs(number) < 2**63:
        raise _wrong(key, value, "a whole number", where)
    return number


def _number(value: Any, key: str, where: str) -> float:
    number = float(value) if isinstance(value, str) and POWER.fullmatch(value) else value
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not abs(number) <= sys.float_info.max:
        raise _wrong(key, value, "a number", where)
    return float(number)


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(key, value, "a text (in quotes, if YAML takes it for something else)", where)
    return value


def _path(value: Any, key: str, where: str) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise _wrong(key, value, "a path (in quotes, if YAML takes it for something else)", where)
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise _wrong(key, value, "a path; there is no such user", where) from error


SCALARS: dict[Any, Any] = {bool: _flag, int: _whole, float: _number, str: _text, Path: _path}
