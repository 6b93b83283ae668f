"""transformers' own models with the weights of ours, and what they generate: what whole texts are held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

from models.blip2 import LN_VISION_EPS
from models.blip2_llm import Blip2Llm
from models.captioner import BlipCaptioner
from models.config import Blip2LlmConfig, BlipVqaConfig, TextConfig, VisionConfig
from models.fit import Generator
from models.huggingface import to_their_name
from models.llm_config import LlamaConfig, OptConfig, T5Config
from models.vqa import BlipVqa
from tests.talkative import Batch
from tests.test_decoders import their_llama, their_opt, their_t5
from tests.uncached import up_to_stop

PAD = 0
Q_BIAS, V_BIAS = ".attn.q_bias", ".attn.v_bias"
TIED = ("embed_tokens", "lm_head", "predictions.decoder")  # tensors that are other tensors of the model


@dataclass(frozen=True)
class Asked:
    """Options of decoding; the numbers of words are of new ones."""

    new: int = 12  # at most
    least: int = 0
    beams: int = 1
    number: int = 1  # of texts
    repetition: float = 1.0
    length: float = 1.0  # penalty
    early: bool = False


@dataclass(frozen=True)
class Theirs:
    """What transformers generates for one batch."""

    texts: list[list[tuple[int, ...]]]  # by prompt, the best first; without the stop word
    scores: list[list[float]]  # of beams
    logits: list[np.ndarray]  # of each step (N, V), where nothing is searched


def their_model(model: Generator, stop: int) -> Any:
    """transformers' model of the same architecture and weights, in eval mode. `stop` ends a text."""
    config = model.cfg
    if isinstance(config, Blip2LlmConfig):
        theirs = their_blip2(config)
    elif isinstance(config, BlipVqaConfig):
        # Transformers has one configuration for both of its texts; in ours no size of one is the other's.
        read = transformers.BlipTextConfig(**text_settings(config.text, config.vision.width, stop))
        said = transformers.BlipTextConfig(**text_settings(config.decoder, config.text.width, stop))
        both = transformers.BlipConfig(vision_config=vision_settings(config.vision), text_config=said.to_dict())
        theirs = transformers.BlipForQuestionAnswering(both)
        theirs.text_encoder, theirs.text_decoder = BlipTextModel(read, add_pooling_layer=False), BlipTextLMHeadModel(said)
    else:
        said = text_settings(config.decoder, config.vision.width, stop)
        both = transformers.BlipConfig(vision_config=vision_settings(config.vision), text_config=said)
        theirs = transformers.BlipForConditionalGeneration(both)
    missing, unexpected = theirs.load_state_dict(their_state(model), strict=False)
    assert not unexpected
    assert all(any(part in name for part in TIED) for name in missing), missing
    return theirs.eval().requires_grad_(False)


def their_state(model: Generator) -> dict[str, Tensor]:
    """Our weights under their names."""
    state, found = model.state_dict(), {}
    for name, tensor in state.items():
        if name.endswith(Q_BIAS):
            tensor = torch.cat([tensor, torch.zeros_like(tensor), state[name.replace(Q_BIAS, V_BIAS)]])
        if not name.endswith(V_BIAS):
            found[to_their_name(name, blip2=isinstance(model, Blip2Llm))] = tensor
    return found


def their_blip2(config: Blip2LlmConfig) -> Any:
    llm, qformer = config.llm, config.qformer
    words = (their_opt if isinstance(llm, OptConfig) else their_llama if isinstance(llm, LlamaConfig) else their_t5)(llm)
    theirs = transformers.Blip2ForConditionalGeneration(
        transformers.Blip2Config(
            vision_config={**vision_settings(config.vision), "qkv_bias": True},
            qformer_config={
                "hidden_size": qformer.width,
                "encoder_hidden_size": config.vision.width,
                "num_hidden_layers": qformer.depth,
                "num_attention_heads": qformer.heads,
                "intermediate_size": qformer.ffn,
                "cross_attention_frequency": qformer.cross_every,
                "layer_norm_eps": qformer.eps,
            },
            text_config=words.config.to_dict(),
            num_query_tokens=qformer.queries,
            image_token_index=image_token(config),
        )
    )
    if isinstance(llm, T5Config):  # a head of its own, as FlanT5 has: transformers ties the two of a new model
        theirs.language_model.lm_head.weight = torch.nn.Parameter(torch.empty(llm.vocab, llm.width))
    theirs.vision_model.post_layernorm.eps = LN_VISION_EPS  # of the original; transformers has that of the encoder
    return theirs


