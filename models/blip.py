"""BLIP put together: the PyTorch truth that every exported graph is compared with.

Axes as in models/spec.py. Parameter names are salesforce/BLIP's (models/blip_retrieval.py, models/blip_pretrain.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.bert import BertEncoder, KeysValues
from models.config import BlipConfig
from models.decoder import TextDecoder
from models.vit import VisionTransformer


class BlipRetrieval(nn.Module):
    """Two encoders in one space, and a head that looks at both."""

    def __init__(self, cfg: BlipConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.visual_encoder = VisionTransformer(cfg.vision)
        self.text_encoder = BertEncoder(cfg.text, cfg.vision.width)
        self.vision_proj = nn.Linear(cfg.vision.width, cfg.embed)
        self.text_proj = nn.Linear(cfg.text.width, cfg.embed)
        self.itm_head = nn.Linear(cfg.text.width, 2)

    def image_feat(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, T, D)."""
        feat: Tensor = self.visual_encoder(image)
        return feat

    def image_embed(self, image_feat: Tensor) -> Tensor:
        """(B, T, D) to (B, E), unit length."""
        return unit_length(self.vision_proj(image_feat[:, 0]))

    def text_embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) ids with [CLS] first to (B, E), unit length."""
        x = self.text_encoder(ids, mask, first_only=True)  # (B, 1, D)
        return unit_length(self.text_proj(x[:, 0]))

    def keys_values(self, image_feat: Tensor) -> list[KeysValues]:
        """(P, T, D) to the keys and values of every layer."""
        return self.text_encoder.image_kv(image_feat)

    def image_kv(self, image_feat: Tensor) -> Tensor:
        """(P, T, D) to (P, 2 * layers, H, T, K): keys and values of layer 0, of layer 1, ..."""
        return torch.stack([tensor for pair in self.keys_values(image_feat) for tensor in pair], dim=1)

    def itm_logits(self, ids: Tensor, mask: Tensor, kv: list[KeysValues], shared: bool = False) -> Tensor:
        """(B, L) ids with [ENC] first, and the keys and values of their pictures, to (B, 2); class 1 is a match."""
        x = self.text_encoder(ids, mask, kv, shared=shared, first_only=True)  # (B, 1, D)
        logits: Tensor = self.itm_head(x[:, 0])
        return logits


class BlipPretrain(BlipRetrieval):
    """BLIP as it is trained: with the decoder, which shares everything but its self-attention with the text encoder."""

    def __init__(self, cfg: BlipConfig) -> None:
        super().__init__(cfg)
        self.text_decoder = TextDecoder(cfg.text, cfg.vision.width)
        self.temp = nn.Parameter(torch.tensor(0.07))
        share_all_but_self_attention(self.text_encoder, self.text_decoder.bert)


def share_all_but_self_attention(encoder: BertEncoder, decoder: BertEncoder) -> None:
    """Make `decoder` use `encoder`'s modules, but keep its own self-attention (BLIP models/blip_pretrain.py ties all
    parameters whose name holds no '/attention')."""
    decoder.embeddings = encoder.embeddings
    for ours, theirs in zip(decoder.encoder, encoder.encoder, strict=True):
        ours.crossattention, ours.intermediate, ours.output = theirs.crossattention, theirs.intermediate, theirs.output


def unit_length(x: Tensor) -> Tensor:
    """`x` / |x| over the last axis, as F.normalize but without ReduceL2, which ATC lacks at opset 18.

    The square is kept above 1e-6, the smallest round number that fp16 holds; a shorter vector stays shorter than one.
    """
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True).clamp_min(1e-6))
