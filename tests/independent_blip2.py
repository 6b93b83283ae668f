"""BLIP-2's retrieval evaluation and its features a second time, plainly: what our chain is held against.

Two models that share with the product the names of the weights and the token ids, and no other line. `Plain` computes in
float64, one function for each thing, from the published description (salesforce/LAVIS models/eva_vit.py, models/clip_vit.py,
models/blip2_models/Qformer.py and blip2_qformer.py). `Transformers` is Blip2ForImageTextRetrieval, which knows EVA alone. The
evaluation is `compute_sim_matrix` of LAVIS models/blip2_models/blip2.py: every caption padded to the full length, the
similarities of all queries held at once, every pair scored from the picture's features, twice when both directions want it.

N pictures, M captions, C pairs, Q queries, T image tokens, L tokens, D width, E embedding.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.blip2 import Blip2Retrieval
from models.huggingface import huggingface_config, to_huggingface
from tests.independent import Evaluation

State = dict[str, Tensor]


class Model(Protocol):
    """What the evaluation asks of a model. Float64 or float32, as the model computes."""

    def image_feat(self, pictures: Tensor) -> Tensor: ...  # (N, 3, S, S) -> (N, T, D)
    def image_embeds(self, feat: Tensor) -> Tensor: ...  # (N, T, D) -> (N, Q, D)
    def text_embeds(self, ids: Tensor, mask: Tensor) -> Tensor: ...  # (M, L) -> (M, L, D)
    def multimodal_embeds(self, ids: Tensor, mask: Tensor, feat: Tensor) -> Tensor: ...  # (C, L), (C, T, D) -> (C, Q, D)
    def project(self, head: str, x: Tensor) -> Tensor: ...  # by vision_proj, text_proj or itm_head


def affine(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, hidden: Tensor | None = None) -> Tensor:
    """Attention of several heads: q (B, A, D) on k and v (B, K, D); `hidden` (B, K) marks keys that nobody sees."""
    q, k, v = (x.unflatten(2, (heads, -1)) for x in (q, k, v))
    scores = torch.einsum("bahd,bkhd->bhak", q, k) / math.sqrt(q.shape[3])
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None, :], -math.inf)
    return torch.einsum("bhak,bkhd->bahd", scores.softmax(3), v).flatten(2)  # (B, A, D)


def patches(pictures: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, 3, S, S) to one row per square of the grid (N, T - 1, D)."""
    size = weight.shape[-1]
    columns = F.unfold(pictures, size, stride=size).transpose(1, 2)  # (N, T - 1, 3 * P * P)
    return F.linear(columns, weight.flatten(1), bias)