def image_token(config: Blip2LlmConfig) -> int:
    """Stands where a query is put in: the last word of the vocabulary."""
    return config.llm.vocab - 1


def vision_settings(vision: VisionConfig) -> dict[str, Any]:
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


def text_settings(text: TextConfig, seen: int, stop: int) -> dict[str, Any]:
    return {
        "vocab_size": text.vocab,
        "hidden_size": text.width,
        "encoder_hidden_size": seen,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.heads,
        "intermediate_size": text.ffn,
        "max_position_embeddings": text.positions,
        "layer_norm_eps": text.eps,
        "is_decoder": True,
        "bos_token_id": text.vocab - 2,
        "sep_token_id": stop,
        "pad_token_id": PAD,
    }


def generated(theirs: Any, model: Generator, batch: Batch, stop: int, asked: Asked) -> Theirs:
    """What `theirs` generates. Prompts of BLIP's captioner are given one by one: there it counts padding as places."""
    options = {
        "max_new_tokens": asked.new,
        "min_new_tokens": asked.least or None,
        "num_beams": asked.beams,
        "num_return_sequences": asked.number,
        "repetition_penalty": asked.repetition,
        "length_penalty": asked.length,
        "early_stopping": asked.early,
        "do_sample": False,
        "output_logits": True,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    pictures = torch.from_numpy(batch.pictures[batch.picture])  # (N, 3, S, S)
    ids, mask = torch.from_numpy(batch.ids), torch.from_numpy(batch.mask)
    if isinstance(model, BlipCaptioner):
        found = []
        for n in range(len(ids)):
            words = ids[n : n + 1, mask[n] > 0]
            ended = torch.cat([words, torch.full((1, 1), stop)], dim=1)  # they cut the end off, and put [DEC] first
            out = theirs.generate(pictures[n : n + 1], ended, torch.ones_like(ended), **options)
            found.append(taken(out, words.shape[1], stop, asked))
        return together(found)
    if isinstance(model, BlipVqa):
        return taken(theirs.generate(ids, pictures, mask, **options), 1, stop, asked)
    queries = torch.full((len(ids), model.cfg.qformer.queries), image_token(model.cfg))
    looked = torch.ones_like(queries)
    if isinstance(model.cfg.llm, OptConfig | LlamaConfig):  # all padding before the queries
        rows = [torch.cat([row[kept == 0], query, row[kept > 0]]) for row, kept, query in zip(ids, mask, queries, strict=True)]
        words, kept = torch.stack(rows), torch.cat([mask, looked], dim=1).sort(dim=1).values
        prefix = words.shape[1]
    else:
        words, kept, prefix = torch.cat([queries, ids], dim=1), torch.cat([looked, mask], dim=1), 1
    tokens = {"eos_token_id": stop, "pad_token_id": PAD, "decoder_start_token_id": PAD}
    out = theirs.generate(pictures, words, kept, **tokens, **options)
    return taken(out, prefix, stop, asked)


def taken(out: Any, prefix: int, stop: int, asked: Asked) -> Theirs:
    rows = [tuple(up_to_stop(row[prefix:].tolist(), (stop,))[0]) for row in out.sequences]
    scores = out.sequences_scores.tolist() if asked.beams > 1 else [0.0] * len(rows)
    by_prompt = range(0, len(rows), asked.number)
    return Theirs(
        [rows[n : n + asked.number] for n in by_prompt],
        [scores[n : n + asked.number] for n in by_prompt],
        [step.numpy() for step in out.logits] if asked.beams == 1 else [],
    )


def together(parts: list[Theirs]) -> Theirs:
    """Of prompts one by one: the logits of a step are NaN for those that have ended."""
    steps = max(len(part.logits) for part in parts)
    logits = []
    for n in range(steps):
        rows = [part.logits[n] if n < len(part.logits) else np.full_like(part.logits[0], np.nan) for part in parts]
        logits.append(np.concatenate(rows))
    return Theirs([part.texts[0] for part in parts], [part.scores[0] for part in parts], logits)
