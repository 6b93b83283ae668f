"""Pictures: what `convert("RGB")` does to each kind, the resize of the pinned Pillow, the original's arithmetic."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import EpsImagePlugin, Image

from models.config import Protocol
from models.errors import UserError
from preprocess.images import FORMATS, normalise, open_rgb, read_image

PROTOCOL = Protocol()


def waves(width: int = 61, height: int = 47) -> Image.Image:
    """A picture of integer arithmetic alone: the same on every machine."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * x * 3 + y, x * y * 5, (x ^ y) * 7], -1).astype(np.uint8))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG of any kind, also those that Pillow does not write. `rows`: each begins with its filter byte."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def mode_of(path: Path) -> str:
    with Image.open(path) as picture:
        return picture.mode


def first_row(path: Path) -> list[list[int]]:
    """The colours of the first row as read."""
    values: list[list[int]] = np.asarray(open_rgb(path))[0].tolist()
    return values


# sha256 of the resized pixels. They change with the release of Pillow: then the protocol has changed, and so do figures.
GOLDEN = {
    ("bicubic", 24): "31735ce39ccbe67a9c2e860a36d82f344a29c52fd14b54d9ee6ce97054b98057",
    ("bicubic", 96): "2b9b300168a00ffd01e71b5200cd92beded02bb894c1970b28268bfba5ad0aba",
    ("bilinear", 24): "28171c6e7f95fb3358f4379fea7d70e9f7b443d238abc07e3ad23231f3e50fcc",
}


@pytest.mark.parametrize(("interpolation", "size"), GOLDEN)
def test_resize_is_that_of_the_pinned_pillow(tmp_path: Path, interpolation: str, size: int) -> None:
    waves().save(tmp_path / "waves.png")
    pixels = read_image(tmp_path / "waves.png", size, interpolation)
    assert (pixels.dtype, pixels.shape, pixels.flags.c_contiguous) == (np.uint8, (3, size, size), True)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == GOLDEN[interpolation, size], f"Pillow is {PIL.__version__}"


def test_read_is_the_original_chain(tmp_path: Path) -> None:
    waves().save(tmp_path / "waves.jpg", quality=90)
    with Image.open(tmp_path / "waves.jpg") as picture:
        want = picture.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    got = read_image(tmp_path / "waves.jpg", 32, "bicubic")
    np.testing.assert_array_equal(got.transpose(1, 2, 0), np.asarray(want))


def test_normalise_is_bit_equal_to_the_original_arithmetic() -> None:
    """torchvision's ToTensor and Normalize: div(255), then sub_(mean).div_(std), in float32, for every byte and channel."""
    pixels = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3)  # (3, 16, 16)
    mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (PROTOCOL.mean, PROTOCOL.std))
    want = torch.from_numpy(pixels).to(torch.float32).div(255).sub_(mean).div_(std).numpy()
    got = normalise(pixels, PROTOCOL.mean, PROTOCOL.std)
    assert got.dtype == np.float32
    assert got.tobytes() == want.tobytes()
    # Other ways to write the same formula are not bit-equal, so the comparison can fail.
    fused = pixels * np.float32(1 / 255)
    other = (fused - np.float32(PROTOCOL.mean).reshape(3, 1, 1)) / np.float32(PROTOCOL.std).reshape(3, 1, 1)
    assert other.astype(np.float32).tobytes() != want.tobytes()


def test_normalise_keeps_leading_axes() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 3, 4, 4), np.uint8)
    got = normalise(pixels, PROTOCOL.mean, PROTOCOL.std)
    assert got.shape == pixels.shape
    np.testing.assert_array_equal(got[1, 2], normalise(pixels[1, 2], PROTOCOL.mean, PROTOCOL.std))


def test_grey_and_one_bit(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 7, 255]], np.uint8)).save(tmp_path / "grey.png")
    assert first_row(tmp_path / "grey.png") == [[0, 0, 0], [7, 7, 7], [255, 255, 255]]
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "bit.png")
    assert first_row(tmp_path / "bit.png") == [[0, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("transparency", [None, 0, b"\x00\x80"])
def test_palette_keeps_its_colours_whatever_is_transparent(tmp_path: Path, transparency: int | bytes | None) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([1, 2, 3, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "palette.png", **({} if transparency is None else {"transparency": transparency}))
    assert mode_of(tmp_path / "palette.png") == "P"
    assert first_row(tmp_path / "palette.png") == [[1, 2, 3], [40, 50, 60]]


def test_alpha_is_dropped(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[10, 20, 30, 0], [40, 50, 60, 128]]], np.uint8)).save(tmp_path / "rgba.png")
    assert first_row(tmp_path / "rgba.png") == [[10, 20, 30], [40, 50, 60]]
    Image.fromarray(np.array([[[10, 0], [20, 200]]], np.uint8)).save(tmp_path / "la.png")
    assert first_row(tmp_path / "la.png") == [[10, 10, 10], [20, 20, 20]]


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (1, 1), (10, 20, 30, 40)).save(tmp_path / "cmyk.tif")
    assert first_row(tmp_path / "cmyk.tif") == [[round((255 - ink) * (255 - 40) / 255) for ink in (10, 20, 30)]]
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "cmyk.jpg")
    assert first_row(tmp_path / "cmyk.jpg")[0] == [255, 255, 255]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_clipped(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(np.array([[0, 1, 255, 256, 32768, 65535]], np.uint16)).save(path)
    assert mode_of(path) == "I;16"
    assert [pixel[0] for pixel in first_row(path)] == [0, 1, 255, 255, 255, 255]


def test_sixteen_bit_colour_is_its_high_byte(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0x1234, 0x00FF, 0xFF00, 0x80, 0x100, 0xFFFF)))
    assert first_row(path) == [[0x12, 0, 0xFF], [0, 1, 0xFF]]


