"""BLIP and BLIP-2 as transformers spells them: names of tensors and sizes of configurations. Imports no transformers.

BLIP's text encoder, decoder and heads have the same names in both; its image encoder is renamed layer by layer, and so is all of
BLIP-2. Queries, keys and values are packed in one matrix in the same order. The bias of BLIP-2's queries and values is packed
there as well, with zeros for the keys, which have none. The norm that follows BLIP-2's image encoder has an epsilon of 1e-5
(salesforce/LAVIS models/blip2_models/blip2.py), and in transformers the encoder's own, 1e-6: no configuration mends it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.blip import BlipRetrieval
from models.blip2 import Blip2Retrieval
from models.blip2_llm import Blip2Llm
from models.captioner import BlipCaptioner
from models.config import (
    CLIP,
    Blip2Config,
    Blip2LlmConfig,
    BlipCaptionConfig,
    BlipConfig,
    BlipVqaConfig,
    Config,
    TextConfig,
    VisionConfig,
)
from models.errors import UserError
from models.llm_config import words_width
from models.llm_settings import picture_id, settings_to_write
from models.vqa import BlipVqa
from models.weights_file import is_plain, listed, renamed

# Ours on the left: salesforce/BLIP's (models/vit.py) and salesforce/LAVIS's (models/eva_vit.py, models/blip2_models).
# BlipForImageTextRetrieval's and Blip2ForImageTextRetrieval's on the right. {} is the layer.
IMAGE_ENCODER = {
    "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "visual_encoder.blocks.{}.norm1": "vision_model.encoder.layers.{}.layer_norm1",
    "visual_encoder.blocks.{}.attn.qkv": "vision_model.encoder.layers.{}.self_attn.qkv",
    "visual_encoder.blocks.{}.attn.proj": "vision_model.encoder.layers.{}.self_attn.projection",
    "visual_encoder.blocks.{}.norm2": "vision_model.encoder.layers.{}.layer_norm2",
    "visual_encoder.blocks.{}.mlp.fc1": "vision_model.encoder.layers.{}.mlp.fc1",
    "visual_encoder.blocks.{}.mlp.fc2": "vision_model.encoder.layers.{}.mlp.fc2",
}
LAYER = {
    "attention.self.query": "attention.attention.query",
    "attention.self.key": "attention.attention.key",
    "attention.self.value": "attention.attention.value",
    "crossattention.self.query": "crossattention.attention.query",
    "crossattention.self.key": "crossattention.attention.key",
    "crossattention.self.value": "crossattention.attention.value",
    **{
        name: name
        for block in ("attention.output", "crossattention.output", "output", "output_query")
        for name in (f"{block}.dense", f"{block}.LayerNorm")
    },
    "intermediate.dense": "intermediate.dense",
    "intermediate_query.dense": "intermediate_query.dense",
}
BLIP = {**IMAGE_ENCODER, "visual_encoder.norm": "vision_model.post_layernorm"}
BLIP2 = {
    **IMAGE_ENCODER,
    "ln_vision": "vision_model.post_layernorm",
    "Qformer.bert.embeddings.LayerNorm": "qformer.layernorm",
    "Qformer.bert.embeddings.word_embeddings": "embeddings.word_embeddings",
    "Qformer.bert.embeddings.position_embeddings": "embeddings.position_embeddings",
    **{f"Qformer.bert.encoder.layer.{{}}.{ours}": f"qformer.encoder.layer.{{}}.{theirs}" for ours, theirs in LAYER.items()},
    "vision_proj": "vision_projection",
    "text_proj": "text_projection",
    "llm_proj": "language_projection",
}
LLM = ("llm_model.", "language_model.")  # begin our names of the language model's tensors, and transformers'
TO_BLIP, TO_BLIP2 = ({theirs: ours for ours, theirs in names.items()} for names in (BLIP, BLIP2))
BERT_VOCAB = 30524  # bert-base-uncased's with [DEC] and [ENC]
BERT_IDS = {"bos_token_id": 30522, "sep_token_id": 102, "eos_token_id": 102, "pad_token_id": 0}  # [DEC], [SEP], [PAD]
PACKED = ".attn.qkv.bias"  # how it would be called here
QUERIES, KEYS, VALUES = ".attn.q_bias", ".attn.k_bias", ".attn.v_bias"


def to_their_name(name: str, blip2: bool = False) -> str:
    """Our name of a tensor to transformers'; a name that both share stays."""
    for part in (QUERIES, KEYS, VALUES):
        name = name.replace(part, PACKED)
    ours, theirs = LLM
    if name.startswith(ours):
        return theirs + name.removeprefix(ours)
    return _rename(name, BLIP2 if blip2 else BLIP)


def to_our_name(name: str, blip2: bool = False) -> str:
    """transformers' name of a tensor to ours; a name that both share stays."""
    ours, theirs = LLM
    if name.startswith(theirs):
        return ours + name.removeprefix(theirs)
    return _rename(name, TO_BLIP2 if blip2 else TO_BLIP)


def from_huggingface(tensors: Mapping[str, Tensor], path: Path, blip2: bool) -> dict[str, Tensor]:
    """transformers' tensors under our names; KEYS, which no model of ours has, where a bias of keys is not zero.

    Raises UserError when a packed bias has no three equal parts.
    """
    ours = renamed(tensors, lambda name: to_our_name(name, blip2), path)
    for name in [name for name in ours if blip2 and name.endswith(PACKED)]:
        stem = name.removesuffix(PACKED)
        ours |= _unpacked(stem, ours.pop(name), listed([to_their_name(name, blip2)]), path)
    return ours


