"""What a retrieval run leaves behind, and how the report reads it.

N pictures, M captions, P re-ranked pairs ordered by picture. A pair is in the list of its picture (i2t), of its
caption (t2i) or of both, and was scored once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models import manifest
from models.errors import UserError
from models.spec import MATCH
from preprocess.dataset import Tensor, open_tensor

I2T, T2I = 1, 2  # bits of pair_direction: among the picture's k captions, among the caption's k pictures


@dataclass(frozen=True)
class RetrievalOutputs:
    """The outputs/ folder of `blip-run retrieval`."""

    source: manifest.Manifest
    image_embed: Tensor  # (N, E) float32, unit length
    text_embed: Tensor  # (M, E) float32, unit length
    pair_image: Tensor  # (P,) int32, ascending
    pair_text: Tensor  # (P,) int32
    pair_direction: Tensor  # (P,) uint8, bits I2T and T2I
    pair_sim: Tensor  # (P,) float32, image_embed . text_embed
    itm_logits: Tensor  # (P, 2) float32, class 1 is a match

    @property
    def run(self) -> dict[str, Any]:
        """Which graphs, data, backend and options made it, and how long each stage took."""
        return self.source.content


def read_retrieval(folder: Path, verify: bool = False) -> RetrievalOutputs:
    """Open a complete outputs/ folder. Raises UserError when it is damaged, unfinished or of another task."""
    found = manifest.read(folder, "outputs", verify)
    if found.content.get("task") != "retrieval":
        raise UserError(f"{folder} holds outputs of the task {found.content.get('task')!r}, expected 'retrieval'.")
    names = ("image_embed", "text_embed", "pair_image", "pair_text", "pair_direction", "pair_sim", "itm_logits")
    outputs = RetrievalOutputs(found, *(open_tensor(found, name) for name in names))
    by_pair = (outputs.pair_image, outputs.pair_text, outputs.pair_direction, outputs.pair_sim, outputs.itm_logits)
    pairs = {len(tensor) for tensor in by_pair}
    if len(pairs) > 1:
        raise UserError(f"{folder} contradicts itself: its pair tensors have {sorted(pairs)} rows.")
    return outputs


def scores(outputs: RetrievalOutputs) -> np.ndarray:
    """(P,) float32: the ITM logit of "match" plus the similarity, as salesforce/BLIP train_retrieval.py adds them."""
    total: np.ndarray = outputs.itm_logits[:][:, MATCH] + outputs.pair_sim[:]
    return total
