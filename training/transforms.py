"""What a picture goes through before training sees it: a random crop, resized, flipped, augmented, shifted.

S side of the picture that the model reads. All chance comes from the generator that is given, so that the same numbers make
the same picture in any process.

The crop is torchvision's RandomResizedCrop. The augmentation is BLIP's RandAugment (salesforce/BLIP transform/randaugment.py,
which LAVIS has too), on the S x S picture: `number` times one of OPERATIONS is drawn, each as likely, and done with
probability 1/2 at the level `magnitude` of LEVELS. BLIP takes number 2 and magnitude 5, half of all levels; there Brightness
and Sharpness have the factor 1 and change nothing. A level l (0 to 1, magnitude / LEVELS) means:
    Identity                nothing
    AutoContrast, Equalize  per channel, without a level, as PIL.ImageOps does it
    Brightness              values times 0.1 + 1.8 l, cut off to whole numbers
    Sharpness               the smoothed picture (a 3 x 3 mean that counts the middle 5 times) plus 0.1 + 1.8 l times the
                            difference to it; the outermost pixels stay
    ShearX, ShearY          by +-0.3 l of the other coordinate, which counts from the upper left corner
    TranslateX, TranslateY  by +-10 l pixels
    Rotate                  by +-30 l degrees around the point (S/2, S/2)
The last five read between pixels bilinearly, and FILL where there is no picture. They do the arithmetic of OpenCV 4's
warpAffine on bytes (positions of 1/32 pixel, products rounded once), which BLIP calls: 4.10 and 4.12 give the same to the bit.
OpenCV 5 reads otherwise: on smooth pictures some 1 % of the values differ, by 2 at most, on noise half of them.

Two differences from BLIP's code, where it overflows a byte: its AutoContrast makes a channel white whose darkest value is not
0 (salesforce/LAVIS#434, salesforce/ALBEF#134), and its Sharpness at magnitudes above 5 wraps values beyond 0 to 255 around.
Here both give what its comments promise: PIL's values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from models.errors import Misuse
from preprocess.images import to_pixels

TRIES = 10  # of a crop, before the middle is taken
RATIOS = (3 / 4, 4 / 3)  # width to height of a crop
LEVELS = 10
FILL = 128
DONE = 0.5  # probability with which an operation that was drawn is done
PLACES = 32  # positions between two pixels that warpAffine knows
FINER = 1024  # steps of a pixel in which warpAffine adds positions up


@dataclass(frozen=True)
class RandAugment:
    """How often, and how strongly. BLIP's own values are the defaults."""

    number: int = 2
    magnitude: int = 5  # 0 to LEVELS

    def __post_init__(self) -> None:
        if self.number < 0 or not 0 <= self.magnitude <= LEVELS:
            raise Misuse(
                f"rand_augment has number {self.number} and magnitude {self.magnitude}; expected a number from 0 and a magnitude "
                f"from 0 to {LEVELS}."
            )

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) uint8, to the same."""
        for operation in rng.integers(len(OPERATIONS), size=self.number):
            done, negative = rng.random() <= DONE, rng.random() > 0.5  # drawn for all, so that each takes as many numbers
            if done:
                level = self.magnitude / LEVELS
                pixels = OPERATIONS[OPERATION_NAMES[operation]](pixels, level, -level if negative else level)
        return pixels


@dataclass(frozen=True)
class Transform:
    """A picture of any size to the pixels of a training. The defaults are BLIP-2's (LAVIS: blip2_image_train)."""

    size: int  # S
    interpolation: str = "bicubic"
    crop_scale: tuple[float, float] | None = (0.5, 1.0)  # share of the area, from and to; None squeezes the whole picture
    flip: float = 0.5  # probability
    rand_augment: RandAugment | None = None
    shift: int = 0  # pixels by which the picture is moved at most, each way

    def __post_init__(self) -> None:
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise Misuse(f"crop_scale is {list(self.crop_scale)}; expected two shares of the area, such as [0.5, 1.0].")
        if not 0 <= self.flip <= 1:
            raise Misuse(f"flip is {self.flip:g}; expected a probability, 0 to 1.")
        if not 0 <= self.shift < self.size:
            raise Misuse(f"shift is {self.shift}; expected pixels, from 0 and below the side of the picture, {self.size}.")

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """An RGB picture to (3, S, S) uint8."""
        if self.crop_scale is not None:
            image = image.crop(crop_box(image.width, image.height, self.crop_scale, rng))
        pixels = to_pixels(image, self.size, self.interpolation)  # (3, S, S)
        if rng.random() < self.flip:
            pixels = pixels[:, :, ::-1]
        if self.rand_augment:
            pixels = self.rand_augment(pixels.transpose(1, 2, 0), rng).transpose(2, 0, 1)
        if self.shift:
            down, right = rng.integers(-self.shift, self.shift + 1, 2)
            pixels = shifted(pixels, int(down), int(right))
        return np.ascontiguousarray(pixels)


