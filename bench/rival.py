"""Hugging Face transformers doing the same work on the same weights, in the place of our graphs: numpy in, numpy out.

B batch, C captions, L tokens, T image tokens, D width, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

from bench.theirs import their_model
from models.checkpoint import load_model
from models.config import Config, RetrievalConfig
from models.errors import Misuse
from runtime.batches import slices


class Rival:
    """The model of `checkpoint` in transformers."""

    def __init__(self, config: Config, checkpoint: Path, vit_checkpoint: Path | None, threads: int) -> None:
        """Sets the threads of PyTorch. Raises UserError when the checkpoint is not of this model, Misuse when it is of one that
        writes words."""
        if not isinstance(config, RetrievalConfig):
            raise Misuse("Graphs that write words are not compared here; give graphs for retrieval.")
        torch.set_num_threads(threads)
        ours, self.report = load_model(config, checkpoint, vit_checkpoint)
        self.theirs = their_model(config, ours.state_dict())

    def describe(self) -> str:
        """What it is, for the reader of the numbers."""
        return f"transformers {transformers.__version__}, {type(self.theirs.model).__name__}, eager attention, float32"

    @torch.inference_mode()
    def image_embed(self, images: np.ndarray) -> np.ndarray:
        """(B, 3, S, S) to (B, E), or (B, Q, E) of BLIP-2, unit length."""
        return _numpy(self.theirs.image_embed(torch.from_numpy(images)))

    def text_embed(self, ids: np.ndarray, mask: np.ndarray, batchsize: int) -> np.ndarray:
        """(C, L) to (C, E), unit length; every batch at full width, as the original pads it."""
        return _by_batch(self.theirs.text_embed, ids, mask, batchsize)

    def itm_logits(self, feat: np.ndarray, ids: np.ndarray, mask: np.ndarray, batchsize: int) -> np.ndarray:
        """One picture (1, T, D) and its captions (C, L), as the ITM graphs take them, to (C, 2): the features repeated for
        every caption, as the original does (salesforce/BLIP train_retrieval.py, salesforce/LAVIS
        models/blip2_models/blip2.py, compute_sim_matrix), so each pair computes its own keys and values."""
        picture = torch.from_numpy(feat)
        return _by_batch(lambda i, m: self.theirs.itm_logits(picture.repeat(len(i), 1, 1), i, m), ids, mask, batchsize)


@torch.inference_mode()
def _by_batch(compute: Callable[[Tensor, Tensor], Tensor], ids: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
    parts = list(slices(0, len(ids), size))
    return np.concatenate([_numpy(compute(torch.from_numpy(ids[part]), torch.from_numpy(mask[part]))) for part in parts])


def _numpy(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.numpy()
    return array
