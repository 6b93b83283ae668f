"""BLIP that describes pictures: the PyTorch truth that its graphs are compared with.

Axes as in models/generation_spec.py. Parameter names are salesforce/BLIP's (models/blip.py, BLIP_Decoder).
"""

from __future__ import annotations

from torch import Tensor, nn

from models.bert import KeysValues
from models.config import BlipCaptionConfig
from models.decoder import TextDecoder
from models.vit import VisionTransformer


class BlipCaptioner(nn.Module):
    """An image encoder, and a decoder that looks at what it saw."""

    def __init__(self, cfg: BlipCaptionConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.visual_encoder = VisionTransformer(cfg.vision)
        self.text_decoder = TextDecoder(cfg.decoder, cfg.vision.width)

    def image_feat(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, T, D)."""
        feat: Tensor = self.visual_encoder(image)
        return feat

    def cross_kv(self, image_feat: Tensor) -> list[KeysValues]:
        """(B, T, D) to the keys and values of every layer, (B, H, T, K) each."""
        return self.text_decoder.bert.image_kv(image_feat)
