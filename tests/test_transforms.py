"""Training pictures: torchvision's crop, flips, BLIP's operations against independent formulas, exact for a seed."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from models.errors import Misuse
from training import transforms
from training.order import PICTURE, randomness
from training.transforms import FILL, NAMED, OPERATIONS, RandAugment, Transform, crop_box, named, rotation, shifted, warped


def picture(height: int = 24, width: int = 30, low: int = 0, high: int = 255) -> np.ndarray:
    """(H, W, 3) uint8: a slope in each channel, with a bright square on it."""
    y, x = np.mgrid[:height, :width]
    found = np.stack([x / width, y / height, (x + y) / (width + height)], axis=-1)
    found[height // 4 : height // 2, width // 4 : width // 2] = (1, 0.3, 0.6)
    return (low + found * (high - low)).astype(np.uint8)


def grain(height: int = 24, width: int = 30) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)


def bilinear(pixels: np.ndarray, back: np.ndarray) -> np.ndarray:
    """(H, W, 3) float: what lies at back (2, 3) times (x, y, 1), read pixel by pixel without rounding; FILL outside."""
    height, width, _ = pixels.shape

    def at(row: int, column: int) -> np.ndarray:
        inside = 0 <= row < height and 0 <= column < width
        return pixels[row, column].astype(float) if inside else np.full(3, float(FILL))

    out = np.empty(pixels.shape)
    for y in range(height):
        for x in range(width):
            u, v = back @ (x, y, 1)
            left, top = math.floor(u), math.floor(v)
            a, b = u - left, v - top
            upper = (1 - a) * at(top, left) + a * at(top, left + 1)
            lower = (1 - a) * at(top + 1, left) + a * at(top + 1, left + 1)
            out[y, x] = (1 - b) * upper + b * lower
    return out


def test_crops_are_within_the_scale_and_the_ratios() -> None:
    width, height = 640, 480
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(width, height, (0.5, 1.0), rng) for _ in range(2000)])
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, ratio = across * down / (width * height), across / down
    assert boxes.min() >= 0
    assert (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()
    assert 0.497 < share.min() < 0.51
    assert share.max() <= 1.0
    assert 3 / 4 - 0.003 < ratio.min() < 0.78
    assert 1.3 < ratio.max() < 4 / 3 + 0.003
    # What does not fit is drawn again, so large crops are rarer than small ones; without the rule the mean would be 0.75.
    assert 0.62 < share.mean() < 0.72
    small = np.array([crop_box(width, height, (0.2, 0.3), rng) for _ in range(2000)])
    shares = (small[:, 2] - small[:, 0]) * (small[:, 3] - small[:, 1]) / (width * height)
    assert abs(shares.mean() - 0.25) < 0.003  # all fit: uniform
    logs = np.log((small[:, 2] - small[:, 0]) / (small[:, 3] - small[:, 1]))
    assert abs(logs.mean()) < 0.02
    assert abs(logs.std() - math.log(4 / 3) / math.sqrt(3)) < 0.01
    room = small[:, 0] / (width - (small[:, 2] - small[:, 0]))
    assert abs(room.mean() - 0.5) < 0.03
    assert room.min() < 0.01
    assert room.max() > 0.99


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (100, 1000, (0, 433, 100, 566)),  # too narrow: all of its width, 100 / (3/4) high
        (1000, 100, (433, 0, 566, 100)),  # too wide: all of its height
        (1, 50, (0, 24, 1, 25)),
    ],
)
def test_what_no_crop_fits_is_cut_in_the_middle(width: int, height: int, box: tuple[int, ...]) -> None:
    assert crop_box(width, height, (0.9, 1.0), np.random.default_rng(0)) == box


def test_a_transform_is_crop_resize_and_flip() -> None:
    image = Image.fromarray(picture(60, 80))
    seen = Counter[bool]()
    for seed in range(200):
        found = Transform(16)(image, np.random.default_rng(seed))
        box = crop_box(80, 60, (0.5, 1.0), np.random.default_rng(seed))
        plain = np.asarray(image.crop(box).resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        flipped = not np.array_equal(found, plain)
        np.testing.assert_array_equal(found, plain[:, :, ::-1] if flipped else plain)
        seen[flipped] += 1
        assert found.flags.c_contiguous
    assert 80 < seen[True] < 120


def test_a_picture_may_be_taken_whole() -> None:
    image = Image.fromarray(picture(60, 80))
    whole = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(Transform(16, crop_scale=None, flip=0)(image, rng), whole)
    np.testing.assert_array_equal(Transform(16, crop_scale=None, flip=1)(image, rng), whole[:, :, ::-1])
    linear = Transform(16, "bilinear", crop_scale=None, flip=0)(image, rng)
    assert not np.array_equal(linear, whole)


def test_a_shift_repeats_the_edge() -> None:
    pixels = grain(8, 8).transpose(2, 0, 1)
    np.testing.assert_array_equal(shifted(pixels, 2, 0)[:, :6], pixels[:, 2:])
    np.testing.assert_array_equal(shifted(pixels, 2, 0)[:, 6], pixels[:, 7])
    np.testing.assert_array_equal(shifted(pixels, 0, -3)[:, :, 3:], pixels[:, :, :-3])
    np.testing.assert_array_equal(shifted(pixels, 0, -3)[:, :, 0], pixels[:, :, 0])
    image = Image.fromarray(grain(8, 8))
    found = {Transform(8, crop_scale=None, flip=0, shift=1)(image, np.random.default_rng(n)).tobytes() for n in range(60)}
    assert found == {shifted(pixels, down, right).tobytes() for down in (-1, 0, 1) for right in (-1, 0, 1)}


@pytest.mark.parametrize("pixels", [picture(), picture(low=40, high=180), grain(), np.full((9, 9, 3), 77, np.uint8)])
def test_contrast_and_equalize_are_pillows(pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels)
    np.testing.assert_array_equal(OPERATIONS["AutoContrast"](pixels, 0.5, 0.5), np.asarray(ImageOps.autocontrast(image)))
    np.testing.assert_array_equal(OPERATIONS["Equalize"](pixels, 0.5, 0.5), np.asarray(ImageOps.equalize(image)))


@pytest.mark.parametrize("level", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_brightness_and_sharpness_are_pillows(level: float) -> None:
    factor, pixels = 0.1 + 1.8 * level, grain()
    image = Image.fromarray(pixels)
    bright = np.asarray(ImageEnhance.Brightness(image).enhance(factor)).astype(int)
    assert np.abs(OPERATIONS["Brightness"](pixels, level, level) - bright).max() <= (0 if level == 0.5 else 1)
    sharp = np.asarray(ImageEnhance.Sharpness(image).enhance(factor)).astype(int)
    found = OPERATIONS["Sharpness"](pixels, level, level)
    assert np.abs(found[1:-1, 1:-1] - sharp[1:-1, 1:-1]).max() <= (0 if level == 0.5 else 1)
    np.testing.assert_array_equal(found[0], pixels[0])  # Pillow smooths them as well
    assert np.array_equal(found, pixels) == (level == 0.5)  # at BLIP's magnitude neither does anything


@pytest.mark.parametrize("sign", [1, -1])
def test_translations_are_whole_pixels(sign: int) -> None:
    pixels = grain()
    moved = OPERATIONS["TranslateX"](pixels, 0.5, sign * 0.5)
    wanted = np.full_like(pixels, FILL)
    if sign > 0:  # to the left
        wanted[:, :-5] = pixels[:, 5:]
    else:
        wanted[:, 5:] = pixels[:, :-5]
    np.testing.assert_array_equal(moved, wanted)
    turned = OPERATIONS["TranslateY"](pixels.transpose(1, 0, 2), 0.5, sign * 0.5).transpose(1, 0, 2)
    np.testing.assert_array_equal(turned, wanted)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "Rotate"])
def test_shears_and_rotations_read_between_pixels(name: str, sign: int) -> None:
    """Against a loop in full precision. Positions of 1/32 pixel are off by up to 1/64 + 1/1024 in each direction, and a step
    between neighbours of the slope is at most 11, but for the edges of the square and of the picture."""
    pixels = picture()
    height, width, _ = pixels.shape
    shear, angle = sign * 0.15, math.radians(sign * 15)
    if name == "Rotate":  # back: turned the other way around (W/2, H/2)
        cos, sin = math.cos(angle), math.sin(angle)
        x, y = width / 2, height / 2
        back = np.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])
    else:
        back = np.array([[1, -shear, 0], [0, 1, 0]] if name == "ShearX" else [[1, 0, 0], [-shear, 1, 0]])
    found = OPERATIONS[name](pixels, 0.5, sign * 0.5).astype(float)
    exact = bilinear(pixels, back)
    assert np.abs(found - exact).max() <= 255 * 2 * (1 / 64 + 1 / 1024) + 0.5
    assert np.abs(found - exact).mean() < 0.6
    other = OPERATIONS[name](pixels, 0.5, -sign * 0.5).astype(float)
    assert np.abs(other - exact).mean() > 5  # the check sees a wrong direction


def test_a_warp_rounds_once() -> None:
    """Half a pixel between two values is their mean, rounded up, as in integers."""
    pixels = np.repeat(np.array([[10, 13, 20]], np.uint8)[..., None], 3, axis=-1)
    half = warped(pixels, np.array([[1, 0, -0.5], [0, 1, 0]]))[0, :, 0]
    assert half.tolist() == [12, 17, (20 + FILL) // 2]
    np.testing.assert_array_equal(warped(grain(), rotation(30, 24, 0)), grain())


def test_half_of_the_operations_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    done = Counter[str]()
    signs = Counter[float]()

    def counting(name: str) -> transforms.Operation:
        def count(pixels: np.ndarray, level: float, signed: float) -> np.ndarray:
            done[name] += 1
            signs[signed] += 1
            return pixels

        return count

    monkeypatch.setattr(transforms, "OPERATIONS", {name: counting(name) for name in OPERATIONS})
    rng = np.random.default_rng(3)
    for _ in range(5000):
        RandAugment(2, 5)(grain(2, 2), rng)
    assert set(done) == set(OPERATIONS)
    assert len(done) == 10
    assert abs(done.total() - 5000) < 200
    assert all(abs(count - 500) < 90 for count in done.values())
    assert set(signs) == {0.5, -0.5}
    assert abs(signs[0.5] - signs[-0.5]) < 250


GOLDEN_BOXES = [(17, 14, 606, 462), (17, 6, 610, 476), (140, 9, 630, 432)]
GOLDEN_PIXELS = "f018456111bc30d5"  # of the first 40 pictures


def test_golden_values_of_a_seed() -> None:
    """What a seed gives must not change: a training could not be gone on with. (The whole transform is not here: releases of
    Pillow resize differently.)"""
    assert [crop_box(640, 480, (0.5, 1.0), randomness(PICTURE, 42, 3, n)) for n in range(3)] == GOLDEN_BOXES
    augment = RandAugment(2, 5)
    found = [augment(picture(low=40), randomness(PICTURE, 42, 3, n)).tobytes() for n in range(40)]
    assert len(set(found)) == 14
    assert hashlib.sha256(b"".join(found)).hexdigest()[:16] == GOLDEN_PIXELS


def test_names_of_lavis() -> None:
    usual = Transform(224, crop_scale=(0.2, 1.0), shift=1)
    assert named(None, usual) == usual
    assert named("blip2_image_train", usual) == usual
    assert named("blip_image_train", usual).rand_augment == RandAugment(2, 5)
    assert named("blip_image_train", usual).crop_scale == (0.2, 1.0)
    assert named("blip_image_eval", usual) == Transform(224, crop_scale=None, flip=0.0)
    with pytest.raises(Misuse, match="No transform is called 'blip'; expected " + ", ".join(NAMED)):
        named("blip", usual)


def test_wrong_settings_are_one_sentence() -> None:
    with pytest.raises(Misuse, match=r"crop_scale is \[0.0, 1\]; expected two shares"):
        Transform(8, crop_scale=(0.0, 1))
    with pytest.raises(Misuse, match=r"flip is 2; expected a probability"):
        Transform(8, flip=2)
    with pytest.raises(Misuse, match=r"shift is 8; expected pixels, from 0 and below the side of the picture, 8"):
        Transform(8, shift=8)
    with pytest.raises(Misuse, match="number 2 and magnitude 11; expected"):
        RandAugment(2, 11)
