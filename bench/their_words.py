"""BLIP's decoder and language models in Hugging Face transformers, float32, on our weights: `generate` with its cache.

Attention is what transformers takes by itself. B pictures with a prompt each, L tokens, Q queries, E width of a word, W new
words.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import Tensor

from bench.words import Asked
from models.blip2_llm import Blip2Llm
from models.checkpoint import LoadReport, load_generator
from models.config import Blip2LlmConfig, BlipCaptionConfig, BlipVqaConfig, GenerationConfig
from models.errors import UserError
from models.huggingface import huggingface_config, to_huggingface
from models.llm_config import LlamaConfig, LlmConfig, OptConfig, T5Config

Files = tuple[Path, Path | None, Path | None]  # the checkpoint, and those of the image encoder and of the language model


class TheirWords(Protocol):
    """A model that writes words."""

    @property
    def name(self) -> str:
        """What is called."""

    def describe(self) -> str:
        """What it is, for the reader of the numbers."""

    def write(self, given: np.ndarray, ids: np.ndarray, beams: int, new: int) -> np.ndarray:
        """The best `new` words (B, W) int64 after the prompts `ids` (B, L), which nothing ends before.

        `given`: pictures (B, 3, S, S); or, for a language model alone, what stands for them before the words (B, Q, E).
        """


def load_their_words(config: GenerationConfig, files: Files, asked: Asked, threads: int) -> tuple[TheirWords, LoadReport]:
    """transformers' model with the weights of `files`. Sets the threads of PyTorch. Raises UserError when the files are not
    of this model, or when transformers has no such model."""
    torch.set_num_threads(threads)
    ours, report = load_generator(config, *files)
    if isinstance(config, Blip2LlmConfig):
        assert isinstance(ours, Blip2Llm)
        return TheirLlm(config.llm, ours.llm_model.state_dict(), asked), report
    return TheirBlip(config, ours.state_dict(), asked), report


class _Theirs:
    """What the models have in common."""

    model: Any
    asked: Asked

    @property
    def name(self) -> str:
        return f"{type(self.model).__name__}.generate"

    def describe(self) -> str:
        attention = self.model.config._attn_implementation
        return f"transformers {transformers.__version__}, {type(self.model).__name__}, {attention} attention, float32"

    def wishes(self, beams: int, new: int) -> dict[str, Any]:
        """How `generate` is to write."""
        return {"num_beams": beams, "do_sample": False, "use_cache": True, "min_new_tokens": new, "max_new_tokens": new}


class TheirBlip(_Theirs):
    """BlipForConditionalGeneration, or BlipForQuestionAnswering."""

    def __init__(self, config: BlipCaptionConfig | BlipVqaConfig, state: Mapping[str, Tensor], asked: Asked) -> None:
        kind = transformers.BlipForConditionalGeneration if isinstance(config, BlipCaptionConfig) else None
        sizes = huggingface_config(config)
        # The first and the last word, and padding, by this vocabulary.
        ids = {"bos_token_id": int(asked.start_id), "sep_token_id": asked.stop_ids[0], "eos_token_id": asked.stop_ids[0]}
        sizes["text_config"] |= ids | {"pad_token_id": asked.pad_id}
        self.model = (kind or transformers.BlipForQuestionAnswering)(transformers.BlipConfig(**sizes))
        self.asked, self.captions = asked, kind is not None
        fill(self.model, to_huggingface(state, config))

    @torch.inference_mode()
    def write(self, given: np.ndarray, ids: np.ndarray, beams: int, new: int) -> np.ndarray:
        words = torch.from_numpy(ids)
        if self.captions:  # the last of the ids, which a tokenizer puts there, is dropped
            words = torch.nn.functional.pad(words, (0, 1), value=self.asked.stop_ids[0])
        found = self.model.generate(pixel_values=torch.from_numpy(given), input_ids=words, **self.wishes(beams, new))
        return _numpy(found[:, -new:])


class TheirLlm(_Theirs):
    """OPTForCausalLM, LlamaForCausalLM (Vicuna's and Baichuan-7B's too), or T5ForConditionalGeneration."""

    def __init__(self, llm: LlmConfig, state: Mapping[str, Tensor], asked: Asked) -> None:
        self.model, self.asked = _language_model(llm, asked), asked
        fill(self.model, state)

    @torch.inference_mode()
    def write(self, given: np.ndarray, ids: np.ndarray, beams: int, new: int) -> np.ndarray:
        words = self.model.get_input_embeddings()(torch.from_numpy(ids))  # (B, L, E)
        embeds = torch.cat([torch.from_numpy(given), words], dim=1)  # (B, Q + L, E)
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        ends = {"eos_token_id": list(self.asked.stop_ids), "pad_token_id": self.asked.pad_id}
        found = self.model.generate(inputs_embeds=embeds, attention_mask=mask, **ends, **self.wishes(beams, new))
        return _numpy(found[:, -new:])


def fill(model: Any, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the model, in float32, for inference: its own layers are to lie in memory as it would lay them.

    What `state` lacks has to be a second name of what it has. Raises UserError otherwise.
    """
    missing, unexpected = model.load_state_dict(state, strict=False)
    tensors = model.state_dict()
    filled = {tensors[name].data_ptr() for name in state if name in tensors}
    wrong = [*unexpected, *(name for name in missing if tensors[name].data_ptr() not in filled)]
    if wrong:
        raise UserError(f"This release of transformers has other tensors: {wrong[0]!r} does not fit. Install transformers 5.23.")
    model.eval().requires_grad_(False)


def _language_model(llm: LlmConfig, asked: Asked) -> Any:
    common = {"vocab_size": llm.vocab, "pad_token_id": asked.pad_id, "eos_token_id": asked.stop_ids[0]}
    if isinstance(llm, OptConfig):
        sizes = transformers.OPTConfig(
            hidden_size=llm.width,
            num_hidden_layers=llm.depth,
            num_attention_heads=llm.heads,
            ffn_dim=llm.ffn,
            max_position_embeddings=llm.positions,
            do_layer_norm_before=llm.pre_norm,
            word_embed_proj_dim=llm.embed,
            **common,
        )
        return transformers.OPTForCausalLM(sizes)
    if isinstance(llm, LlamaConfig):
        sizes = transformers.LlamaConfig(
            hidden_size=llm.width,
            num_hidden_layers=llm.depth,
            num_attention_heads=llm.heads,
            intermediate_size=llm.ffn,
            max_position_embeddings=llm.positions,
            rms_norm_eps=llm.eps,
            rope_parameters={"rope_type": "default", "rope_theta": llm.theta},
            **common,
        )
        return transformers.LlamaForCausalLM(sizes)
    assert isinstance(llm, T5Config)
    sizes = transformers.T5Config(
        d_model=llm.width,
        num_layers=llm.depth,
        num_heads=llm.heads,
        d_kv=llm.head_width,
        d_ff=llm.ffn,
        relative_attention_num_buckets=llm.buckets,
        relative_attention_max_distance=llm.farthest,
        layer_norm_epsilon=llm.eps,
        feed_forward_proj="gated-gelu",
        dense_act_fn=llm.activation,
        tie_word_embeddings=False,
        decoder_start_token_id=asked.start_id,
        **common,
    )
    model = transformers.T5ForConditionalGeneration(sizes)
    # transformers ties the head to the words when it builds a model, and unties it when it finds one in a file.
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model


def _numpy(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.numpy()
    return array
