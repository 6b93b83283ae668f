"""What a training is told. Imports no torch, so that `blip-train --help` works anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Files:
    """What a training reads and writes."""

    tokenizer: Path
    annotations: Path
    images: Path
    held_out: Path | None
    out: Path


@dataclass(frozen=True)
class Options:
    """How to train. The demo's weights were made with demo/train.py's RECIPE, not with these defaults."""

    steps: int = 9000
    batchsize: int = 40  # pictures
    together: int = 5  # pictures that follow one another in the annotations and stay in one batch
    easy: int = 0  # the first so many pictures of the annotations are easy ...
    easy_steps: int = 0  # ... and the only ones in so many first steps
    itm_after: int = 0  # steps without the matching loss, which hardly learns before the others have
    lr: float = 1.2e-3  # at the end of the warm-up; then a cosine down to FINAL of it
    warmup: int = 200  # steps
    weight_decay: float = 0.05
    clip: float = 1.0  # largest norm of the gradient
    shift: int = 1  # pixels by which pictures are moved, at most
    seed: int = 1
    validate_every: int = 1000  # steps
    bf16: bool = True  # matrix products in bfloat16 (autocast)
