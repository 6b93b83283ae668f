"""transformers' models that write words, with random weights, and what they say is the first word."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from models.blip2 import LN_VISION_EPS
from models.blip2_llm import Blip2Llm
from models.captioner import BlipCaptioner
from models.config import Blip2LlmConfig, BlipCaptionConfig, BlipVqaConfig, GenerationConfig, TextConfig, VisionConfig
from models.fit import Generator
from models.llm_config import LlmConfig, T5Config
from models.stored import compute_in_float32
from models.t5 import T5
from models.vqa import BlipVqa
from tests.make_generator import llm_settings
from tests.tiny import fill

ROWS, LENGTH = 2, 5
PLACEHOLDER = 2  # stands where a picture's queries go; no prompt here holds it


def their_generator(config: GenerationConfig, seed: int = 0, std: float = 0.2) -> Any:
    """The model of `config` in transformers, eager, with random weights."""
    if isinstance(config, Blip2LlmConfig):
        model = transformers.Blip2ForConditionalGeneration(
            transformers.Blip2Config(
                vision_config={**_vision(config.vision), "qkv_bias": True},
                qformer_config={
                    **_text(config.qformer, config.vision),
                    "cross_attention_frequency": config.qformer.cross_every,
                },
                text_config=their_llm_config(config.llm).to_dict(),
                num_query_tokens=config.qformer.queries,
                image_token_index=PLACEHOLDER,
                attn_implementation="eager",
            )
        )
    else:
        kind = transformers.BlipForQuestionAnswering
        if isinstance(config, BlipCaptionConfig):
            kind = transformers.BlipForConditionalGeneration
        ids = {"is_decoder": True, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
        text = {**_text(config.text, config.vision), **ids}
        sizes = transformers.BlipConfig(vision_config=_vision(config.vision), text_config=text)
        model = kind(sizes)
    fill(model, seed, std)
    for name, parameter in model.named_parameters():
        if isinstance(config, Blip2LlmConfig) and name.endswith("self_attn.qkv.bias"):
            parameter.data[config.vision.width : 2 * config.vision.width] = 0.0  # EVA's keys have none
    if isinstance(config, Blip2LlmConfig):
        model.vision_model.post_layernorm.eps = LN_VISION_EPS  # LAVIS's, which no configuration of theirs can say
    return model.eval().requires_grad_(False)


def their_llm_config(llm: LlmConfig) -> Any:
    """transformers' configuration of a language model."""
    kinds: dict[str, Any] = {"opt": transformers.OPTConfig, "llama": transformers.LlamaConfig, "t5": transformers.T5Config}
    said = llm_settings(llm)
    if isinstance(llm, T5Config):
        said["dense_act_fn"] = llm.activation
    return kinds[said.pop("model_type")](**said)


def untied(theirs: Any, seed: int = 7) -> Any:
    """T5 with a head of its own, as FlanT5 has: transformers ties the two of a new model."""
    llm = theirs.language_model if hasattr(theirs, "language_model") else theirs
    weight = torch.empty_like(llm.lm_head.weight).normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
    llm.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    return theirs


def pictures(config: GenerationConfig) -> Tensor:
    """(B, 3, S, S)"""
    size = config.vision.image_size
    return torch.randn(ROWS, 3, size, size, generator=torch.Generator().manual_seed(5))


def prompts(config: GenerationConfig) -> Tensor:
    """ids (B, L)"""
    return torch.randint(3, config.text.vocab, (ROWS, LENGTH), generator=torch.Generator().manual_seed(6))


def their_logits(theirs: Any, config: GenerationConfig) -> Tensor:
    """Of the first word after a prompt or a question, (B, V)."""
    image, ids = pictures(config), prompts(config)
    start = torch.ones(ROWS, 1, dtype=torch.int64)
    if isinstance(config, BlipCaptionConfig):
        found: Tensor = theirs(pixel_values=image, input_ids=ids).logits[:, -1]
        return found
    if isinstance(config, BlipVqaConfig):
        states = theirs.text_encoder(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            encoder_hidden_states=theirs.vision_model(image).last_hidden_state,
            encoder_attention_mask=torch.ones(ROWS, config.vision.tokens, dtype=torch.int64),
        )[0]
        said = theirs.text_decoder(input_ids=start, encoder_hidden_states=states, encoder_attention_mask=torch.ones_like(ids))
        found = said.logits[:, -1]
        return found
    given = torch.cat([torch.full((ROWS, config.qformer.queries), PLACEHOLDER), ids], dim=1)
    more = {"decoder_input_ids": start * 0} if isinstance(config.llm, T5Config) else {}
    found = theirs(pixel_values=image, input_ids=given, **more).logits[:, -1]
    return found


def our_logits(model: Generator, config: GenerationConfig) -> Tensor:
    """The same of our model."""
    with torch.no_grad(), compute_in_float32(model):
        image, ids = pictures(config), prompts(config)
        ones, none = torch.ones(ROWS, 1, LENGTH, dtype=torch.int64), torch.zeros(ROWS, 1, 0, dtype=torch.int64)
        feat, start = model.image_feat(image), torch.ones(ROWS, 1, 1, dtype=torch.int64)
        if isinstance(model, BlipCaptioner):
            past, cross = nothing(model.cfg.decoder.depth, model.cfg.decoder.heads, model.cfg.decoder.width), model.cross_kv(feat)
            return model.text_decoder.next_words(ids[:, None], ones.cumsum(2) - 1, ones, past, none, cross)[0][:, 0]
        if isinstance(model, BlipVqa):
            past = nothing(model.cfg.decoder.depth, model.cfg.decoder.heads, model.cfg.decoder.width)
            cross = model.cross_kv(model.question_states(ids, ones[:, 0], feat))
            return model.text_decoder.next_words(start, start - 1, None, past, none, cross)[0][:, 0]
        assert isinstance(config, Blip2LlmConfig)
        return _of_llm(model, config.llm, model.llm_prompt(model.query_embed(feat)), ids)


def _of_llm(model: Blip2Llm, llm: LlmConfig, prompt: Tensor, ids: Tensor) -> Tensor:
    none, mask = torch.zeros(ROWS, 1, 0, dtype=torch.int64), torch.ones_like(ids)
    t5 = model.llm_model
    if isinstance(t5, T5):
        assert isinstance(llm, T5Config)
        read = torch.ones(ROWS, prompt.shape[1] + LENGTH, dtype=torch.int64)
        start = torch.zeros(ROWS, 1, 1, dtype=torch.int64)
        past = nothing(llm.depth, llm.heads, llm.heads * llm.head_width)
        cross = t5.cross_kv(model.encode(prompt, ids, mask))
        return t5.next_words(start, start, None, past, none, cross, read)[0][:, 0]
    positions = mask.cumsum(1) - 1 + prompt.shape[1]
    assert not isinstance(llm, T5Config)
    return model.next_words(prompt, ids, mask, positions, None, None)[0]


def nothing(layers: int, heads: int, width: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of no words."""
    empty = torch.zeros(ROWS, heads, 0, width // heads)
    return [(empty, empty)] * layers


def far(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a part of the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max())


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
