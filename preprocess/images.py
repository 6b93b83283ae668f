"""Pictures to the pixels a model sees: RGB, a square resize, scaled, normalised.

Bit-equal to the original's `Image.open(path).convert("RGB")` -> Resize((S, S)) -> ToTensor -> Normalize
(salesforce/BLIP data/coco_karpathy_dataset.py, data/__init__.py), given the same release of Pillow: its releases resize
differently, so the release is part of the protocol. S is the side of the resized picture.

What `convert("RGB")` does to a picture that is not RGB (Pillow 13.0.0; a test holds each):
    grey, 1 bit     the three channels are equal
    palette         its colours; an entry marked transparent keeps the colour that the palette gives it
    alpha           dropped, not composited: a transparent pixel shows the colour stored under it
    CMYK            (255 - ink) * (255 - black) / 255, no colour profile is applied
    16-bit grey     values above 255 become 255 (clipped, not scaled), so such a picture is all but white
    16-bit colour   already 8 bits when opened: the high byte
    EXIF rotation   ignored: the picture lies as it is stored
    animation       the first frame
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from models.config import INTERPOLATIONS
from models.errors import UserError

FILTERS = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}
# What Pillow decodes by itself. Not here on purpose: EPS, for which it starts Ghostscript, and IPTC, which may hold an EPS.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "AVIF", "JPEG2000"),
    *("ICO", "PCX", "PSD", "QOI", "SGI", "TGA"),
)


def obstacle(path: Path) -> str | None:
    """Why this cannot be a picture, seen without opening it; None when it may be one."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:  # a name that is too long, a folder that may not be read
        return f"cannot be read ({(error.strerror or str(error)).lower()})"
    except ValueError as error:  # NUL, or half a character, which no annotation can hold but a program can give
        return f"cannot be read ({error})"
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        return "is not a file"
    return None if found.st_size else "is empty (0 bytes)"


def open_rgb(path: Path) -> Image.Image:
    """The picture decoded and converted to RGB as the original does it, which is `convert("RGB")` and nothing else.

    Raises UserError, see read_image. Nothing of an untrusted file reaches another program.
    """
    if reason := obstacle(path):
        raise UserError(f"{path} {reason}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata do not change a pixel
            with Image.open(path, formats=FORMATS) as image:
                return image.convert("RGB")
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not a picture in a format that Pillow decodes by itself.") from error
    except Exception as error:  # what a decoder raises on a broken file is open: OSError, SyntaxError, struct.error, ...
        why = os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else str(error).strip().rstrip(".")
        raise UserError(f"{path} cannot be decoded: {why or type(error).__name__}.") from error


def to_pixels(image: Image.Image, size: int, interpolation: str) -> np.ndarray:
    """(3, S, S) uint8: the picture squeezed into a square, its aspect ratio ignored."""
    square = image.resize((size, size), FILTERS[interpolation])
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))  # (3, S, S)


def read_image(path: Path, size: int, interpolation: str) -> np.ndarray:
    """(3, S, S) uint8. `interpolation` is "bicubic" (the protocol) or "bilinear".

    Raises UserError, naming the file and the reason, when it is missing, empty, truncated, no picture in one of FORMATS, or so
    large that Pillow takes it for a decompression bomb.
    """
    return to_pixels(open_rgb(path), size, interpolation)


def normalise(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(..., 3, S, S) uint8 to float32, ((x / 255) - mean) / std, every step rounded to float32 as torchvision rounds it.

    A byte has 256 values, so the arithmetic is done once per channel and value, then looked up.
    """
    table = _table(tuple(mean), tuple(std))
    return np.stack([table[c][pixels[..., c, :, :]] for c in range(3)], axis=-3)  # (..., 3, S, S)


@cache
def _table(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    unit = np.arange(256, dtype=np.float32) / np.float32(255)  # (256,)
    shift, scale = np.array(mean, np.float32)[:, None], np.array(std, np.float32)[:, None]  # (3, 1)
    table: np.ndarray = (unit - shift) / scale  # (3, 256)
    return table