def to_huggingface(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our tensors under the names of transformers' BlipForImageTextRetrieval, Blip2ForImageTextRetrieval,
    BlipForConditionalGeneration, BlipForQuestionAnswering or Blip2ForConditionalGeneration.

    `state` is of the model of `config`, or of one that holds more, which is left out. Raises UserError for a model that
    transformers does not have.
    """
    _refuse_unknown(config)
    with torch.device("meta"):
        names = list(_model(config).state_dict())
    if not isinstance(config, Blip2Config | Blip2LlmConfig):
        return {to_their_name(name): state[name] for name in names}
    theirs = {}
    for name in names:
        if name.endswith(QUERIES):
            queries, values = state[name], state[name.replace(QUERIES, VALUES)]
            theirs[to_their_name(name, blip2=True)] = torch.cat([queries, torch.zeros_like(queries), values])
        elif not name.endswith(VALUES):
            theirs[to_their_name(name, blip2=True)] = state[name]
    return theirs


def huggingface_config(config: Config) -> dict[str, Any]:
    """Keyword arguments for transformers' BlipConfig or Blip2Config, complete where the defaults are not the original's.

    BLIP's text encoder would have 8 heads (the original has 12) and its image encoder an epsilon of 1e-5 (1e-6), BLIP-2's
    Q-Former would have no words: all load without an error and give wrong numbers. Raises UserError as `to_huggingface` does.
    """
    _refuse_unknown(config)
    if isinstance(config, Blip2Config | Blip2LlmConfig):
        return {
            "vision_config": {**_vision(config.vision), "qkv_bias": True},
            "qformer_config": {
                **_text(config.qformer, config.vision),
                "cross_attention_frequency": config.qformer.cross_every,
                "use_qformer_text_input": isinstance(config, Blip2Config),
            },
            "num_query_tokens": config.qformer.queries,
            **(
                {"image_text_hidden_size": config.embed}
                if isinstance(config, Blip2Config)
                else {"text_config": settings_to_write(config.llm), "image_token_index": picture_id(config.llm)}
            ),
        }
    # Special tokens belong to the vocabulary; no encoder reads these, and the defaults may lie outside of it.
    ids: dict[str, Any] = {"bos_token_id": None, "sep_token_id": None}
    if not isinstance(config, BlipConfig) and config.text.vocab == BERT_VOCAB:
        ids = BERT_IDS
    return {
        "vision_config": _vision(config.vision),
        # In transformers is_decoder is what adds the cross-attention.
        "text_config": {**_text(config.text, config.vision), "is_decoder": True, **ids},
        **({"image_text_hidden_size": config.embed} if isinstance(config, BlipConfig) else {}),
    }


def _model(config: Config) -> nn.Module:
    if isinstance(config, BlipConfig):
        return BlipRetrieval(config)
    if isinstance(config, BlipCaptionConfig):
        return BlipCaptioner(config)
    if isinstance(config, BlipVqaConfig):
        return BlipVqa(config)
    return Blip2Llm(config) if isinstance(config, Blip2LlmConfig) else Blip2Retrieval(config)


def _vision(vision: VisionConfig) -> dict[str, Any]:
    return {
        "image_size": vision.image_size,
        "patch_size": vision.patch,
        "hidden_size": vision.width,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.heads,
        "intermediate_size": vision.mlp,
        "layer_norm_eps": vision.eps,
        "hidden_act": "gelu",
    }


def _text(text: TextConfig, vision: VisionConfig) -> dict[str, Any]:
    return {
        "vocab_size": text.vocab,
        "hidden_size": text.width,
        "encoder_hidden_size": vision.width,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.heads,
        "intermediate_size": text.ffn,
        "max_position_embeddings": text.positions,
        "layer_norm_eps": text.eps,
        "hidden_act": "gelu",
    }


def _unpacked(stem: str, bias: Tensor, name: str, path: Path) -> dict[str, Tensor]:
    """The bias of queries and of values, out of one with a third of zeros between them; the third too if it is not zero."""
    if bias.dim() != 1 or len(bias) % 3 or not is_plain(bias):
        raise UserError(f"{path}: {name} is {tuple(bias.shape)}, expected three equal parts. Give a complete checkpoint.")
    queries, keys, values = (part.clone() for part in bias.chunk(3))
    parts = {stem + QUERIES: queries, stem + VALUES: values}
    return parts | {stem + KEYS: keys} if bool(keys.count_nonzero()) else parts


def _refuse_unknown(config: Config) -> None:
    if config.vision.kind == CLIP:
        raise UserError(
            "transformers has no BLIP-2 with CLIP's image encoder (QuickGELU, a norm before the first block). Models with "
            "ViT-L stay in LAVIS's layout or ours."
        )
    if isinstance(config, Blip2LlmConfig) and words_width(config.llm) != config.llm.width:
        raise UserError(
            "transformers' BLIP-2 projects queries to the width of the language model, and this OPT's words are narrower "
            f"({words_width(config.llm)} of {config.llm.width}, as in OPT-350M). Such models stay in LAVIS's layout or ours."
        )
    if isinstance(config, BlipVqaConfig) and not (config.text == config.decoder and config.text.width == config.vision.width):
        raise UserError(
            "transformers has one configuration for what reads questions and what says answers, and both look at something as "
            "wide as pictures are. Models where that differs, as with ViT-L, stay in BLIP's layout or ours."
        )


def _rename(name: str, table: Mapping[str, str]) -> str:
    found = re.search(r"\.(\d+)\.", name)
    layer = found[1] if found else ""
    pattern = name.replace(f".{layer}.", ".{}.", 1) if layer else name
    stem, dot, leaf = pattern.rpartition(".")  # "...norm1", ".", "weight"
    if pattern in table:
        return table[pattern].replace("{}", layer)
    if stem in table:
        return table[stem].replace("{}", layer) + dot + leaf
    return name
