"""Hugging Face transformers doing the same work: BlipForImageTextRetrieval on the same weights, eager, float32.

Takes and gives numpy, so that it can stand in the place of our graphs. B batch, C captions, T image tokens, D width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import normalize

from models.checkpoint import LoadReport, huggingface_config, load_retrieval, to_huggingface
from models.config import BlipConfig
from runtime.batches import slices


class Rival:
    """The model of `checkpoint` in transformers."""

    version: str = transformers.__version__

    def __init__(self, config: BlipConfig, checkpoint: Path, threads: int) -> None:
        """Sets the threads of PyTorch. Raises UserError when the checkpoint is not of this model."""
        torch.set_num_threads(threads)
        ours, self.report = _load(config, checkpoint)
        sizes = transformers.BlipConfig(**huggingface_config(config), attn_implementation="eager")
        model = transformers.BlipForImageTextRetrieval(sizes)
        # Copied, not mapped from the file: its own layers are to lie in memory as it would lay them.
        model.load_state_dict(to_huggingface(ours, config))
        self._model = model.eval().requires_grad_(False)

    @torch.inference_mode()
    def image_embed(self, images: np.ndarray) -> np.ndarray:
        """(B, 3, S, S) to (B, E), unit length."""
        feat = self._model.vision_model(torch.from_numpy(images)).last_hidden_state  # (B, T, D)
        return _numpy(normalize(self._model.vision_proj(feat[:, 0]), dim=-1))

    @torch.inference_mode()
    def text_embed(self, ids: np.ndarray, mask: np.ndarray, batchsize: int) -> np.ndarray:
        """(C, L) to (C, E), unit length; every batch at full width, as the original pads it."""
        rows = []
        for part in slices(0, len(ids), batchsize):
            ids_part, mask_part = torch.from_numpy(ids[part]), torch.from_numpy(mask[part])
            hidden = self._model.text_encoder(ids_part, attention_mask=mask_part).last_hidden_state  # (B, L, D)
            rows.append(_numpy(normalize(self._model.text_proj(hidden[:, 0]), dim=-1)))
        return np.concatenate(rows)

    @torch.inference_mode()
    def itm_logits(self, feat: np.ndarray, ids: np.ndarray, mask: np.ndarray, batchsize: int) -> np.ndarray:
        """One picture (1, T, D) and its captions (C, L), [ENC] first, to (C, 2): the features repeated for every caption,
        as salesforce/BLIP train_retrieval.py does, so each pair computes its own keys and values."""
        rows = []
        for part in slices(0, len(ids), batchsize):
            ids_part, mask_part = torch.from_numpy(ids[part]), torch.from_numpy(mask[part])
            repeated = torch.from_numpy(feat).repeat(len(ids_part), 1, 1)  # (B, T, D)
            hidden = self._model.text_encoder(
                ids_part,
                attention_mask=mask_part,
                encoder_hidden_states=repeated,
                encoder_attention_mask=torch.ones(repeated.shape[:2], dtype=torch.long),
            ).last_hidden_state  # (B, L, D)
            rows.append(_numpy(self._model.itm_head(hidden[:, 0])))
        return np.concatenate(rows)


def _load(config: BlipConfig, checkpoint: Path) -> tuple[dict[str, Tensor], LoadReport]:
    model, report = load_retrieval(config, checkpoint)
    return model.state_dict(), report


def _numpy(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.numpy()
    return array