# The names under which LAVIS's configurations choose transforms, and what each has of its own.
NAMED: dict[str, dict[str, object]] = {
    "blip2_image_train": {"rand_augment": None},
    "blip_image_train": {"rand_augment": RandAugment()},
    "blip_image_eval": {"crop_scale": None, "flip": 0.0, "rand_augment": None, "shift": 0},
}


def named(name: str | None, usual: Transform) -> Transform:
    """`usual`, with what the transform of this name has of its own; None changes nothing. Raises Misuse for other names."""
    if name is None:
        return usual
    if name not in NAMED:
        raise Misuse(f"No transform is called {name!r}; expected {', '.join(NAMED)}.")
    return dataclasses.replace(usual, **NAMED[name])  # type: ignore[arg-type]


def crop_box(width: int, height: int, scale: tuple[float, float], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random crop: its area is uniform in `scale`, its ratio log-uniform in RATIOS. After TRIES
    that do not fit it is the largest in the middle whose ratio is within RATIOS. Source: torchvision's RandomResizedCrop."""
    for _ in range(TRIES):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            top, left = int(rng.integers(height - down + 1)), int(rng.integers(width - across + 1))
            return left, top, left + across, top + down
    across = min(width, round(height * RATIOS[1]))
    down = min(height, round(width / RATIOS[0]))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def shifted(pixels: np.ndarray, down: int, right: int) -> np.ndarray:
    """(..., S, S) as seen `down` and `right` pixels further; what comes in repeats the edge."""
    rows = np.clip(np.arange(pixels.shape[-2]) + down, 0, pixels.shape[-2] - 1)
    columns = np.clip(np.arange(pixels.shape[-1]) + right, 0, pixels.shape[-1] - 1)
    return pixels[..., rows[:, None], columns]


def auto_contrast(pixels: np.ndarray) -> np.ndarray:
    """Each channel stretched over 0 to 255; one of a single value stays."""
    low, high = pixels.min(axis=(0, 1)).astype(float), pixels.max(axis=(0, 1)).astype(float)  # (3,)
    scale = np.where(high > low, 255 / np.maximum(high - low, 1), 1.0)
    offset = np.where(high > low, -low * scale, 0.0)
    tables: np.ndarray = (np.arange(256)[:, None] * scale + offset).clip(0, 255).astype(np.uint8)  # (256, 3)
    return np.stack([tables[pixels[..., c], c] for c in range(3)], axis=-1)


def equalize(pixels: np.ndarray) -> np.ndarray:
    """Each channel with its values spread evenly; one with too few values stays."""
    return np.stack([_equalized(pixels[..., c]) for c in range(3)], axis=-1)


def _equalized(channel: np.ndarray) -> np.ndarray:
    counts = np.bincount(channel.ravel(), minlength=256)  # (256,)
    step = (channel.size - counts[counts > 0][-1]) // 255
    if step == 0:
        return channel
    below = step // 2 + np.cumsum(counts) - counts  # (256,): half a step, and the pixels of all darker values
    table = (below // step).clip(0, 255).astype(np.uint8)
    return np.take(table, channel)


def brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Values times `factor`."""
    table = (np.arange(256, dtype=np.float32) * np.float32(factor)).clip(0, 255).astype(np.uint8)
    return np.take(table, pixels)


def sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Away from the smoothed picture by `factor`: below 1 is smoother, above 1 sharper."""
    if factor == 1.0 or min(pixels.shape[:2]) < 3:
        return pixels
    height, width, _ = pixels.shape
    whole = pixels.astype(np.float32)
    inner = whole[1:-1, 1:-1]
    around = sum(whole[y : y + height - 2, x : x + width - 2] for y in range(3) for x in range(3))
    smooth = np.rint((around + 4 * inner) / np.float32(13))
    out = pixels.copy()
    out[1:-1, 1:-1] = (smooth + np.float32(factor) * (inner - smooth)).clip(0, 255).astype(np.uint8)
    return out


def warped(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3) moved: what was at (x, y) comes to matrix (2, 3) times (x, y, 1); FILL comes in."""
    height, width, _ = pixels.shape
    (a, b), (c, d) = matrix[:, :2]
    turn = np.array([[d, -b], [-c, a]]) / (a * d - b * c)
    back = -turn @ matrix[:, 2]
    x, y = np.arange(width), np.arange(height)
    rounding = FINER // PLACES // 2

    def places(row: int) -> np.ndarray:  # (H, W) int32, in PLACES of a pixel
        along = np.rint(turn[row, 0] * x * FINER).astype(np.int32)
        across = np.rint((turn[row, 1] * y + back[row]) * FINER).astype(np.int32) + rounding
        found: np.ndarray = (across[:, None] + along) // (FINER // PLACES)
        return found

    (left, right_share), (top, low_share) = (np.divmod(places(row), PLACES) for row in range(2))  # each (H, W)
    framed = np.full((height + 2, width + 2, 3), FILL, np.int32)
    framed[1:-1, 1:-1] = pixels
    columns = [np.clip(left + step + 1, 0, width + 1) for step in range(2)]
    rows = [np.clip(top + step + 1, 0, height + 1) for step in range(2)]
    shares = [[(a * b)[..., None] for b in (PLACES - right_share, right_share)] for a in (PLACES - low_share, low_share)]
    mixed = sum(shares[down][across] * framed[rows[down], columns[across]] for down in range(2) for across in range(2))
    out: np.ndarray = ((mixed + PLACES * PLACES // 2) // (PLACES * PLACES)).astype(np.uint8)
    return out


def rotation(width: int, height: int, degrees: float) -> np.ndarray:
    """(2, 3): around the middle, against the clock for positive degrees, as OpenCV's getRotationMatrix2D has it."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return np.array([[cos, sin, (1 - cos) * x - sin * y], [-sin, cos, sin * x + (1 - cos) * y]])


def _matrix(*values: float) -> np.ndarray:
    return np.array(values, np.float32).astype(float).reshape(2, 3)  # BLIP gives warpAffine single precision


# Each takes the pixels, the level, and the level with its random sign.
Operation = Callable[[np.ndarray, float, float], np.ndarray]
OPERATIONS: dict[str, Operation] = {
    "Identity": lambda pixels, level, signed: pixels,
    "AutoContrast": lambda pixels, level, signed: auto_contrast(pixels),
    "Brightness": lambda pixels, level, signed: brightness(pixels, level * 1.8 + 0.1),
    "Sharpness": lambda pixels, level, signed: sharpness(pixels, level * 1.8 + 0.1),
    "Equalize": lambda pixels, level, signed: equalize(pixels),
    "ShearX": lambda pixels, level, signed: warped(pixels, _matrix(1, signed * 0.3, 0, 0, 1, 0)),
    "ShearY": lambda pixels, level, signed: warped(pixels, _matrix(1, 0, 0, signed * 0.3, 1, 0)),
    "TranslateX": lambda pixels, level, signed: warped(pixels, _matrix(1, 0, -signed * 10, 0, 1, 0)),
    "TranslateY": lambda pixels, level, signed: warped(pixels, _matrix(1, 0, 0, 0, 1, -signed * 10)),
    "Rotate": lambda pixels, level, signed: warped(pixels, rotation(pixels.shape[1], pixels.shape[0], signed * 30)),
}
OPERATION_NAMES = tuple(OPERATIONS)
