"""Named tensors out of a file, without running or trusting what is in it.

Reads PyTorch files (`weights_only`: nothing in them is executed), safetensors files and the folders that transformers
writes. The form is told by the first bytes. Tensors stay in the file, mapped into memory, and are read
when they are used: what nobody uses costs nothing. A file from before PyTorch 1.6 cannot be mapped and is read whole.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from models.errors import UserError
from models.manifest import file_record

SINGLE, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
AGAIN = "Copy or download it again."


@dataclass(frozen=True)
class Weights:
    """What a file, or a folder of shards, holds."""

    files: tuple[Path, ...]
    tensors: dict[str, Tensor]
    beside: tuple[str, ...]  # entries that are not tensors of the model: optimizer, config, epoch
    safe: bool  # safetensors, which can hold nothing but tensors

    def sha256(self) -> str:
        """Hash of the file; of several, the hash of their hashes."""
        hashes = [file_record(file)["sha256"] for file in self.files]
        return str(hashes[0]) if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_weights(path: Path) -> Weights:
    """Open the tensors of the file or folder `path`.

    Raises UserError when it is missing, empty, damaged, of another kind, or holds objects that only running it could
    restore.
    """
    files = _files(path)
    tensors: dict[str, Tensor] = {}
    beside: list[str] = []
    safe = True
    for file in files:
        with file.open("rb") as opened:
            start = opened.read(9)
        if not start:
            raise UserError(f"{file} is empty (0 bytes). {AGAIN}")
        # Eight bytes of length, then JSON. By the name only for torch's sake, which follows it into safetensors.
        if start[8:] == b"{" or file.suffix == ".safetensors":
            tensors |= _read_safetensors(file)
            continue
        safe = False
        content = _read_torch(file, mapped=start[:2] == b"PK")
        if not isinstance(content, dict):
            raise UserError(
                f"{file} holds a {type(content).__name__}, expected a dictionary of tensors. Give a checkpoint of BLIP."
            )
        state = content["model"] if isinstance(content.get("model"), dict) else content
        beside += [str(name) for name in content if state is not content and name != "model"]
        beside += [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
        tensors |= {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    return Weights(files, tensors, tuple(beside), safe)


def _files(path: Path) -> tuple[Path, ...]:
    if path.is_file():
        return (path,)
    if not path.exists():
        raise UserError(f"There is no checkpoint {path}. Give a .pth or .safetensors file, or a folder of transformers.")
    if (path / SINGLE).is_file():
        return (path / SINGLE,)
    if (path / INDEX).is_file():
        return _shards(path / INDEX)
    if (path / PICKLED).is_file():
        return (path / PICKLED,)
    raise UserError(
        f"{path} holds no weights: expected {SINGLE}, {INDEX} or {PICKLED}. Give the file itself if it has another name."
    )


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({type(error).__name__}: {error}). {AGAIN}") from error
    if not names:
        raise UserError(f"{index} lists no files. {AGAIN}")
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} lists {name!r}, expected files of its own folder. {AGAIN}")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name} is missing, {index} lists it. {AGAIN}")
    return tuple(index.parent / name for name in names)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is a damaged or incomplete safetensors file ({error}). {AGAIN}") from error


def _read_torch(path: Path, mapped: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is about to fail
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"{path} holds Python objects and was not opened: restoring {named[1]} would run code. "
                "Save its tensors alone, with the program that made it."
            ) from error
        raise UserError(f"{path} is neither a PyTorch checkpoint nor a safetensors file, and was not opened. {AGAIN}") from error
    except Exception as error:  # whatever damaged bytes lead the reader to
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise UserError(f"{path} is a damaged or incomplete PyTorch file ({reason[:120]}). {AGAIN}") from error
