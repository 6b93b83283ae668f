"""BLIP that answers questions: the PyTorch truth that its graphs are compared with.

Axes as in models/generation_spec.py. Parameter names are salesforce/BLIP's (models/blip_vqa.py).
"""

from __future__ import annotations

from torch import Tensor, nn

from models.bert import BertEncoder, KeysValues
from models.config import BlipVqaConfig
from models.decoder import TextDecoder
from models.vit import VisionTransformer


class BlipVqa(nn.Module):
    """An image encoder, an encoder that reads the question beside the picture, a decoder that looks at what was read."""

    def __init__(self, cfg: BlipVqaConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.visual_encoder = VisionTransformer(cfg.vision)
        self.text_encoder = BertEncoder(cfg.text, cfg.vision.width)
        self.text_decoder = TextDecoder(cfg.decoder, cfg.text.width)

    def image_feat(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, T, D)."""
        feat: Tensor = self.visual_encoder(image)
        return feat

    def question_states(self, ids: Tensor, mask: Tensor, image_feat: Tensor) -> Tensor:
        """Questions ids, mask (B, L), [ENC] first, and their pictures (B, T, D) to (B, L, D)."""
        states: Tensor = self.text_encoder(ids, mask, self.text_encoder.image_kv(image_feat))
        return states

    def cross_kv(self, question_states: Tensor) -> list[KeysValues]:
        """(B, L, D) to the keys and values of every layer of the decoder, (B, H, L, K) each."""
        return self.text_decoder.bert.image_kv(question_states)
