"""Tensors on disk: one reader for two layouts.

packed  `<name>.npy`, one array for all samples, memory-mapped; the default
files   `<name>/<index>.bin`, one raw file per sample, zero-padded so that any sort gives sample order: ais_bench's form

Used by preprocess (which writes data/), by runtime (which writes outputs/) and by postprocess (which reads both).
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from models import manifest
from models.errors import UserError

PACKED, FILES = "packed", "files"
LAYOUTS = (PACKED, FILES)


class Tensor(Protocol):
    """All samples of one name. Indexing the first axis reads from disk; nothing is held."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> np.ndarray: ...


class Writer:
    """Writes the rows of one tensor, in any order, each once or again with the same value.

    The space is reserved when the tensor is created, so a full disk is found before the work is done and not after.
    """

    def __init__(self, folder: Path, name: str, dtype: str, shape: tuple[int, ...], layout: str = PACKED) -> None:
        self.name, self.dtype, self.shape, self.layout = name, np.dtype(dtype), shape, layout
        self.row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
        if layout == FILES:
            self.folder = folder / name
            # ais_bench refuses folders and files that others may write or read (facts: modes 0750 and 0640).
            self.folder.mkdir(mode=0o750, exist_ok=True)
            self.digits = len(str(max(shape[0] - 1, 0)))
            return
        self.path = folder / f"{name}.npy"
        fresh = not self.path.exists()
        self.file = self.path.open("w+b" if fresh else "r+b")
        self._write_header()
        if total := self.row_bytes * shape[0]:
            try:
                os.posix_fallocate(self.file.fileno(), self.offset, total)
            except OSError as error:
                self.file.close()
                if fresh:
                    self.path.unlink()
                error.filename = str(self.path)
                raise

    def write(self, start: int, rows: np.ndarray) -> None:
        """Rows `start`, `start + 1`, ... of the tensor. Their dtype and shape must be the tensor's."""
        if rows.dtype != self.dtype or rows.shape[1:] != self.shape[1:] or start + len(rows) > self.shape[0]:
            raise ValueError(f"{self.name}: rows {rows.dtype} {rows.shape} at {start} do not fit {self.dtype} {self.shape}")
        data = np.ascontiguousarray(rows)
        if self.layout == PACKED:
            self.file.seek(self.offset + start * self.row_bytes)
            self.file.write(data.data)
            return
        for number, row in enumerate(data, start):
            path = self.folder / f"{number:0{self.digits}d}.bin"
            path.write_bytes(row.tobytes())
            path.chmod(0o640)

    def scatter(self, indices: np.ndarray, rows: np.ndarray) -> None:
        """Rows at any positions; neighbours are written together."""
        order = np.argsort(indices, kind="stable")
        runs = np.split(order, np.flatnonzero(np.diff(indices[order]) != 1) + 1)
        for run in runs:
            if len(run):
                self.write(int(indices[run[0]]), rows[run])

    def shrink(self, rows: int) -> None:
        """Keep the first `rows` rows only: what --skip-broken leaves."""
        old, self.shape = self.shape[0], (rows, *self.shape[1:])
        if self.layout == PACKED:
            self._write_header()
            self.file.truncate(self.offset + rows * self.row_bytes)
            return
        digits, self.digits = self.digits, len(str(max(rows - 1, 0)))
        for number in range(old):
            path = self.folder / f"{number:0{digits}d}.bin"
            if number >= rows:
                path.unlink(missing_ok=True)
            elif digits != self.digits:
                path.rename(self.folder / f"{number:0{self.digits}d}.bin")

    def flush(self) -> None:
        """Put everything on the disk: it survives the end of this process, and of the machine."""
        if self.layout == PACKED:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.layout == PACKED:
            self.file.close()

    def _write_header(self) -> None:
        # numpy pads the header so that its length does not depend on the number of rows.
        self.file.seek(0)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self.file, header)
        self.offset = self.file.tell()

    def info(self) -> dict[str, Any]:
        """What a manifest keeps of the tensor."""
        return {"dtype": self.dtype.name, "shape": list(self.shape)}


class FileTensor:
    """A tensor in the `files` layout."""

    def __init__(self, folder: Path, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self.folder, self.shape, self.dtype = folder / name, shape, np.dtype(dtype)
        self.digits = len(str(max(shape[0] - 1, 0)))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        rows = np.arange(len(self))[index]
        if rows.ndim == 0:
            return self._row(int(rows))
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for at, row in enumerate(rows):
            out[at] = self._row(int(row))
        return out

    def _row(self, row: int) -> np.ndarray:
        path = self.folder / f"{row:0{self.digits}d}.bin"
        data = np.fromfile(path, self.dtype)
        if data.size != math.prod(self.shape[1:]):
            raise UserError(
                f"{path} holds {data.size:,} values of {self.dtype}, expected shape {self.shape[1:]}. Write the folder again."
            )
        return data.reshape(self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def open_tensor(found: manifest.Manifest, name: str) -> Tensor:
    """Open tensor `name` of a data/ or outputs/ folder. Raises UserError when it is not what the manifest says."""
    mend = f"Write the folder again with {manifest.MADE_WITH[found.kind]}."
    try:
        info = found.content["tensors"][name]
        dtype, shape = str(np.dtype(info["dtype"])), tuple(int(d) for d in info["shape"])
        layout = found.content["layout"]
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{found.folder} has no usable tensor {name!r} ({error}). {mend}") from error
    if layout == FILES:
        return FileTensor(found.folder, name, dtype, shape)
    path = found.folder / f"{name}.npy"
    try:
        array = np.load(path, mmap_mode="r" if math.prod(shape) else None, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). {mend}") from error
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise UserError(f"{path} holds {array.dtype} {array.shape}, its manifest says {dtype} {shape}. {mend}")
    tensor: Tensor = array
    return tensor
