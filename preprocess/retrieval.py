"""Pictures and captions to a data/ folder for retrieval: tensors img, ids and mask, and which caption belongs to which picture.

N pictures, M captions, L tokens.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from models import manifest
from models.config import Config
from models.recipe import departures, wanted
from preprocess.annotations import Annotations, read_annotations
from preprocess.pictures import (
    Options,
    Pictures,
    check_folder,
    find_broken,
    open_graphs,
    protocol_of,
    with_interpolation,
    write_pictures,
)
from preprocess.tensors import Writer
from preprocess.text import CaptionTokenizer, pre_caption


@dataclass(frozen=True)
class Written:
    """What a run has written."""

    annotations: Annotations  # the pictures and captions that are in the folder
    broken: list[dict[str, Any]]  # pictures left out: {"image", "entry", "reason"}
    lengths: np.ndarray  # (M,) int64: tokens of each caption, with [CLS] and [SEP]
    unknown: float  # share of the captions' own tokens that are [UNK]


def write_retrieval(
    annotations: Path, images: Path, graphs: Path, out: Path, options: Options, split: str = "test", recipe: str | None = None
) -> Written:
    """Write the data/ folder `out` from an annotation file, a folder of pictures and the graphs/ folder that will read it.
    `split` chooses from Karpathy's own file. `recipe`, one of models.recipe, is what the data is to follow: in which it departs
    is said on screen, as the graphs settle the length of captions.

    Raises UserError, and leaves an older `out` as it was, when an input is wrong, when a picture is broken and
    `options.skip_broken` is not set, or when nothing remains.
    """
    config, tokenizer = open_graphs(graphs)
    config = with_interpolation(config, wanted(recipe, "interpolation", options.interpolation))
    made_with = protocol_of(config, tokenizer)
    # How many candidates are re-ranked is the run's to say.
    for line in departures(recipe, {name: value for name, value in made_with.items() if name != "k_test"}):
        click.echo(line, err=True)
    found = read_annotations(annotations, split)
    found = found.keep(list(range(len(found.images))[: options.limit]))
    check_folder(images, found.images, annotations)
    sources = [images / name for name in found.images]
    pictures = Pictures(found.images, found.entries, sources, lost="them and their captions")
    broken = find_broken(pictures, options)  # before anything is decoded
    with manifest.new_folder(out, "data", task="retrieval") as folder:
        written = write_pictures(folder, pictures, broken, config, options)
        kept = found.keep(written.kept)
        lengths, unknown, texts = _write_captions(folder, kept, tokenizer, config, options.layout)
        content = {
            "task": "retrieval",
            "layout": options.layout,
            "tensors": {"img": written.img, **texts},
            "protocol": made_with,
            "images": written.images,
            "captions": kept.captions,
            "image_of_text": kept.image_of_text,
            "broken": written.broken,
            "unknown_share": unknown,
            "annotations": {"file": str(annotations), "sha256": manifest.file_record(annotations)["sha256"]},
            "images_root": str(images.absolute()),
        }
        manifest.write(folder, "data", content)
    return Written(kept, written.broken, lengths, unknown)


def _write_captions(
    folder: Path, kept: Annotations, tokenizer: CaptionTokenizer, config: Config, layout: str
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
