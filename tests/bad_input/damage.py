"""Ways to spoil what a step reads, for the tables of cases."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import manifest
from tests import chain
from tests.bad_input.table import Spoil, Work

Change = Callable[[Any], object]


def given(option: str, name: str, *others: object) -> Spoil:
    """`option` names a file or folder of the chain; then come `others`."""
    return lambda work: (option, work[name], *others)


def together(*spoils: Spoil) -> Spoil:
    """One after the other."""
    return lambda work: [option for spoil in spoils for option in spoil(work) or ()]


def holding(file: str, data: str | bytes) -> Spoil:
    """`file` holds these bytes."""
    raw = data.encode() if isinstance(data, str) else data
    return lambda work: work[file].write_bytes(raw) and None


def changed(file: str, change: Callable[[bytes], bytes], *added: object) -> Spoil:
    """The bytes of a file of the chain, changed."""

    def spoil(work: Work) -> tuple[object, ...]:
        work[file].write_bytes(change(work[file].read_bytes()))
        return added

    return spoil


def cut(data: bytes) -> bytes:
    """The first half and a little more."""
    return data[: int(len(data) * 0.6)]


def flipped(data: bytes) -> bytes:
    """One bit in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def gone(file: str) -> Spoil:
    return lambda work: work[file].unlink()


def linked(name: str, target: str) -> Spoil:
    """A link called `name` to `target`, which may be anything."""
    return lambda work: work[name].symlink_to(target)


def edited(folder: str, change: Change) -> Spoil:
    """The manifest of `folder`, and nothing that would agree with it."""
    return lambda work: work.edit(f"{folder}/{manifest.NAME}", change)


def signed(folder: str, change: Change) -> Spoil:
    """The content is wrong and everything else agrees with it."""

    def spoil(work: Work) -> None:
        work.edit(f"{folder}/{manifest.NAME}", change)
        work.resign(folder)

    return spoil


def tensor(folder: str, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    """A tensor is another one than its manifest says, though the file is listed as it is."""

    def spoil(work: Work) -> None:
        path = work[folder] / f"{name}.npy"
        np.save(path, change(np.load(path)))
        work.resign(folder)

    return spoil


def without_graph(name: str) -> Spoil:
    """graphs/ as an export without `name` would have written it."""

    def spoil(work: Work) -> None:
        found = manifest.read(work["graphs"], "graphs")
        shutil.move(work["graphs"], work["all graphs"])
        chain.with_only(work["all graphs"], work["graphs"], *(found.content["graphs"].keys() - {name}))

    return spoil


class Hostile:
    """Unpickled without care, it makes the folder it is given."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def saved(content: Any, keep: float = 1.0, option: str = "--checkpoint") -> Spoil:
    """A .pth of `content`, of which the first part is kept; `option` names it."""

    def spoil(work: Work) -> list[object]:
        torch.save(content, work["bad.pth"])
        data = work["bad.pth"].read_bytes()
        work["bad.pth"].write_bytes(data[: int(len(data) * keep)])
        return [option, work["bad.pth"]]

    return spoil


def weights(file: str, change: Callable[[dict[str, Any]], object]) -> Spoil:
    """A .pth with its tensors changed, where they lie under "model" or by themselves."""

    def spoil(work: Work) -> None:
        content = torch.load(work[file], weights_only=True)
        change(content.get("model", content))
        torch.save(content, work[file])

    return spoil
