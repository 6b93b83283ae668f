"""BLIP pre-training: pictures with captions to a checkpoint, with the losses ITC, ITM and LM.

Follows salesforce/BLIP models/blip_pretrain.py and pretrain.py, made small: the contrast is within the batch (no
momentum model, no queue of past embeddings), one caption of each picture in a batch. B pictures of one batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.blip import BlipPretrain
from models.config import BlipConfig
from models.errors import Misuse, UserError
from preprocess.text import CaptionTokenizer
from training import losses
from training.data import CaptionedPictures, batches, led_by, normalised, shifted
from training.options import Options
from training.recall import recall

COOLEST, WARMEST = 0.001, 0.5  # bounds of the temperature, salesforce/BLIP models/blip_pretrain.py


FINAL = 0.02  # share of the learning rate at the last step
BETAS = (0.9, 0.98)


@dataclass(frozen=True)
class Batch:
    """B pictures and a caption of each."""

    pictures: Tensor  # (B,) int64: their numbers in the set
    image: Tensor  # (B, 3, S, S) float32
    ids: Tensor  # (B, L) int64, [CLS] first
    mask: Tensor  # (B, L) int64


@dataclass(frozen=True)
class Step:
    """The three losses of one batch."""

    itc: Tensor
    itm: Tensor
    lm: Tensor

    @property
    def total(self) -> Tensor:
        return self.itc + self.itm + self.lm


def pretrain(
    model: BlipPretrain,
    tokenizer: CaptionTokenizer,
    data: CaptionedPictures,
    held_out: CaptionedPictures | None,
    options: Options,
    log: Callable[[dict[str, float]], None],
) -> None:
    """Train `model` in place. `log` gets a record of mean losses at every hundredth step, with recall when it was measured.

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
            found = losses_of(model, tokenizer, batch, generator, matching=step > options.itm_after)
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


def draw(data: CaptionedPictures, pictures: np.ndarray, shift: int, rng: np.random.Generator, cfg: BlipConfig) -> Batch:
    """The pictures of these numbers (B,), and one caption of each."""
    pixels = shifted(data.pixels[pictures], shift, rng)
    ids, mask = data.captions(rng.integers(data.first[pictures], data.first[pictures + 1]))
    return Batch(*(torch.from_numpy(x) for x in (pictures, normalised(pixels, cfg), ids, mask)))


def losses_of(model: BlipPretrain, tokenizer: CaptionTokenizer, batch: Batch, generator: torch.Generator, matching: bool) -> Step:
    """The losses of a batch; hard negatives are drawn by `generator`. Without `matching` ITM is left out, and 0."""
    feat = model.image_feat(batch.image)  # (B, T, D)
    image_embed, text_embed = model.image_embed(feat), model.text_embed(batch.ids, batch.mask)  # (B, E)
    sims = image_embed.float() @ text_embed.float().t() / model.temp  # (B, B)
    same = batch.pictures[:, None] == batch.pictures[None, :]  # (B, B)
    kv = model.text_encoder.image_kv(feat)
    itm = torch.zeros(())
    if matching:
        negative_image = losses.hard_negatives(sims.t(), same, generator)
        negative_text = losses.hard_negatives(sims, same, generator)
        itm = losses.itm(model, led_by(batch.ids, tokenizer.encode_id), batch.mask, kv, negative_image, negative_text)
    return Step(losses.itc(sims, same), itm, losses.lm(model, led_by(batch.ids, tokenizer.decode_id), batch.mask, kv))


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


def make_optimizer(model: BlipPretrain, options: Options) -> torch.optim.AdamW:
    """AdamW; biases, norms and the temperature do not decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=BETAS)


def learning_rate(step: int, options: Options) -> float:
    """Of step 1, 2, ...: a straight warm-up times a cosine from 1 to FINAL over all steps."""
    cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / options.steps))
    return options.lr * min(1.0, step / max(options.warmup, 1)) * (FINAL + (1 - FINAL) * cosine)
