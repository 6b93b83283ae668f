"""The two folders a report is made of, opened together: outputs/ and the data/ it was computed from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from models import manifest
from models.errors import UserError
from postprocess.made_from import open_data
from preprocess import dataset
from preprocess.dataset import RetrievalData
from runtime import outputs as runs
from runtime.ais_bench_outputs import read_outputs
from runtime.ais_bench_run import read_run
from runtime.outputs import LAVIS, RetrievalOutputs, counted, scores


@dataclass(frozen=True)
class AisBench:
    """What ais_bench wrote, in the place of outputs/: embeddings in `folder`, scores of `pairs`; None: nothing was re-ranked."""

    folder: Path
    pairs: Path | None


def read(outputs: Path | AisBench, data: Path | None, verify: bool) -> tuple[RetrievalOutputs, RetrievalData]:
    """Open outputs/ and what was evaluated of its data/ (at `data`, or where the outputs say it lies; hashes are checked
    with `verify`). Whose evaluation it is becomes part of the data's protocol.

    Raises UserError when one is damaged, when they do not belong together, or when a score is not a number.
    """
    if isinstance(outputs, AisBench):
        return _of_ais_bench(outputs, data, verify)
    run = runs.read_retrieval(outputs, verify)
    found = open_data(run.source, data, lambda folder: dataset.read_retrieval(folder, verify))
    evaluation = str(run.run.get("protocol", LAVIS))
    evaluated = counted(found, evaluation)
    if left_out := len(found.images) - len(evaluated.images):
        evaluation += f", {left_out} pictures left out"
    evaluated = replace(evaluated, protocol={**found.protocol, "evaluation": evaluation})
    _check(run, evaluated)
    return run, evaluated


def _of_ais_bench(outputs: AisBench, data: Path | None, verify: bool) -> tuple[RetrievalOutputs, RetrievalData]:
    commands = read_run(outputs.folder)
    found = commands.open_data(data, verify)
    run = read_outputs(commands, found, outputs.pairs, verify)
    evaluated = replace(found, protocol={**found.protocol, "evaluation": LAVIS})
    _check(run, evaluated)
    return run, evaluated


def _check(run: RetrievalOutputs, data: RetrievalData) -> None:
    """Whatever would end in an index error or in a meaningless number later."""
    folder, images, texts = run.source.folder, len(data.images), len(data.captions)
    if not images or not texts:
        raise UserError(f"{data.source.folder} holds {images} pictures and {texts} captions; recall needs one of each.")
    pairs = len(run.pair_image)
    for name, shape in (
        # BLIP-2's of a picture have an axis more, the queries.
        ("image_embed", (images, *run.image_embed.shape[1:-1][:1], *run.text_embed.shape[1:2])),
        ("text_embed", (texts, *run.text_embed.shape[1:2])),
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
    return f"Run {manifest.MADE_WITH['outputs']} retrieval again."
