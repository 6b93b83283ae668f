"""The two folders a report is made of, opened together: outputs/ and the data/ it was computed from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from models import manifest
from models.errors import UserError
from preprocess import dataset
from preprocess.dataset import RetrievalData
from runtime import outputs as runs
from runtime.outputs import RetrievalOutputs, scores


def read(outputs: Path, data: Path | None, verify: bool) -> tuple[RetrievalOutputs, RetrievalData]:
    """Open outputs/ and its data/ (at `data`, or where the outputs say it lies; hashes are checked with `verify`).

    Raises UserError when one is damaged, when they do not belong together, or when a score is not a number.
    """
    run = runs.read_retrieval(outputs, verify)
    try:
        made_from = run.run["data"]
        recorded, digest = Path(made_from["folder"]), str(made_from["digest"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{outputs / manifest.NAME} does not say which data it was made from ({error}). {_again()}") from error
    folder = data or recorded
    if not folder.is_dir():
        hint = f"Write it again with {manifest.MADE_WITH['data']}." if data else "Name the data folder with --data."
        raise UserError(f"{outputs} was made from {recorded}, and there is no folder {folder}. {hint}")
    found = dataset.read_retrieval(folder, verify)
    if found.source.digest != digest:
        raise UserError(
            f"{outputs}: these outputs were made from another data folder (digest {digest[:12]}; {folder} has "
            f"{found.source.digest[:12]}). Name the right one with --data, or run {manifest.MADE_WITH['outputs']} again."
        )
    _check(run, found)
    return run, found


def _check(run: RetrievalOutputs, data: RetrievalData) -> None:
    """Whatever would end in an index error or in a meaningless number later."""
    folder, images, texts = run.source.folder, len(data.images), len(data.captions)
    if not images or not texts:
        raise UserError(f"{data.source.folder} holds {images} pictures and {texts} captions; recall needs one of each.")
    pairs = len(run.pair_image)
    for name, shape in (
        ("image_embed", (images, *run.image_embed.shape[1:2])),
        ("text_embed", (texts, *run.image_embed.shape[1:2])),
        ("itm_logits", (pairs, 2)),
        ("pair_sim", (pairs,)),
    ):
        if getattr(run, name).shape != shape:
            raise UserError(f"{folder}: {name} has the shape {getattr(run, name).shape}, {shape} belongs to its data. {_again()}")
    for name, count in (("pair_image", images), ("pair_text", texts)):
        index = getattr(run, name)[:]
        if len(index) and not 0 <= index.min() <= index.max() < count:
            raise UserError(f"{folder}: {name} goes from {index.min()} to {index.max()}, expected 0 .. {count - 1}. {_again()}")
    for name, values in (("scores", scores(run)), ("image_embed", run.image_embed[:]), ("text_embed", run.text_embed[:])):
        if bad := values.size - np.count_nonzero(np.isfinite(values)):
            raise UserError(
                f"{folder}: {bad:,} of {values.size:,} values of {name} are not finite numbers, so nothing can be ranked. "
                "Look at the checkpoint and at the precision of the graphs."
            )


def _again() -> str:
    return f"Run {manifest.MADE_WITH['outputs']} again."
