"""Pictures and their classes to a data/ folder for zero-shot classification: tensors img and label, and the classes' names.

N pictures, C classes.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models import manifest
from preprocess.labelled import Labelled
from preprocess.pictures import Options, find_broken, open_graphs, protocol_of, with_interpolation, write_pictures
from preprocess.tensors import Writer


@dataclass(frozen=True)
class WrittenLabels:
    """What a run has written."""

    counts: np.ndarray  # (C,) int64: pictures of each class
    broken: list[dict[str, Any]]  # pictures left out: {"image", "entry", "reason"}


def write_classify(found: Labelled, graphs: Path, out: Path, options: Options) -> WrittenLabels:
    """Write the data/ folder `out` from labelled pictures (preprocess.labelled) and the graphs/ folder that will read it.

    Raises UserError, and leaves an older `out` as it was, when the graphs do not fit together, when a picture is broken and
    `options.skip_broken` is not set, or when nothing remains.
    """
    config, tokenizer = open_graphs(graphs)
    config = with_interpolation(config, options.interpolation)
    found = found.first(options.limit)
    broken = find_broken(found.pictures, options)  # before anything is decoded
    with manifest.new_folder(out, "data", task="classify") as folder:
        written = write_pictures(folder, found.pictures, broken, config, options)
        label = np.array([found.labels[i] for i in written.kept], np.int64)  # (N,)
        with closing(Writer(folder, "label", "int64", label.shape, options.layout)) as writer:
            writer.write(0, label)
        content = {
            "task": "classify",
            "layout": options.layout,
            "tensors": {"img": written.img, "label": writer.info()},
            "protocol": protocol_of(config, tokenizer),
            "images": written.images,
            "classes": found.classes,
            "broken": written.broken,
            "source": found.source,
        }
        manifest.write(folder, "data", content)
    return WrittenLabels(np.bincount(label, minlength=len(found.classes)), written.broken)
