"""Named tensors out of a file, without running or trusting what is in it.

Reads PyTorch files (`weights_only`: nothing in them is executed), safetensors files, the folders that transformers writes,
MindSpore's .ckpt and numpy's .npz. The form is told by the first bytes. Tensors stay in the file, mapped into memory, and are
read when they are used: what nobody uses costs nothing. A file from before PyTorch 1.6 and an .npz cannot be mapped and are
read whole.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from models.errors import UserError
from models.manifest import file_record
from models.mindspore_file import FIRST, DamagedError, read_mindspore

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
EXTRAS = "lavis_extras.safetensors"  # what transformers has no place for, in a folder that models.convert wrote
LISTED = 10  # names in one message
SHOWN = 24  # bytes of a file that is of no known form
AGAIN = "Copy or download it again."
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
            start = opened.read(SHOWN)
        if not start:
            raise UserError(f"{file} is empty (0 bytes). {AGAIN}")
        found, others, pickled = _read(file, start)
        if twice := found.keys() & tensors.keys():
            raise UserError(f"{path} holds {listed([min(twice)])} in two of its files. {AGAIN}")
        tensors |= found
        beside += others
        safe &= not pickled
    return Weights(files, tensors, tuple(beside), safe)


def renamed(tensors: Mapping[str, Tensor], name_of: Callable[[str], str], path: Path) -> dict[str, Tensor]:
    """The tensors under the names that `name_of` gives them. Raises UserError when two get the same one."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (new := name_of(name)) in named:
            raise UserError(f"{path} holds {listed([new])} twice, once as {listed([name])}. Give a checkpoint in one layout.")
        named[new] = tensor
    return named


def listed(names: Sequence[str], comma: str = ", ") -> str:
    """The first of `names` for a message, and how many there are."""
    more = f"{comma}and {len(names) - LISTED} more ({len(names)} in all)" if len(names) > LISTED else ""
    # Names come from the file: one with line breaks or terminal codes is shown quoted.
    return comma.join(name if name.isprintable() else repr(name) for name in names[:LISTED]) + more


def is_plain(tensor: Tensor) -> bool:
    """Floating-point numbers in memory: not whole numbers, not of 8 bits, not sparse, not a shape without content."""
    return tensor.dtype in FLOATS and tensor.layout == torch.strided and tensor.device.type == "cpu"


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if it lies in a file at an address that is no multiple of its element's size."""
    misplaced = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.data_ptr() % tensor.element_size()
    return tensor.clone(memory_format=torch.contiguous_format) if misplaced else tensor


def _read(file: Path, start: bytes) -> tuple[dict[str, Tensor], list[str], bool]:
    """Tensors of one file that begins with `start`, the names of what else it holds, and whether it is a pickle."""
    # Eight bytes of length, then JSON. By the name only for torch's sake, which follows it into safetensors.
    if start[8:9] == b"{" or file.suffix == ".safetensors":
        return _read_safetensors(file), [], False
    if start[:1] == FIRST:
        try:
            return *read_mindspore(file), False
        except DamagedError as error:
            raise UserError(f"{file} is a damaged or incomplete MindSpore file: {error}. {AGAIN}") from error
    zipped = start[:2] == b"PK"
    if zipped and _is_numpy(file):
        return *_read_numpy(file), False
    if not zipped and start[:1] != pickle.PROTO:
        if file.suffix == ".ckpt":
            raise UserError(
                f"{file} is no checkpoint that MindSpore or PyTorch wrote, or it is encrypted (MindSpore's enc_key). "
                "Save it without a key, or copy it again."
            )
        begin = repr(start).removeprefix("b")
        raise UserError(f"{file} is neither a PyTorch checkpoint nor a safetensors file: it begins with {begin}. {AGAIN}")
    content = _read_torch(file, mapped=zipped)
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, expected a dictionary of tensors. Give a checkpoint of BLIP.")
    state = content["model"] if isinstance(content.get("model"), dict) else content
    beside = [str(name) for name in content if state is not content and name != "model"]
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor) and not value.is_nested}
    beside += [str(name) for name in state if str(name) not in tensors]
    return tensors, beside, True


def _files(path: Path) -> tuple[Path, ...]:
    if path.is_file():
        return (path,)
    if not path.exists():
        raise UserError(f"There is no checkpoint {path}. Give a .pth, .safetensors or .ckpt file, or a folder of transformers.")
    extras = (path / EXTRAS,) if (path / EXTRAS).is_file() else ()
    if (path / SINGLE).is_file():
        return (path / SINGLE, *extras)
    if (path / INDEX).is_file():
        return (*_shards(path / INDEX), *extras)
    if (path / PICKLED).is_file():
        return (path / PICKLED,)
    if (path / PICKLED_INDEX).is_file():
        return _shards(path / PICKLED_INDEX)
    raise UserError(
        f"{path} holds no weights: expected {SINGLE}, {PICKLED} or an index of such files ({INDEX}, {PICKLED_INDEX}). Give the "
        "file itself if it has another name."
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


def _is_numpy(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False  # PyTorch says what is wrong with it
    return bool(names) and all(name.endswith(".npy") for name in names)


def _read_numpy(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        numbers = {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind in "biuf"}
    except MemoryError:
        raise
    except Exception as error:  # whatever damaged bytes lead the reader to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is a damaged or incomplete numpy file ({reason[:120]}). {AGAIN}") from error
    return numbers, [name for name in arrays if name not in numbers]
