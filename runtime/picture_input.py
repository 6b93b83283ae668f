"""Pictures as the Python interface takes them, and the pixels the graphs take.

A picture is a path (str or Path), a PIL image, or a numpy array of uint8: (H, W, 3) RGB, (H, W) grey, (H, W, 4) RGBA. What is
not RGB is converted as preprocess.images says; EXIF rotation is not applied. S is the side of the resized picture.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.config import Config
from models.errors import UserError
from preprocess.images import normalise, open_rgb, to_pixels

Picture = str | Path | Image.Image | np.ndarray
TAKEN = "a path, a PIL image or a numpy array"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def as_list(given: Any) -> tuple[list[Any], bool]:
    """What was given, as a list, and whether it was a single thing. Lists and tuples are several."""
    return (list(given), False) if isinstance(given, (list, tuple)) else ([given], True)


def read_pictures(pictures: Sequence[Any], first: int, config: Config) -> np.ndarray:
    """(B, 3, S, S) float32, as blip-pre writes them. `first` is the number of the first one, to name them in errors.

    Raises UserError for what is no picture, or cannot be decoded.
    """
    size, protocol = config.vision.image_size, config.protocol
    squares = [to_pixels(to_rgb(each, number), size, protocol.interpolation) for number, each in enumerate(pictures, first)]
    return normalise(np.stack(squares), protocol.mean, protocol.std)


def to_rgb(picture: Any, number: int = 0) -> Image.Image:
    """The picture in RGB. Raises UserError, see read_pictures."""
    if isinstance(picture, (str, Path)):
        if URL.match(str(picture)):
            raise UserError(f"{picture} is an address, and nothing here reads the network. Save the picture and give its path.")
        return open_rgb(Path(picture))
    if isinstance(picture, np.ndarray):
        picture = _from_array(picture, number)
    if not isinstance(picture, Image.Image):
        raise UserError(f"Picture {number} is of type {type(picture).__name__}; expected {TAKEN}.")
    if not all(picture.size):
        raise UserError(f"Picture {number} has no pixels: its size is {picture.width} x {picture.height}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in preprocess.images
            return picture.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # the file of a PIL image is decoded only here, and what a decoder raises is open
        raise UserError(
            f"Picture {number} cannot be decoded: {str(error).strip().rstrip('.') or type(error).__name__}."
        ) from error


def _from_array(array: np.ndarray, number: int) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise UserError(
            f"Picture {number} is an array {array.dtype} {array.shape}; expected uint8 of shape (H, W, 3), (H, W) or (H, W, 4), "
            "or a list of such arrays."
        )
    if not array.size:
        raise UserError(f"Picture {number} has no pixels: its shape is {array.shape}.")
    return Image.fromarray(array)
