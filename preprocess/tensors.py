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
FOLDER_MODE, FILE_MODE = 0o750, 0o640  # of what ais_bench reads


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
            self.folder.mkdir(exist_ok=True)
            # ais_bench refuses what others may write. Set apart, for the umask has its say in mkdir's mode.
            for private in (folder, self.folder):
                private.chmod(FOLDER_MODE)
            self.digits = digits(shape[0])
            self.unsafe: list[Path] = []  # written, and perhaps not on the disk yet
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
            path.chmod(FILE_MODE)
            self.unsafe.append(path)

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
        before, self.digits = self.digits, digits(rows)
        self.unsafe.clear()  # of these names some are gone; nobody goes on with a tensor that was shrunk
        for number in range(old):
            path = self.folder / f"{number:0{before}d}.bin"
            if number >= rows:
                path.unlink(missing_ok=True)
            elif before != self.digits:
                path.rename(self.folder / f"{number:0{self.digits}d}.bin")

    def flush(self) -> None:
        """Put everything on the disk: it survives the end of this process, and of the machine."""
        if self.layout == PACKED:
            self.file.flush()
            os.fsync(self.file.fileno())
            return
        for path in (*self.unsafe, self.folder):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        self.unsafe.clear()

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


def digits(rows: int) -> int:
    """Digits of the names of so many files, from 0."""
    return len(str(max(rows - 1, 0)))


def stems(rows: int) -> list[str]:
    """Names, without the suffix, of the files of a tensor of so many rows, in order."""
    return [f"{row:0{digits(rows)}d}" for row in range(rows)]


class FileTensor:
    """A tensor in the `files` layout."""

    def __init__(self, folder: Path, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self.folder, self.shape, self.dtype = folder / name, shape, np.dtype(dtype)
        self.digits = digits(shape[0])

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
        layout = info.get("layout", found.content["layout"])  # its own, where a folder has both
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
