"""BLIP as transformers spells it: the names of its tensors and the sizes of its configuration. Imports no transformers.

The text encoder and the heads have the same names in both; the image encoder is renamed layer by layer. The original
packs queries, keys and values in one matrix and so does transformers, in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from models.config import BlipConfig

# Ours on the left, which is salesforce/BLIP's (models/vit.py); BlipForImageTextRetrieval's on the right. {} is the layer.
NAMES = {
    "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "visual_encoder.blocks.{}.norm1": "vision_model.encoder.layers.{}.layer_norm1",
    "visual_encoder.blocks.{}.attn.qkv": "vision_model.encoder.layers.{}.self_attn.qkv",
    "visual_encoder.blocks.{}.attn.proj": "vision_model.encoder.layers.{}.self_attn.projection",
    "visual_encoder.blocks.{}.norm2": "vision_model.encoder.layers.{}.layer_norm2",
    "visual_encoder.blocks.{}.mlp.fc1": "vision_model.encoder.layers.{}.mlp.fc1",
    "visual_encoder.blocks.{}.mlp.fc2": "vision_model.encoder.layers.{}.mlp.fc2",
    "visual_encoder.norm": "vision_model.post_layernorm",
}
OURS = {theirs: ours for ours, theirs in NAMES.items()}


def to_their_name(name: str) -> str:
    """Our name of a tensor to transformers'; a name that both share stays."""
    return _rename(name, NAMES)


def to_our_name(name: str) -> str:
    """transformers' name of a tensor to ours; a name that both share stays."""
    return _rename(name, OURS)


def huggingface_config(config: BlipConfig) -> dict[str, Any]:
    """Keyword arguments for transformers' BlipConfig, complete where its defaults are not BLIP's.

    Its text encoder would have 8 heads (the original has 12) and its image encoder an epsilon of 1e-5 (1e-6): both load
    without an error and give wrong numbers.
    """
    vision, text = config.vision, config.text
    return {
        "vision_config": {
            "image_size": vision.image_size,
            "patch_size": vision.patch,
            "hidden_size": vision.width,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp,
            "layer_norm_eps": vision.eps,
            "hidden_act": "gelu",
        },
        "text_config": {
            "vocab_size": text.vocab,
            "hidden_size": text.width,
            "encoder_hidden_size": vision.width,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.heads,
            "intermediate_size": text.ffn,
            "max_position_embeddings": text.positions,
            "layer_norm_eps": text.eps,
            "hidden_act": "gelu",
            "is_decoder": True,  # in transformers this is what adds the cross-attention
            # Special tokens belong to the vocabulary; no encoder reads these, and the defaults may lie outside of it.
            "bos_token_id": None,
            "sep_token_id": None,
        },
        "image_text_hidden_size": config.embed,
    }


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
