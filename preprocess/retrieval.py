"""Pictures and captions to a data/ folder for retrieval: tensors img, ids and mask, and which caption belongs to which picture.

N pictures, M captions, S side of a picture, L tokens.
"""

from __future__ import annotations

import dataclasses
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL
from tqdm import tqdm

from models import manifest
from models.config import BlipConfig, from_dict
from models.errors import UserError
from preprocess.annotations import Annotations, read_annotations
from preprocess.dataset import PACKED, Writer
from preprocess.images import normalise, obstacle, open_rgb, to_pixels
from preprocess.text import CaptionTokenizer, pre_caption
from preprocess.workers import in_order

SHOWN = 10  # broken pictures that an error lists


@dataclass(frozen=True)
class Options:
    """How to write the data."""

    split: str = "test"  # of Karpathy's own file
    layout: str = PACKED
    interpolation: str | None = None  # None: the protocol's
    workers: int = 1
    limit: int | None = None  # pictures
    skip_broken: bool = False


@dataclass(frozen=True)
class Written:
    """What a run has written."""

    annotations: Annotations  # the pictures and captions that are in the folder
    broken: list[dict[str, Any]]  # pictures left out: {"image", "entry", "reason"}
    lengths: np.ndarray  # (M,) int64: tokens of each caption, with [CLS] and [SEP]
    unknown: float  # share of the captions' own tokens that are [UNK]


@dataclass(frozen=True)
class Decoded:
    """One picture as a worker hands it back."""

    pixels: np.ndarray | None  # (3, S, S) uint8, None when it is broken
    width: int = 0  # pixels, before resizing
    height: int = 0
    reason: str = ""  # why it is broken


def write_retrieval(annotations: Path, images: Path, graphs: Path, out: Path, options: Options) -> Written:
    """Write the data/ folder `out` from an annotation file, a folder of pictures and the graphs/ folder that will read it.

    Raises UserError, and leaves an older `out` as it was, when an input is wrong, when a picture is broken and
    `options.skip_broken` is not set, or when nothing remains.
    """
    config, tokenizer = open_graphs(graphs)
    config = _with_interpolation(config, options.interpolation)
    found = read_annotations(annotations, options.split)
    found = found.keep(list(range(len(found.images))[: options.limit]))
    if not images.is_dir():
        raise UserError(f"There is no folder {images}; --images takes the folder that the paths in {annotations} start from.")
    broken = {i: why for i, name in enumerate(found.images) if (why := obstacle(images / name))}
    if list(broken.values()).count("does not exist") == len(found.images):
        raise UserError(
            f"None of the {len(broken):,} pictures of {annotations} is in {images}; the first is {found.images[0]}. "
            "--images takes the folder that these paths start from."
        )
    _refuse(broken, found, options)  # before anything is decoded
    with manifest.new_folder(out, "data") as folder:
        kept, sizes, left_out, img = _write_pictures(folder, found, broken, images, config, options)
        lengths, unknown, texts = _write_captions(folder, kept, tokenizer, config, options.layout)
        content = {
            "task": "retrieval",
            "layout": options.layout,
            "tensors": {"img": img, **texts},
            "protocol": _protocol(config, tokenizer),
            "images": [{"image": name, "width": w, "height": h} for name, (w, h) in zip(kept.images, sizes, strict=True)],
            "captions": kept.captions,
            "image_of_text": kept.image_of_text,
            "broken": left_out,
            "unknown_share": unknown,
            "annotations": {"file": str(annotations), "sha256": manifest.file_record(annotations)["sha256"]},
            "images_root": str(images.absolute()),
        }
        manifest.write(folder, "data", content)
    return Written(kept, left_out, lengths, unknown)


def open_graphs(graphs: Path) -> tuple[BlipConfig, CaptionTokenizer]:
    """The model's sizes and its tokenizer, from a graphs/ folder. Raises UserError when they do not fit together."""
    found = manifest.read(graphs, "graphs")
    try:
        name, sha256 = str(found.content["tokenizer"]["file"]), found.content["tokenizer"]["sha256"]
        values = found.content["config"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{graphs / manifest.NAME} names no config or tokenizer ({error}). Write it again with blip-export."
        ) from error
    config = from_dict(values, str(graphs / manifest.NAME))
    tokenizer = CaptionTokenizer.load(graphs / name, config)
    if tokenizer.sha256 != sha256:
        raise UserError(
            f"{graphs / name} is not the file that was exported: its sha256 differs. Write the folder again with blip-export."
        )
    return config, tokenizer


