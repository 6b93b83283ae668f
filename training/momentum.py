"""BLIP's contrast with momentum: copies of the encoders that follow slowly, and a queue of what they made of past batches.

Definitions: salesforce/BLIP models/blip_pretrain.py, models/blip_retrieval.py.
B captions with their pictures in this process, N in all, K places of the queue, E embedding.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blip import BlipRetrieval
from training.gather import gathered

PARTS = ("visual_encoder", "vision_proj", "text_encoder", "text_proj")  # that have a copy
NOBODY = -100  # number of the picture in a place of the queue that is not filled yet


@dataclass(frozen=True)
class Contrast:
    """Similarities of B pictures or captions to N captions or pictures and K of the queue, and what they are to be."""

    to_text: Tensor  # (B, N + K), divided by the temperature
    to_image: Tensor
    text_targets: Tensor  # (B, N + K), rows sum to 1
    image_targets: Tensor

    def loss(self) -> Tensor:
        """Cross-entropy of both directions, averaged."""
        return (F.cross_entropy(self.to_text, self.text_targets) + F.cross_entropy(self.to_image, self.image_targets)) / 2


class Momentum(nn.Module):
    """The copies and the queue of one model. They are part of a checkpoint, and no part of what is exported."""

    image_queue: Tensor
    text_queue: Tensor
    picture_queue: Tensor
    place: Tensor

    def __init__(self, model: BlipRetrieval, decay: float, queue: int) -> None:
        """`decay`: the share of itself that a copy keeps at each step. `queue`: K, a multiple of N."""
        super().__init__()
        self.decay = decay
        for name in PARTS:
            setattr(self, name, copy.deepcopy(getattr(model, name)).requires_grad_(False))
        width = model.cfg.embed
        self.register_buffer("image_queue", F.normalize(torch.randn(queue, width), dim=1))  # (K, E)
        self.register_buffer("text_queue", F.normalize(torch.randn(queue, width), dim=1))  # (K, E)
        self.register_buffer("picture_queue", torch.full((queue,), NOBODY))  # (K,) numbers of pictures
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.eval()  # without the dropout of the model

    @torch.no_grad()
    def follow(self, model: BlipRetrieval) -> None:
        """Move the copies towards the model, before each step."""
        for name in PARTS:
            for ours, theirs in zip(getattr(self, name).parameters(), getattr(model, name).parameters(), strict=True):
                ours.mul_(self.decay).add_(theirs, alpha=1 - self.decay)

    @torch.no_grad()
    def embed(self, model: BlipRetrieval, image: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the copies make of pictures (B, 3, S, S) and captions (B, L): unit vectors (B, E) each."""
        own = {name: getattr(model, name) for name in PARTS}
        try:
            for name in PARTS:
                setattr(model, name, getattr(self, name))
            return model.image_embed(model.image_feat(image)), model.text_embed(ids, mask)
        finally:
            for name, part in own.items():
                setattr(model, name, part)

    def contrast(
        self, image: Tensor, text: Tensor, slow_image: Tensor, slow_text: Tensor, temp: Tensor, pictures: Tensor, alpha: float
    ) -> Contrast:
        """Similarities to what the copies made, and targets: what the copies find, `alpha` of it, and what belongs together.

        Args:
            image, text: (B, E) of the model.
            slow_image, slow_text: (B, E) of the copies.
            pictures: (B,) int64 numbers of the pictures: what has the same number belongs together.
        """
        all_image, all_text = self._with_queue(slow_image, self.image_queue), self._with_queue(slow_text, self.text_queue)
        same = pictures[:, None] == self._with_queue(pictures, self.picture_queue)[None]  # (B, N + K)
        right = same.float() / same.sum(1, keepdim=True)
        with torch.no_grad():
            text_targets = alpha * (slow_image @ all_text.t() / temp).softmax(1) + (1 - alpha) * right
            image_targets = alpha * (slow_text @ all_image.t() / temp).softmax(1) + (1 - alpha) * right
        return Contrast(image @ all_text.t() / temp, text @ all_image.t() / temp, text_targets, image_targets)

    @torch.no_grad()
    def enqueue(self, slow_image: Tensor, slow_text: Tensor, pictures: Tensor) -> None:
        """Put these (B, E) in the place of the oldest, from all processes."""
        rows, size = [gathered(x) for x in (slow_image, slow_text, pictures)], len(self.image_queue)
        at = (int(self.place) + torch.arange(len(rows[0]), device=self.place.device)) % size  # (N,)
        for queue, new in zip((self.image_queue, self.text_queue, self.picture_queue), rows, strict=True):
            queue[at] = new
        self.place.fill_((int(self.place) + len(rows[0])) % size)

    @staticmethod
    def _with_queue(rows: Tensor, queue: Tensor) -> Tensor:
        return torch.cat([gathered(rows.detach()), queue.clone()])  # a copy: the queue moves on before the backward pass


def ramped(alpha: float, epoch: int, step: int, steps: int, epochs: float) -> float:
    """The share of what the copies find: rising evenly over the first `epochs` epochs of `steps` steps each, then `alpha`
    (pretrain.py ramps over two epochs, train_retrieval.py over one)."""
    return alpha if epochs == 0 else alpha * min(1.0, (epoch * steps + step) / (epochs * steps))