def test_thirty_two_bit_and_float_are_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.array([[-5, 0, 255, 256, 70_000]], np.int32)).save(tmp_path / "i.tif")
    assert [pixel[0] for pixel in first_row(tmp_path / "i.tif")] == [0, 0, 255, 255, 255]
    Image.fromarray(np.array([[-5.0, 0.5, 1.0, 256.0]], np.float32)).save(tmp_path / "f.tif")
    assert [pixel[0] for pixel in first_row(tmp_path / "f.tif")] == [0, 0, 1, 255]


def test_exif_rotation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be shown standing
    waves().save(tmp_path / "plain.png")
    waves().save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as picture:
        assert picture.getexif()[0x0112] == 6
    np.testing.assert_array_equal(
        read_image(tmp_path / "turned.png", 16, "bicubic"), read_image(tmp_path / "plain.png", 16, "bicubic")
    )


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert first_row(tmp_path / "moving.gif")[0] == [250, 0, 0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1)])
def test_extreme_shapes(tmp_path: Path, shape: tuple[int, int]) -> None:
    Image.new("RGB", shape, (9, 8, 7)).save(tmp_path / "thin.png")
    assert [set(channel.flat) for channel in read_image(tmp_path / "thin.png", 16, "bicubic")] == [{9}, {8}, {7}]


def jpeg() -> bytes:
    buffer = io.BytesIO()
    waves(200, 200).save(buffer, "JPEG")
    return buffer.getvalue()


BROKEN = {
    "empty.jpg": (b"", "is empty (0 bytes)"),
    "text.jpg": (b"this is a text\n" * 20, "is not a picture in a format that Pillow decodes by itself"),
    "page.jpg": (b"<html><body>404</body></html>", "is not a picture"),
    "truncated.jpg": (jpeg()[: len(jpeg()) // 2], "cannot be decoded: image file is truncated"),
    "head.jpg": (jpeg()[:2], "is not a picture"),
    "truncated.png": (png(200, 200, 8, 0, os.urandom(201) * 200)[:60], "cannot be decoded: image file is truncated"),
    "stream.png": (png(20, 20, 8, 0, b"\0" * 420).replace(b"x\x9c", b"zz"), "cannot be decoded: broken data stream"),
    "chunk.png": (png(20, 20, 8, 0, b"\0" * 420).replace(b"IDAT", b"IDAX"), "is not a picture"),
    "bomb.png": (png(20_000, 20_000, 8, 0, b"\0"), "could be decompression bomb"),
    "bytes.jpg": (bytes(range(256)) * 4, "is not a picture"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures(tmp_path: Path, name: str) -> None:
    data, says = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        read_image(tmp_path / name, 16, "bicubic")
    assert error.value.message.startswith(str(tmp_path / name))
    assert says in error.value.message
    assert "\n" not in error.value.message


def iptc(image: bytes) -> bytes:
    """An IPTC record that holds a picture of another format (Pillow's IptcImagePlugin opens whatever it is)."""
    fields = [(3, 60, b"\1\0"), (3, 20, b"\x14"), (3, 30, b"\x14"), (3, 120, b"\5"), (8, 10, image)]
    return b"".join(struct.pack(">BBBH", 0x1C, record, number, len(data)) + data for record, number, data in fields)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n%%EOF\n"


@pytest.mark.parametrize(("name", "data"), [("plain.jpg", EPS), ("named.eps", EPS), ("inside.jpg", iptc(EPS))])
def test_no_picture_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes) -> None:
    """Pillow hands an EPS to Ghostscript, also one inside of an IPTC record."""
    (tmp_path / name).write_bytes(data)
    asked: list[str] = []

    def ghostscript(*_: object, **__: object) -> None:
        asked.append(name)
        raise OSError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    with pytest.raises(UserError, match=r"is not a picture in a format that Pillow decodes by itself\.$"):
        read_image(tmp_path / name, 16, "bicubic")
    assert not asked
    with pytest.raises(OSError, match="Ghostscript was started"), Image.open(tmp_path / name) as picture:
        picture.load()  # else the check above would see nothing


@pytest.mark.parametrize("form", sorted(set(FORMATS) - {"PSD"}))  # Pillow writes no PSD
def test_every_format_is_read_as_pillow_reads_it(tmp_path: Path, form: str) -> None:
    path = tmp_path / "named.jpg"  # the content tells what it is
    waves(32, 32).save(path, form)
    with Image.open(path) as picture:
        assert picture.format == form
        want = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(open_rgb(path)), want)


def test_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to("nowhere.jpg")
    for name, says in (
        ("absent.jpg", "does not exist"),
        ("link.jpg", "does not exist"),
        ("folder.jpg", "is not a file"),
        ("pipe.jpg", "is not a file"),
        ("n" * 300, "cannot be read (file name too long)"),
    ):
        with pytest.raises(UserError) as error:
            read_image(tmp_path / name, 16, "bicubic")
        assert error.value.message == f"{tmp_path / name} {says}."


def test_large_but_allowed_gives_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns from its limit up to twice the limit and then refuses; warnings are errors in these tests."""
    waves(40, 40).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read_image(tmp_path / "large.png", 8, "bicubic").shape == (3, 8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(UserError, match="decompression bomb"):
        read_image(tmp_path / "large.png", 8, "bicubic")
