"""Pictures to the tensor `img` of a data/ folder, for every task, with the sizes and the protocol of the graphs that will
read it.

N pictures, S side of a picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from models import manifest
from models.config import Config
from models.config_file import from_dict
from models.errors import UserError
from preprocess.images import normalise, obstacle, open_rgb, to_pixels
from preprocess.tensors import PACKED, Writer
from preprocess.text import CaptionTokenizer
from preprocess.workers import in_order

SHOWN = 10  # broken pictures that an error lists
Source = Path | np.ndarray  # a file, or (H, W, 3) uint8: RGB


@dataclass(frozen=True)
class Options:
    """How to write the data."""

    layout: str = PACKED
    interpolation: str | None = None  # None: the protocol's
    workers: int = 1
    limit: int | None = None  # pictures
    skip_broken: bool = False


@dataclass(frozen=True)
class Pictures:
    """What is to be decoded, in order."""

    names: list[str]  # N, as the manifest names them
    entries: list[int]  # N: their numbers in the list they come from, from 0
    sources: Sequence[Source]  # N
    lost: str = "them"  # what --skip-broken leaves out, to speak of it

    def first(self, limit: int | None) -> Pictures:
        """The first `limit` of them, all when None."""
        return dataclasses.replace(self, names=self.names[:limit], entries=self.entries[:limit], sources=self.sources[:limit])


@dataclass(frozen=True)
class WrittenPictures:
    """What is in the folder."""

    kept: list[int]  # numbers of the pictures that were not broken
    images: list[dict[str, Any]]  # the kept: {"image", "width", "height": pixels before resizing}
    broken: list[dict[str, Any]]  # the others: {"image", "entry", "reason"}
    img: dict[str, Any]  # the tensor's info


@dataclass(frozen=True)
class Decoded:
    """One picture as a worker hands it back."""

    pixels: np.ndarray | None  # (3, S, S) uint8, None when it is broken
    width: int = 0  # pixels, before resizing
    height: int = 0
    reason: str = ""  # why it is broken


def open_graphs(graphs: Path) -> tuple[Config, CaptionTokenizer]:
    """The model's sizes and its tokenizer, from a graphs/ folder. Raises UserError when they do not fit together."""
    found = manifest.read_one_of(graphs, ("graphs", "om"))
    try:
        name, sha256 = str(found.content["tokenizer"]["file"]), found.content["tokenizer"]["sha256"]
        values = found.content["config"]
    except (KeyError, TypeError) as error:
        raise _incomplete(graphs, error) from error
    config = from_dict(values, str(graphs / manifest.NAME))
    tokenizer = CaptionTokenizer.load(graphs / name, config)
    if tokenizer.sha256 != sha256:
        raise UserError(
            f"{graphs / name} is not the file that was exported: its sha256 differs. Write the folder again with blip-export."
        )
    return config, tokenizer


def open_config(graphs: Path) -> tuple[Config, str]:
    """The sizes of a model of any kind and the sha256 of its tokenizer, from a graphs/ folder: for tasks whose texts become
    tokens only when they are run. Raises UserError when the manifest lacks them."""
    found = manifest.read_one_of(graphs, ("graphs", "om"))
    try:
        values, sha256 = found.content["config"], str(found.content["tokenizer"]["sha256"])
    except (KeyError, TypeError) as error:
        raise _incomplete(graphs, error) from error
    return from_dict(values, str(graphs / manifest.NAME)), sha256


def _incomplete(graphs: Path, error: Exception) -> UserError:
    return UserError(f"{graphs / manifest.NAME} names no config or tokenizer ({error}). Write it again with blip-export.")


def with_interpolation(config: Config, wanted: str | None) -> Config:
    """The configuration with the interpolation that was asked for; a deviation from the model's is said on screen."""
    usual = config.protocol.interpolation
    if wanted is None or wanted == usual:
        return config
    click.echo(f"Warning: {wanted} deviates from the model's protocol, {usual}; the figures will differ.", err=True)
    return dataclasses.replace(config, protocol=dataclasses.replace(config.protocol, interpolation=wanted))


def protocol_of(config: Config, tokenizer: CaptionTokenizer) -> dict[str, Any]:
    """How pictures and texts become tensors, as the manifest of a data/ folder keeps it."""
    return {
        **picture_protocol(config, tokenizer.sha256),
        "vocab": tokenizer.size,
        "encode_id": tokenizer.encode_id,
        "decode_id": tokenizer.decode_id,
        "pad_id": tokenizer.pad_id,
    }


