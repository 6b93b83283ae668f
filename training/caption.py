"""The loss of BLIP's captioner. Definition: salesforce/BLIP models/blip.py (`BLIP_Decoder.forward`).

B pictures of one batch with a caption each, L tokens.
"""

from __future__ import annotations

from torch import Tensor

from models.captioner import BlipCaptioner
from training.losses import IGNORED, SMOOTHING, next_word
from training.stage2 import Told


def told_loss(model: BlipCaptioner, batch: Told) -> Tensor:
    """Cross-entropy of each word that is learnt, with label smoothing; [DEC] stands first in `ids`, then the prompt."""
    logits = model.text_decoder(batch.ids, batch.mask, model.cross_kv(model.image_feat(batch.image)))  # (B, L, V)
    learnt = (batch.learnt * batch.mask)[:, 1:]  # (B, L - 1)
    return next_word(logits[:, :-1], batch.ids[:, 1:].masked_fill(learnt == 0, IGNORED), SMOOTHING)
