"""The loop of training: batches in, steps of AdamW, a record of the losses and of recall on what is held out.

One caption of each picture in a batch. B pictures of one batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice

import numpy as np
import torch
from tqdm import tqdm

from models.errors import Misuse, UserError
from preprocess.text import CaptionTokenizer
from training.data import CaptionedPictures, batches
from training.options import Options
from training.recall import recall
from training.step import LossesOf, Model, Trainable, draw

COOLEST, WARMEST = 0.001, 0.5  # bounds of the temperature, salesforce/BLIP models/blip_pretrain.py
FINAL = 0.02  # share of the learning rate at the last step
BETAS = (0.9, 0.98)


def train(
    model: Model,
    losses_of: LossesOf[Model],
    tokenizer: CaptionTokenizer,
    data: CaptionedPictures,
    held_out: CaptionedPictures | None,
    options: Options,
    log: Callable[[dict[str, float]], None],
) -> None:
    """Train `model` in place: those of its parameters that are not frozen. `log` gets a record of mean losses at every
    hundredth step, with recall when it was measured.

    Raises UserError, naming the step, when a loss is no longer a number: the model is then of no use.
    """
    if options.easy > len(data) or (options.easy_steps and not options.easy):
        raise Misuse(f"--easy is {options.easy:,} and --easy-steps {options.easy_steps:,}, with {len(data):,} pictures in all.")
    rng, generator = np.random.default_rng(options.seed), torch.Generator().manual_seed(options.seed)
    optimizer = make_optimizer(model, options)
    easy = batches(options.easy or len(data), options.batchsize, options.together, rng)
    order = chain(islice(easy, options.easy_steps), batches(len(data), options.batchsize, options.together, rng))
    started, seen = time.monotonic(), []
    model.train()
    progress = tqdm(range(1, options.steps + 1), "training", unit=" steps", disable=None)
    for step, pictures in zip(progress, order, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        batch = draw(data, pictures, options.shift, rng, model.cfg)
        with bfloat16(options.bf16):
            found = losses_of(model, tokenizer, batch, generator, step > options.itm_after)
            values = [found.itc.item(), found.itm.item(), found.lm.item()]
            if not all(map(math.isfinite, values)):
                raise UserError(
                    f"The loss is not a number at step {step} (ITC {values[0]:g}, ITM {values[1]:g}, LM {values[2]:g}). "
                    "Train again with a smaller --lr or a longer --warmup."
                )
            optimizer.zero_grad()
            found.total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        with torch.no_grad():
            model.temp.clamp_(COOLEST, WARMEST)
        seen.append(values)
        measured = step % options.validate_every == 0 or step == options.steps
        if step % 100 == 0 or measured:
            itc, itm, lm = np.mean(seen, axis=0)
            record = {"step": step, "minutes": (time.monotonic() - started) / 60, "lr": learning_rate(step, options)}
            record |= {"itc": itc, "itm": itm, "lm": lm, "temp": model.temp.item()}
            if measured and held_out is not None:
                record |= recall(model, held_out, tokenizer.encode_id)
            log({name: round(float(value), 6) for name, value in record.items()})
            seen.clear()


@contextmanager
def bfloat16(enabled: bool) -> Iterator[None]:
    """Inside, matrix products are made of bfloat16 numbers. On CPUs that have such products a step takes half the time."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if enabled else before)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def make_optimizer(model: Trainable, options: Options) -> torch.optim.AdamW:
    """AdamW; biases, norms and the temperature do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=BETAS)


def learning_rate(step: int, options: Options) -> float:
    """Of step 1, 2, ...: a straight warm-up times a cosine from 1 to FINAL over all steps."""
    cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / options.steps))
    return options.lr * min(1.0, step / max(options.warmup, 1)) * (FINAL + (1 - FINAL) * cosine)