def decode(path: Path, size: int, interpolation: str) -> Decoded:
    """One picture, or the reason why it is broken. Runs in a worker."""
    try:
        image = open_rgb(path)
    except UserError as error:
        return Decoded(None, reason=error.message.removeprefix(f"{path} ").rstrip("."))
    except MemoryError as error:
        raise UserError(f"Not enough memory to decode {path}. Run again with fewer --workers.") from error
    return Decoded(to_pixels(image, size, interpolation), image.width, image.height)


def _refuse(broken: dict[int, str], found: Annotations, options: Options) -> None:
    """Raise UserError for broken pictures, unless they are to be skipped and some remain."""
    if not broken or (options.skip_broken and len(broken) < len(found.images)):
        return
    lines = [f"  {found.images[i]} (entry {found.entries[i]}): {why}" for i, why in sorted(broken.items())[:SHOWN]]
    if len(broken) > SHOWN:
        lines.append(f"  and {len(broken) - SHOWN:,} more")
    if len(broken) == len(found.images):
        advice = "Nothing would remain."
    else:
        advice = "Mend them, or leave them and their captions out with --skip-broken."
    raise UserError("\n".join([f"{len(broken):,} of {len(found.images):,} pictures cannot be used:", *lines, advice]))


def _write_pictures(
    folder: Path, found: Annotations, broken: dict[int, str], images: Path, config: BlipConfig, options: Options
) -> tuple[Annotations, list[tuple[int, int]], list[dict[str, Any]], dict[str, Any]]:
    """Decode and write `img`; add to `broken` what is found broken. Returns the annotations that remain, the pictures'
    sizes, the records of what was left out, and img's info."""
    present = [i for i in range(len(found.images)) if i not in broken]
    size, protocol = config.vision.image_size, config.protocol
    work = partial(decode, size=size, interpolation=protocol.interpolation)
    good: list[int] = []
    sizes: list[tuple[int, int]] = []
    writer = Writer(folder, "img", "float32", (len(present), 3, size, size), options.layout)
    with closing(writer), closing(in_order(work, [images / found.images[i] for i in present], options.workers)) as pictures:
        for number, picture in zip(
            present, tqdm(pictures, "pictures", len(present), unit=" pictures", disable=None), strict=True
        ):
            if picture.pixels is None:
                broken[number] = picture.reason
                continue
            if options.skip_broken or not broken:  # else the run will fail, and only looks for what else is broken
                writer.write(len(good), normalise(picture.pixels, protocol.mean, protocol.std)[None])  # (1, 3, S, S)
            good.append(number)
            sizes.append((picture.width, picture.height))
        _refuse(broken, found, options)
        if len(good) < len(present):
            writer.shrink(len(good))
    left_out = [{"image": found.images[i], "entry": found.entries[i], "reason": why} for i, why in sorted(broken.items())]
    return found.keep(good), sizes, left_out, writer.info()


def _write_captions(
    folder: Path, kept: Annotations, tokenizer: CaptionTokenizer, config: BlipConfig, layout: str
) -> tuple[np.ndarray, float, dict[str, Any]]:
    """Tokenise and write `ids` and `mask`. Returns the lengths (M,), the share of unknown tokens and the tensors' infos."""
    cleaned = [pre_caption(caption, config.protocol.max_words) for caption in kept.captions]
    ids, mask = tokenizer.encode(cleaned, config.protocol.max_length)  # (M, L)
    infos = {}
    for name, values in (("ids", ids), ("mask", mask)):
        with closing(Writer(folder, name, "int64", values.shape, layout)) as writer:
            writer.write(0, values)
            infos[name] = writer.info()
    lengths = mask.sum(1)  # (M,)
    own = int(lengths.sum()) - 2 * len(ids)  # without [CLS] and [SEP]
    unknown = float((ids == tokenizer.unknown_id).sum() / max(own, 1))
    return lengths, round(unknown, 4), infos


def _with_interpolation(config: BlipConfig, wanted: str | None) -> BlipConfig:
    """The configuration with the interpolation that was asked for; a deviation from the model's is said on screen."""
    usual = config.protocol.interpolation
    if wanted is None or wanted == usual:
        return config
    click.echo(f"Warning: {wanted} deviates from the model's protocol, {usual}; the figures will differ.", err=True)
    return dataclasses.replace(config, protocol=dataclasses.replace(config.protocol, interpolation=wanted))


def _protocol(config: BlipConfig, tokenizer: CaptionTokenizer) -> dict[str, Any]:
    return {
        **dataclasses.asdict(config.protocol),
        "image_size": config.vision.image_size,
        "vocab": tokenizer.size,
        "encode_id": tokenizer.encode_id,
        "decode_id": tokenizer.decode_id,
        "pad_id": tokenizer.pad_id,
        "tokenizer_sha256": tokenizer.sha256,
        "pillow": PIL.__version__,
    }
