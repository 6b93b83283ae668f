"""What a model is measured by while it learns. Recall, so far: captions and answers take a decoder that runs graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from models.blip import BlipRetrieval
from models.blip2 import Blip2Retrieval
from models.config import Config
from models.errors import Misuse
from preprocess.text import CaptionTokenizer
from preprocess.workers import usable_cpus
from training.data import read_pictures
from training.gather import rank
from training.recall import recall
from training.settings import Settings

Metrics = dict[str, float]
MEASURED = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10")  # whose mean is r_mean, by which BLIP chooses


def measure_of(settings: Settings, config: Config, words: CaptionTokenizer | None) -> Callable[[nn.Module], Metrics] | None:
    """What measures a model on data.validation; None when nothing is measured, which is said where it was asked for.

    Raises UserError and Misuse for files that cannot be used.
    """
    source = settings.data.validation
    if settings.metric == "none" or source is None:
        return None
    if settings.metric != "recall" or words is None:
        if rank() == 0:
            click.echo(
                f"data.validation is not read: {settings.metric} is not measured while training. Export the weights, then "
                "blip-run and blip-post measure them."
            )
        return None
    if source.annotations is None or source.images is None:
        raise Misuse("data.validation lacks annotations or images; expected both.")
    workers = settings.data.workers or min(usable_cpus(), 16)
    data = read_pictures(source.annotations, source.split, source.images, words, config, workers)

    def measure(model: nn.Module) -> Metrics:
        assert isinstance(model, BlipRetrieval | Blip2Retrieval)
        with _whole(model):
            found = recall(model, data, words.encode_id)
        return {**found, "r_mean": float(np.mean([found[name] for name in MEASURED]))}

    return measure


@contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    """Within it each process holds all weights; its random numbers go on after it as if nothing had been measured."""
    shares = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shares:
        module.unshard()
    with torch.random.fork_rng():
        yield
    for module in shares:
        module.reshard()