def picture_protocol(config: Config, sha256: str) -> dict[str, Any]:
    """How pictures become tensors, and the sha256 of the tokenizer that the texts beside them are meant for."""
    return {
        **dataclasses.asdict(config.protocol),
        "image_size": config.vision.image_size,
        "tokenizer_sha256": sha256,
        "pillow": PIL.__version__,
    }


def check_folder(images: Path, names: Sequence[str], annotations: Path) -> None:
    """Raise UserError when `images` is no folder, or holds none of the pictures that `annotations` names."""
    if not images.is_dir():
        raise UserError(f"There is no folder {images}; --images takes the folder that the paths in {annotations} start from.")
    if all(obstacle(images / name) == "does not exist" for name in names):
        raise UserError(
            f"None of the {len(names):,} pictures of {annotations} is in {images}; the first is {names[0]}. "
            "--images takes the folder that these paths start from."
        )


def find_broken(pictures: Pictures, options: Options) -> dict[int, str]:
    """Numbers of the pictures that cannot be any, seen before one is decoded, and the reasons.

    Raises UserError, which lists them, unless `options.skip_broken` is set and some remain.
    """
    broken = {i: why for i, file in enumerate(pictures.sources) if isinstance(file, Path) and (why := obstacle(file))}
    _refuse(broken, pictures, options)
    return broken


def write_pictures(folder: Path, pictures: Pictures, broken: dict[int, str], config: Config, options: Options) -> WrittenPictures:
    """Decode, and write `img` (N, 3, S, S) without the broken ones. `broken` is what `find_broken` returned; what turns out
    broken on decoding is added to it, and raises the same UserError."""
    present = [i for i in range(len(pictures.sources)) if i not in broken]
    size, protocol = config.vision.image_size, config.protocol
    work = partial(decode, size=size, interpolation=protocol.interpolation)
    kept: list[int] = []
    images: list[dict[str, Any]] = []
    writer = Writer(folder, "img", "float32", (len(present), 3, size, size), options.layout)
    with closing(writer), closing(in_order(work, [pictures.sources[i] for i in present], options.workers)) as decoded:
        for number, picture in zip(present, tqdm(decoded, "pictures", len(present), unit=" pictures", disable=None), strict=True):
            if picture.pixels is None:
                broken[number] = picture.reason
                continue
            if options.skip_broken or not broken:  # else the run will fail, and only looks for what else is broken
                writer.write(len(kept), normalise(picture.pixels, protocol.mean, protocol.std)[None])  # (1, 3, S, S)
            kept.append(number)
            images.append({"image": pictures.names[number], "width": picture.width, "height": picture.height})
        _refuse(broken, pictures, options)
        if len(kept) < len(present):
            writer.shrink(len(kept))
    left_out = [{"image": pictures.names[i], "entry": pictures.entries[i], "reason": why} for i, why in sorted(broken.items())]
    return WrittenPictures(kept, images, left_out, writer.info())


def decode(source: Source, size: int, interpolation: str) -> Decoded:
    """One picture, or the reason why it is broken. Runs in a worker."""
    if isinstance(source, np.ndarray):
        image = Image.fromarray(source)
        return Decoded(to_pixels(image, size, interpolation), image.width, image.height)
    try:
        image = open_rgb(source)
    except UserError as error:
        return Decoded(None, reason=error.message.removeprefix(f"{source} ").rstrip("."))
    except MemoryError as error:
        raise UserError(f"Not enough memory to decode {source}. Run again with fewer --workers.") from error
    return Decoded(to_pixels(image, size, interpolation), image.width, image.height)


def _refuse(broken: dict[int, str], pictures: Pictures, options: Options) -> None:
    """Raise UserError for broken pictures, unless they are to be skipped and some remain."""
    count = len(pictures.names)
    if not broken or (options.skip_broken and len(broken) < count):
        return
    lines = [f"  {pictures.names[i]} (entry {pictures.entries[i]}): {why}" for i, why in sorted(broken.items())[:SHOWN]]
    if len(broken) > SHOWN:
        lines.append(f"  and {len(broken) - SHOWN:,} more")
    mend = f"Mend them, or leave {pictures.lost} out with --skip-broken."
    advice = "Nothing would remain." if len(broken) == count else mend
    raise UserError("\n".join([f"{len(broken):,} of {count:,} pictures cannot be used:", *lines, advice]))
