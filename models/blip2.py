"""BLIP-2's first stage put together: the PyTorch truth that every exported graph is compared with.

Axes as in models/spec.py. Parameter names are salesforce/LAVIS's (models/blip2_models/blip2_qformer.py), which the
methods follow as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.bert import KeysValues
from models.blip import BlipRetrieval, unit_length
from models.clip_vit import ClipVisionTransformer
from models.config import CLIP, Blip2Config
from models.qformer import QformerModel, QformerWithHead
from models.vit import VisionTransformer

LN_VISION_EPS = 1e-5  # torch's default, which LAVIS's LayerNorm keeps; the encoders have their own


class Blip2Retrieval(nn.Module):
    """An image encoder, a Q-Former that reads pictures, captions and both, and a head that says whether they match."""

    Qformer: QformerModel  # the name that the checkpoints have

    def __init__(self, cfg: Blip2Config) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.qformer.width
        self.visual_encoder = (ClipVisionTransformer if cfg.vision.kind == CLIP else VisionTransformer)(cfg.vision)
        self.ln_vision = nn.LayerNorm(cfg.vision.width, eps=LN_VISION_EPS)
        self.query_tokens = nn.Parameter(torch.zeros(1, cfg.qformer.queries, width))
        self.Qformer = self.make_qformer()
        self.vision_proj = nn.Linear(width, cfg.embed)
        self.text_proj = nn.Linear(width, cfg.embed)
        self.itm_head = nn.Linear(width, 2)

    def make_qformer(self) -> QformerModel:
        return QformerModel(self.cfg.qformer, self.cfg.vision.width)

    def image_feat(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, T, D)."""
        feat: Tensor = self.ln_vision(self.visual_encoder(image))
        return feat

    def keys_values(self, image_feat: Tensor) -> list[KeysValues]:
        """(P, T, D) to the keys and values of every layer that looks at the picture."""
        return self.Qformer.bert.image_kv(image_feat)

    def image_kv(self, image_feat: Tensor) -> Tensor:
        """(P, T, D) to (P, 2 * layers, H, T, K): keys and values of the first layer that looks, of the second, ..."""
        return torch.stack([tensor for pair in self.keys_values(image_feat) for tensor in pair], dim=1)

    def query_embed(self, image_feat: Tensor) -> Tensor:
        """(B, T, D) to the states of the queries that read the picture (B, Q, D)."""
        tokens = self.tokens(image_feat.shape[0])
        return self.Qformer.bert.read_image(tokens, self.keys_values(image_feat))[0]

    def image_embed(self, query_embed: Tensor) -> Tensor:
        """(B, Q, D) to (B, Q, E), unit length."""
        return unit_length(self.vision_proj(query_embed))

    def text_feat(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) ids to the states of all words (B, L, D)."""
        return self.Qformer.bert.read_text(ids, mask)

    def text_feat_proj(self, text_feat: Tensor) -> Tensor:
        """(B, L, D) to (B, L, E), unit length."""
        return unit_length(self.text_proj(text_feat))

    def text_embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) ids with [CLS] first to (B, E), unit length."""
        x = self.Qformer.bert.read_text(ids, mask, first_only=True)  # (B, 1, D)
        return unit_length(self.text_proj(x[:, 0]))

    def multimodal_embed(self, ids: Tensor, mask: Tensor, kv: Sequence[KeysValues], shared: bool = False) -> Tensor:
        """(B, L) ids and the keys and values of their pictures to the states of the queries that read both (B, Q, D)."""
        return self.Qformer.bert.read_both(self.tokens(ids.shape[0]), ids, mask, kv, shared)

    def itm_logits(self, ids: Tensor, mask: Tensor, kv: Sequence[KeysValues], shared: bool = False) -> Tensor:
        """(B, L) ids and the keys and values of their pictures to (B, 2), averaged over the queries; class 1 is a match."""
        logits: Tensor = self.itm_head(self.multimodal_embed(ids, mask, kv, shared))  # (B, Q, 2)
        return logits.mean(dim=1)

    def tokens(self, batch: int) -> Tensor:
        """The query tokens of a batch (B, Q, D)."""
        return self.query_tokens.expand(batch, -1, -1)


class Blip2Stage1(Blip2Retrieval):
    """The first stage as it is trained: with the head over the vocabulary, and the temperature."""

    Qformer: QformerWithHead

    def __init__(self, cfg: Blip2Config) -> None:
        super().__init__(cfg)
        self.temp = nn.Parameter(torch.tensor(0.07))

    def make_qformer(self) -> QformerWithHead:
        return QformerWithHead(self.cfg.qformer, self.cfg.vision.width)


Retrieval = BlipRetrieval | Blip2Retrieval  # what graphs are cut from
