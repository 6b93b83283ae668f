"""Pictures that are none, and folders that do not hold them."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.bad_input.table import Case, Spoil, Work, options, refused


def _bytes(form: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, form)
    return file.getvalue()


def _bomb() -> bytes:
    """The first bytes of a PNG of 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def _holding(name: str, data: bytes) -> Spoil:
    return lambda work: _made(work, name, lambda path: path.write_bytes(data))


def _made(work: Work, name: str, make: Callable[[Path], object]) -> None:
    make(work.picture(name))


def _all_broken(work: Work) -> list[object]:
    for path in work["images"].iterdir():
        path.write_bytes(b"")
    return ["--skip-broken"]


JPEG, PNG = _bytes("JPEG"), _bytes("PNG")
CASES = [
    Case("truncated JPEG", "pre", ("bad.jpg", "entry 1", "truncated"), _holding("bad.jpg", JPEG[: len(JPEG) // 2])),
    Case("zero-byte JPEG", "pre", ("bad.jpg", "entry 1", "is empty (0 bytes)"), _holding("bad.jpg", b"")),
    Case("text file named .jpg", "pre", ("bad.jpg", "entry 1", "is not a picture"), _holding("bad.jpg", b"404 not found\n")),
    Case(
        "EPS named .jpg",
        "pre",
        ("bad.jpg", "entry 1", "not a picture in a format that Pillow decodes by itself"),
        _holding("bad.jpg", _bytes("EPS")),
    ),
    Case("decompression bomb", "pre", ("bad.png", "entry 1", "decompression bomb"), _holding("bad.png", _bomb())),
    Case("damaged PNG", "pre", ("bad.png", "entry 1", "cannot be decoded"), _holding("bad.png", PNG[:200] + b"?" * 40)),
    Case(
        "missing picture", "pre", ("bad.jpg", "entry 1", "does not exist"), lambda work: _made(work, "bad.jpg", lambda path: None)
    ),
    Case("folder named .jpg", "pre", ("bad.jpg", "entry 1", "is not a file"), lambda work: _made(work, "bad.jpg", Path.mkdir)),
    Case("pipe named .jpg", "pre", ("bad.jpg", "entry 1", "is not a file"), lambda work: _made(work, "bad.jpg", os.mkfifo)),
    Case(
        "link to itself",
        "pre",
        ("bad.jpg", "entry 1", "too many levels of symbolic links"),
        lambda work: _made(work, "bad.jpg", lambda path: path.symlink_to(path.name)),
    ),
    Case(
        "name too long",
        "pre",
        ("entry 1", "file name too long"),
        lambda work: _made(work, f"{'a' * 300}.jpg", lambda path: None),
    ),
    Case("every picture broken", "pre", ("4 of 4", "Nothing would remain"), _all_broken),
    Case("no picture folder", "pre", ("no folder", "nowhere", "--images"), options("--images", "nowhere")),
    Case("file as picture folder", "pre", ("no folder", "--images"), lambda work: ("--images", work["annotations.json"])),
    Case("another picture folder", "pre", ("None of the 4", "--images"), lambda work: ("--images", work["graphs"])),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pictures(case: Case, work: Work) -> None:
    refused(case, work)
