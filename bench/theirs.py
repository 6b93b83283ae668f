"""BLIP and BLIP-2 in Hugging Face transformers, eager, float32, on our weights: what retrieval computes of one batch.

B batch, L text tokens, T image tokens, D width of the image features, Q queries, E embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import normalize

from models.blip2 import LN_VISION_EPS
from models.config import Blip2Config, BlipConfig, RetrievalConfig
from models.huggingface import huggingface_config, to_huggingface


class TheirBlip:
    """BlipForImageTextRetrieval."""

    # The modules that each computation runs.
    image_parts, text_parts, pair_parts = "vision_model, vision_proj", "text_encoder, text_proj", "text_encoder, itm_head"

    def __init__(self, config: BlipConfig, state: Mapping[str, Tensor]) -> None:
        sizes = transformers.BlipConfig(**huggingface_config(config), attn_implementation="eager")
        self.model = _with_weights(transformers.BlipForImageTextRetrieval(sizes), config, state)

    def image_embed(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, E), unit length."""
        feat = self.model.vision_model(images).last_hidden_state  # (B, T, D)
        return normalize(self.model.vision_proj(feat[:, 0]), dim=-1)

    def text_embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) to (B, E), unit length."""
        hidden = self.model.text_encoder(ids, attention_mask=mask).last_hidden_state  # (B, L, width)
        return normalize(self.model.text_proj(hidden[:, 0]), dim=-1)

    def itm_logits(self, feat: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Pairs: features (B, T, D) and captions (B, L), [ENC] first, to (B, 2), as salesforce/BLIP train_retrieval.py."""
        hidden = self.model.text_encoder(
            ids,
            attention_mask=mask,
            encoder_hidden_states=feat,
            encoder_attention_mask=_ones(feat),
        ).last_hidden_state  # (B, L, width)
        logits: Tensor = self.model.itm_head(hidden[:, 0])
        return logits


class TheirBlip2:
    """Blip2ForImageTextRetrieval."""

    image_parts, text_parts, pair_parts = "vision_model, qformer", "qformer, text_projection", "qformer, itm_head"

    def __init__(self, config: Blip2Config, state: Mapping[str, Tensor]) -> None:
        sizes = transformers.Blip2Config(**huggingface_config(config), attn_implementation="eager")
        self.model = _with_weights(transformers.Blip2ForImageTextRetrieval(sizes), config, state)
        # No configuration says it: transformers takes the epsilon of the image encoder.
        self.model.vision_model.post_layernorm.eps = LN_VISION_EPS

    def image_embed(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, Q, E), unit length."""
        feat = self.model.vision_model(images).last_hidden_state  # (B, T, D)
        hidden = self.model.qformer(
            query_embeds=self._queries(feat),
            encoder_hidden_states=feat,
            encoder_attention_mask=_ones(feat),
        ).last_hidden_state  # (B, Q, width)
        return normalize(self.model.vision_projection(hidden), dim=-1)

    def text_embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) to (B, E), unit length."""
        words = self.model.embeddings(ids)  # (B, L, width)
        hidden = self.model.qformer(query_embeds=words, query_length=0, attention_mask=mask).last_hidden_state
        return normalize(self.model.text_projection(hidden[:, 0]), dim=-1)

    def itm_logits(self, feat: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Pairs: features (B, T, D) and captions (B, L) to (B, 2), averaged over the queries, as salesforce/LAVIS
        models/blip2_models/blip2_qformer.py, compute_itm."""
        queries = self._queries(feat)  # (B, Q, width)
        count = queries.shape[1]
        hidden = self.model.qformer(
            query_embeds=self.model.embeddings(ids, query_embeds=queries),  # (B, Q + L, width)
            query_length=count,
            attention_mask=torch.cat([_ones(queries), mask], dim=1),
            encoder_hidden_states=feat,
            encoder_attention_mask=_ones(feat),
        ).last_hidden_state  # (B, Q + L, width)
        logits: Tensor = self.model.itm_head(hidden[:, :count])  # (B, Q, 2)
        return logits.mean(dim=1)

    def _queries(self, feat: Tensor) -> Tensor:
        queries: Tensor = self.model.query_tokens.expand(len(feat), -1, -1)
        return queries


def their_model(config: RetrievalConfig, state: Mapping[str, Tensor]) -> TheirBlip | TheirBlip2:
    """transformers' model of `config` with the weights `state`, which bear our names."""
    return TheirBlip2(config, state) if isinstance(config, Blip2Config) else TheirBlip(config, state)


def _with_weights(model: Any, config: RetrievalConfig, state: Mapping[str, Tensor]) -> Any:
    # Copied, not mapped from the file: its own layers are to lie in memory as it would lay them.
    model.load_state_dict(to_huggingface(state, config))
    return model.eval().requires_grad_(False)


def _ones(tokens: Tensor) -> Tensor:
    """A mask (B, N) that hides none of (B, N, width)."""
    return torch.ones(tokens.shape[:2], dtype=torch.long)