def eva_vit(state: State, pictures: Tensor, depth: int, heads: int) -> Tensor:
    """LAVIS eva_vit.py: queries and values have a bias and keys none, LayerNorm epsilon 1e-6, no norm at the end."""
    x = patches(pictures, state["visual_encoder.patch_embed.proj.weight"], state["visual_encoder.patch_embed.proj.bias"])
    cls = state["visual_encoder.cls_token"].expand(len(x), -1, -1)
    x = torch.cat([cls, x], 1) + state["visual_encoder.pos_embed"]
    for n in range(depth):
        block = f"visual_encoder.blocks.{n}"
        q_bias, v_bias = state[f"{block}.attn.q_bias"], state[f"{block}.attn.v_bias"]
        bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        qkv = F.linear(norm(state, f"{block}.norm1", x, 1e-6), state[f"{block}.attn.qkv.weight"], bias)
        x = x + affine(state, f"{block}.attn.proj", attend(*qkv.chunk(3, 2), heads))
        y = F.gelu(affine(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + affine(state, f"{block}.mlp.fc2", y)
    return x


def clip_vit(state: State, pictures: Tensor, depth: int, heads: int) -> Tensor:
    """LAVIS clip_vit.py: a norm before the blocks, none after them, x * sigmoid(1.702 x), LayerNorm epsilon 1e-5."""
    x = patches(pictures, state["visual_encoder.conv1.weight"], None)
    cls = state["visual_encoder.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([cls, x], 1) + state["visual_encoder.positional_embedding"]
    x = norm(state, "visual_encoder.ln_pre", x, 1e-5)
    for n in range(depth):
        block = f"visual_encoder.transformer.resblocks.{n}"
        packed = state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"]
        qkv = F.linear(norm(state, f"{block}.ln_1", x, 1e-5), *packed)
        x = x + affine(state, f"{block}.attn.out_proj", attend(*qkv.chunk(3, 2), heads))
        y = affine(state, f"{block}.mlp.c_fc", norm(state, f"{block}.ln_2", x, 1e-5))
        x = x + affine(state, f"{block}.mlp.c_proj", y * torch.sigmoid(1.702 * y))
    return x


def qformer(
    state: State, depth: int, heads: int, queries: Tensor | None, text: tuple[Tensor, Tensor] | None, feat: Tensor | None
) -> Tensor:
    """LAVIS Qformer.py, BertModel: queries (B, Q, D) and text (ids and mask, B x L), either may be missing, and the picture
    (B, T, width) that queries look at in every second layer. Returns the states of all (B, Q + L, D), queries first."""
    bert, parts, hidden = "Qformer.bert", [], []
    if queries is not None:
        parts.append(queries)
        hidden.append(torch.zeros(queries.shape[:2], dtype=torch.bool))
    if text is not None:
        ids, mask = text
        words = state[f"{bert}.embeddings.word_embeddings.weight"][ids]
        parts.append(words + state[f"{bert}.embeddings.position_embeddings.weight"][: ids.shape[1]])
        hidden.append(mask == 0)
    count = 0 if queries is None else queries.shape[1]
    x = norm(state, f"{bert}.embeddings.LayerNorm", torch.cat(parts, 1), 1e-12)
    for n in range(depth):
        layer = f"{bert}.encoder.layer.{n}"
        x = attention(state, f"{layer}.attention", x, x, heads, torch.cat(hidden, 1))
        seeing, reading = x[:, :count], x[:, count:]
        if count and n % 2 == 0:
            assert feat is not None
            seeing = attention(state, f"{layer}.crossattention", seeing, feat, heads, None)
        seeing = feed_forward(state, f"{layer}.intermediate_query", f"{layer}.output_query", seeing)
        x = torch.cat([seeing, feed_forward(state, f"{layer}.intermediate", f"{layer}.output", reading)], 1)
    return x


def attention(state: State, name: str, x: Tensor, source: Tensor, heads: int, hidden: Tensor | None) -> Tensor:
    q = affine(state, f"{name}.self.query", x)
    k, v = (affine(state, f"{name}.self.{part}", source) for part in ("key", "value"))
    y = affine(state, f"{name}.output.dense", attend(q, k, v, heads, hidden))
    return norm(state, f"{name}.output.LayerNorm", y + x, 1e-12)


def feed_forward(state: State, inner: str, outer: str, x: Tensor) -> Tensor:
    y = affine(state, f"{outer}.dense", F.gelu(affine(state, f"{inner}.dense", x)))
    return norm(state, f"{outer}.LayerNorm", y + x, 1e-12)


class Plain:
    """The functions above with the weights of `ours`, in float64."""

    def __init__(self, ours: Blip2Retrieval) -> None:
        self.cfg, self.state = ours.cfg, {name: tensor.double() for name, tensor in ours.state_dict().items()}

    def image_feat(self, pictures: Tensor) -> Tensor:
        vision = self.cfg.vision
        encoder = {"eva": eva_vit, "clip": clip_vit}[vision.kind]
        return norm(self.state, "ln_vision", encoder(self.state, pictures.double(), vision.depth, vision.heads), 1e-5)

    def image_embeds(self, feat: Tensor) -> Tensor:
        return self._qformer(self._queries(feat), None, feat)

    def text_embeds(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self._qformer(None, (ids, mask), None)

    def multimodal_embeds(self, ids: Tensor, mask: Tensor, feat: Tensor) -> Tensor:
        return self._qformer(self._queries(feat), (ids, mask), feat)[:, : self.cfg.qformer.queries]

    def project(self, head: str, x: Tensor) -> Tensor:
        return affine(self.state, head, x)

    def _queries(self, feat: Tensor) -> Tensor:
        return self.state["query_tokens"].expand(len(feat), -1, -1)

    def _qformer(self, queries: Tensor | None, text: tuple[Tensor, Tensor] | None, feat: Tensor | None) -> Tensor:
        return qformer(self.state, self.cfg.qformer.depth, self.cfg.qformer.heads, queries, text, feat)


class Transformers:
    """transformers' Blip2ForImageTextRetrieval with the weights of `ours`, its attention written out (eager)."""

    def __init__(self, ours: Blip2Retrieval) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers

            config = transformers.Blip2Config(**huggingface_config(ours.cfg), attn_implementation="eager")
            self.model: Any = transformers.Blip2ForImageTextRetrieval(config).eval()
        self.model.load_state_dict(to_huggingface(ours.state_dict(), ours.cfg))
        self.model.vision_model.post_layernorm.eps = 1e-5  # LAVIS's ln_vision; no configuration of transformers has it

    def image_feat(self, pictures: Tensor) -> Tensor:
        found: Tensor = self.model.vision_model(pictures).last_hidden_state
        return found

    def image_embeds(self, feat: Tensor) -> Tensor:
        return self._qformer(query_embeds=self._queries(feat), **self._seen(feat))

    def text_embeds(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self._qformer(query_embeds=self.model.embeddings(input_ids=ids), query_length=0, attention_mask=mask)

    def multimodal_embeds(self, ids: Tensor, mask: Tensor, feat: Tensor) -> Tensor:
        queries = self._queries(feat)
        count = queries.shape[1]
        both = self.model.embeddings(input_ids=ids, query_embeds=queries)
        mask = torch.cat([torch.ones(len(ids), count, dtype=mask.dtype), mask], 1)
        return self._qformer(query_embeds=both, query_length=count, attention_mask=mask, **self._seen(feat))[:, :count]

    def project(self, head: str, x: Tensor) -> Tensor:
        names = {"vision_proj": "vision_projection", "text_proj": "text_projection"}
        found: Tensor = getattr(self.model, names.get(head, head))(x)
        return found

    def _queries(self, feat: Tensor) -> Tensor:
        tokens: Tensor = self.model.query_tokens.expand(len(feat), -1, -1)
        return tokens

    def _seen(self, feat: Tensor) -> dict[str, Tensor]:
        return {"encoder_hidden_states": feat, "encoder_attention_mask": torch.ones(feat.shape[:2], dtype=torch.long)}

    def _qformer(self, **inputs: Any) -> Tensor:
        found: Tensor = self.model.qformer(return_dict=True, **inputs).last_hidden_state
        return found


def image_embed(model: Model, feat: Tensor) -> Tensor:
    """(N, T, D) to (N, Q, E), unit length."""
    return F.normalize(model.project("vision_proj", model.image_embeds(feat)), dim=-1)


def text_embed(model: Model, ids: Tensor, mask: Tensor) -> Tensor:
    """(M, L) to (M, E), unit length."""
    return F.normalize(model.project("text_proj", model.text_embeds(ids, mask)[:, 0]), dim=-1)


@torch.no_grad()
def evaluate(model: Model, pictures: Tensor, ids: Tensor, mask: Tensor, k_test: int) -> Evaluation:
    """LAVIS's evaluation: pictures (N, 3, S, S), ids and mask (M, L), padded to the full length.

    The original stops when k_test is larger than the set; here it is clamped to the set.
    """
    feat = torch.cat([model.image_feat(picture[None]) for picture in pictures])  # (N, T, D)
    images, texts = image_embed(model, feat), text_embed(model, ids, mask)  # (N, Q, E), (M, E)
    sims = torch.einsum("nqe,me->nqm", images, texts).max(1).values  # (N, M)
    logits: dict[tuple[int, int], np.ndarray] = {}

    def match(rows: Tensor, columns: Tensor) -> Tensor:
        """ITM logits (C, 2) of C pairs."""
        states = model.multimodal_embeds(ids[columns], mask[columns], feat[rows])  # (C, Q, D)
        found = model.project("itm_head", states).mean(1)  # (C, 2)
        logits.update(zip(zip(rows.tolist(), columns.tolist(), strict=True), found.numpy(), strict=True))
        return found

    i2t = torch.full(sims.shape, -100.0, dtype=sims.dtype)
    for n, row in enumerate(sims):
        top_sim, top = row.topk(min(k_test, len(row)))
        i2t[n, top] = match(torch.full_like(top, n), top)[:, 1] + top_sim
    t2i = torch.full(sims.T.shape, -100.0, dtype=sims.dtype)
    for m, row in enumerate(sims.T):
        top_sim, top = row.topk(min(k_test, len(row)))
        t2i[m, top] = match(top, torch.full_like(top, m))[:, 1] + top_sim
    arrays = feat.numpy(), images.numpy(), texts.numpy(), sims.numpy()
    return Evaluation(*arrays, logits, i2t.numpy(), t2i.numpy())


@torch.no_grad()
def features(model: Model, pictures: Tensor, ids: Tensor, mask: Tensor, image_of_text: Tensor) -> dict[str, np.ndarray]:
    """`extract_features` of LAVIS in its three modes, each caption with its own picture; padding is zero."""
    feat = torch.cat([model.image_feat(picture[None]) for picture in pictures])  # (N, T, D)
    image, text = model.image_embeds(feat), model.text_embeds(ids, mask)  # (N, Q, D), (M, L, D)
    shown = mask[:, :, None].to(text.dtype)
    found = {
        "image_embeds": image,
        "image_embeds_proj": F.normalize(model.project("vision_proj", image), dim=-1),
        "text_embeds": text * shown,
        "text_embeds_proj": F.normalize(model.project("text_proj", text), dim=-1) * shown,
        "multimodal_embeds": model.multimodal_embeds(ids, mask, feat[image_of_text]),
    }
    return {name: tensor.numpy() for name, tensor in found.items()}
