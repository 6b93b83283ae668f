"""BLIP-2's second stage put together: the PyTorch truth that its graphs are compared with.

Axes as in models/generation_spec.py. Parameter names are salesforce/LAVIS's (models/blip2_models/blip2_opt.py, blip2_t5.py,
blip2_vicuna_instruct.py), but `llm_proj` and `llm_model` stand for opt_proj, t5_proj and opt_model, t5_model too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blip2 import LN_VISION_EPS
from models.caches import Before, Bias, Present, bias_after, shared_bias
from models.clip_vit import ClipVisionTransformer
from models.config import CLIP, Blip2LlmConfig
from models.llama import Llama
from models.llm_config import LlamaConfig, LlmConfig, OptConfig, words_width
from models.opt import Opt
from models.qformer import QformerModel
from models.t5 import T5
from models.vit import VisionTransformer


class Blip2Llm(nn.Module):
    """An image encoder, a Q-Former without words, a projection into a language model, and that model."""

    def __init__(self, cfg: Blip2LlmConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.visual_encoder = (ClipVisionTransformer if cfg.vision.kind == CLIP else VisionTransformer)(cfg.vision)
        self.ln_vision = nn.LayerNorm(cfg.vision.width, eps=LN_VISION_EPS)
        self.query_tokens = nn.Parameter(torch.zeros(1, cfg.qformer.queries, cfg.qformer.width))
        self.Qformer = QformerModel(cfg.qformer, cfg.vision.width, words=False)
        # OPT-350m's words are narrower than the model; what stands for words has to be as wide as they are.
        self.llm_proj = nn.Linear(cfg.qformer.width, words_width(cfg.llm))
        self.llm_model = language_model(cfg.llm)

    def image_feat(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, T, D)."""
        feat: Tensor = self.ln_vision(self.visual_encoder(image))
        return feat

    def query_embed(self, image_feat: Tensor) -> Tensor:
        """(B, T, D) to the states of the queries that read the picture (B, Q, D)."""
        tokens = self.query_tokens.expand(image_feat.shape[0], -1, -1)
        return self.Qformer.bert.read_image(tokens, self.Qformer.bert.image_kv(image_feat))[0]

    def llm_prompt(self, query_embed: Tensor) -> Tensor:
        """(B, Q, D) to what stands for words before the prompt (B, Q, E)."""
        prompt: Tensor = self.llm_proj(query_embed)
        return prompt

    def next_words(
        self,
        llm_prompt: Tensor | None,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        past: Sequence[Before] | None,
        past_mask: Tensor | None,
        shared_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[Present]]:
        """The word that follows: logits (N, V) and the keys and values of every layer. Not of T5, which has `T5.next_words`.

        Args:
            llm_prompt: (N, Q, E), before the words; None when there is none, as after the first step.
            ids, mask, positions: (N, L) int64, padded on the left; without `mask` nothing is padding. The queries stand at
                the positions 0 to Q - 1.
            past: of every layer; None when nothing came before.
            past_mask: (N, P) int64, 0 where a row's own past is padding or not yet filled; None when there is none.
            shared_mask: (B, C) int64, 0 where the past that sequences share is padding; None when there is none.
        """
        llm = self.llm_model
        assert not isinstance(llm, T5)
        embeds = llm.embed(ids)
        if llm_prompt is not None:
            count = llm_prompt.shape[1]
            embeds = torch.cat([llm_prompt, embeds], dim=1)  # (N, Q + L, E)
            places = torch.arange(count, device=ids.device)[None].expand(ids.shape[0], -1)  # (N, Q)
            positions = torch.cat([places, positions], dim=1)  # (N, Q + L)
            mask = None if mask is None else F.pad(mask, (count, 0), value=1)  # (N, Q + L)
        shared = None if shared_mask is None else shared_bias(shared_mask)
        bias = Bias(bias_after(mask, embeds.shape[1], past_mask), shared)
        logits, present = llm(embeds, positions, bias, [Before()] * llm.cfg.depth if past is None else past)
        return logits, present

    def encode(self, llm_prompt: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """What T5 reads, the queries (B, Q, D) and the prompt ids, mask (B, L), to states (B, Q + L, D)."""
        t5 = self.llm_model
        assert isinstance(t5, T5)
        embeds = torch.cat([llm_prompt, t5.embed(ids)], dim=1)  # (B, Q + L, D)
        return t5.encode(embeds, F.pad(mask, (llm_prompt.shape[1], 0), value=1))


def language_model(cfg: LlmConfig) -> Opt | Llama | T5:
    if isinstance(cfg, OptConfig):
        return Opt(cfg)
    return Llama(cfg) if isinstance(cfg, LlamaConfig) else T5(cfg)
