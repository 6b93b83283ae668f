"""MindSpore's .ckpt file: named tensors, mapped from it.

The file is protobuf, `Checkpoint { repeated Value { tag, TensorProto { dims, tensor_type, tensor_content } } }`
(mindspore/ccsrc/utils/checkpoint.proto), with one value after another, and may be larger than the 2 GB that protobuf
libraries read. So its wire format is read here, over a memory map: keys that hold a field's number and wire type, then a whole
number or a length and so many bytes. A large tensor is cut into several values of one tag, which follow each other.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

FIRST = b"\x0a"  # every such file begins with the key of a value
CRC = b"crc_num"  # and may end with this, and the crc32 of all before it, 10 bytes with the highest first
CRC_BYTES = 10
BLOCK = 1 << 24  # bytes per step of the checksum
LONGEST_VARINT = 10  # bytes
MOST_NUMBERS = 2**62  # of one tensor; PyTorch counts no further
SKIPPED = {1: 8, 5: 4}  # wire type -> bytes of a number that no field of ours has
DTYPES = {
    "Bool": torch.bool,
    "Int8": torch.int8,
    "Int16": torch.int16,
    "Int32": torch.int32,
    "Int64": torch.int64,
    "UInt8": torch.uint8,
    "Uint8": torch.uint8,
    "Float16": torch.float16,
    "BFloat16": torch.bfloat16,
    "Float32": torch.float32,
    "Float64": torch.float64,
}


class DamagedError(Exception):
    """What does not follow the format."""


@dataclass(frozen=True)
class Piece:
    """One value of the file: a tensor, or a part of one."""

    tag: str
    dims: tuple[int, ...]  # of the whole tensor
    kind: str  # a key of DTYPES, or a kind that is no tensor of a model
    content: slice  # bytes of the file


def read_mindspore(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of `path`, and the names of entries that are not tensors of numbers.

    The tensors are views of the mapped file and may lie at odd addresses: `weights_file.aligned` copies where it matters.
    Raises DamagedError.
    """
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    pieces: dict[str, list[Piece]] = {}
    last = None
    for number, value in _fields(memory, 0, _end(memory)):
        if number != 1 or isinstance(value, int):
            raise DamagedError("it holds what is no entry of a checkpoint")
        piece = _piece(memory, value)
        if piece.tag in pieces and piece.tag != last:
            raise DamagedError(f"{piece.tag!r} is there twice")
        pieces.setdefault(piece.tag, []).append(piece)
        last = piece.tag
    tensors = {tag: _tensor(memory, parts) for tag, parts in pieces.items() if parts[0].kind in DTYPES}
    return tensors, [tag for tag in pieces if tag not in tensors]


def _end(memory: mmap.mmap) -> int:
    """Where the values end. Raises DamagedError when a checksum follows and is not theirs."""
    end = len(memory) - CRC_BYTES - len(CRC)
    if end < 0 or memory[end : end + len(CRC)] != CRC:
        return len(memory)
    found = 0
    for start in range(0, end, BLOCK):
        found = zlib.crc32(memory[start : min(start + BLOCK, end)], found)
    if found != int.from_bytes(memory[-CRC_BYTES:], "big"):
        raise DamagedError("its checksum differs")
    return end


def _fields(memory: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int | slice]]:
    """Number and content of every field of a message: a whole number, or where its bytes lie."""
    at = start
    while at < end:
        key, at = _varint(memory, at, end)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(memory, at, end)
            yield number, value
        elif wire == 2:
            length, at = _varint(memory, at, end)
            if length > end - at:
                raise DamagedError(f"it ends {length - (end - at):,} bytes too early")
            yield number, slice(at, at + length)
            at += length
        elif wire in SKIPPED and SKIPPED[wire] <= end - at:
            at += SKIPPED[wire]
        else:
            raise DamagedError("it holds what is no entry of a checkpoint")


def _varint(memory: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """A whole number, 7 bits a byte and the lowest first, and where it ends."""
    value = 0
    for n in range(LONGEST_VARINT):
        if at + n >= end:
            raise DamagedError("it ends too early")
        byte = memory[at + n]
        value |= (byte & 0x7F) << (7 * n)
        if byte < 0x80:
            return value, at + n + 1
    raise DamagedError("it holds what is no entry of a checkpoint")


def _piece(memory: mmap.mmap, where: slice) -> Piece:
    tag, dims, kind, content = "", list[int](), "", slice(0, 0)
    for number, value in _fields(memory, where.start, where.stop):
        if number == 1 and isinstance(value, slice):
            tag = _text(memory, value)
        elif number == 2 and isinstance(value, slice):
            for field, held in _fields(memory, value.start, value.stop):
                if field == 1:
                    dims += [held] if isinstance(held, int) else _packed(memory, held)
                elif field == 2 and isinstance(held, slice):
                    kind = _text(memory, held)
                elif field == 3 and isinstance(held, slice):
                    content = held
    if not tag:
        raise DamagedError("an entry has no name")
    return Piece(tag, tuple(dims), kind, content)


def _packed(memory: mmap.mmap, where: slice) -> list[int]:
    """Whole numbers written without a key each."""
    numbers, at = [], where.start
    while at < where.stop:
        number, at = _varint(memory, at, where.stop)
        numbers.append(number)
    return numbers


def _text(memory: mmap.mmap, where: slice) -> str:
    try:
        return memory[where].decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedError("a name in it is no text") from error


def _tensor(memory: mmap.mmap, pieces: list[Piece]) -> Tensor:
    first = pieces[0]
    dims, dtype = first.dims, DTYPES[first.kind]
    if any((piece.dims, piece.kind) != (dims, first.kind) for piece in pieces):
        raise DamagedError(f"the parts of {first.tag!r} have different shapes")
    held = sum(piece.content.stop - piece.content.start for piece in pieces)
    if dims == (0,) and held == dtype.itemsize:
        dims = ()  # how MindSpore 1 writes a single number
    if prod(dims) * dtype.itemsize != held:
        raise DamagedError(f"{first.tag!r} has {held:,} bytes, its shape takes {prod(dims) * dtype.itemsize:,}")
    if prod(max(size, 1) for size in dims) > MOST_NUMBERS:  # where one size is 0, the bytes do not tell
        raise DamagedError(f"{first.tag!r} has the impossible shape {dims}")
    if held == 0:
        return torch.empty(dims, dtype=dtype)
    starts = [(piece.content.start, piece.content.stop - piece.content.start) for piece in pieces]
    parts = [torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=count) for start, count in starts if count]
    raw = parts[0] if len(parts) == 1 else torch.cat(parts)
    return raw.view(dtype).reshape(dims)
