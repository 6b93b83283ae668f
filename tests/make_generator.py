"""Randomly filled checkpoints of the models that write words, in the forms that their authors publish them in.

What tests.make_checkpoint writes of such a model. Tensors are filled one by one, and memory holds them once; of a language model
that is written, the disk holds them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from models.blip2_llm import language_model
from models.config import Blip2LlmConfig, BlipCaptionConfig, BlipVqaConfig, GenerationConfig
from models.fit import generator_of
from models.layouts import BLIP_COPIES
from models.llm_checkpoint import HEAD, LLM, OPT_WORDS, PROJECTIONS, T5_WORDS, TABLES
from models.llm_config import BAICHUAN, VICUNA, LlamaConfig, LlmConfig, OptConfig, T5Config
from models.write_weights import write_shards

State = dict[str, Tensor]
TRAINING = {"optimizer": {"state": {}, "param_groups": []}, "config": {"run": {}}, "scaler": {}, "epoch": 9}
TRAINED = ("query_tokens", "ln_vision", "Qformer", "llm_proj")  # what LAVIS trains in the second stage


def filled(model: nn.Module, seed: int, std: float, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a `model` on meta with random values, as tests.tiny fills them."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        tensor = nn.init.trunc_normal_(torch.empty(parameter.shape), std=std, generator=random)
        if "norm" in name.lower() and name.endswith("weight"):
            tensor += 1.0
        yield name, tensor.to(dtype)


def blip_state(config: BlipCaptionConfig | BlipVqaConfig, seed: int = 0, std: float = 0.02) -> State:
    """What salesforce/BLIP train_caption.py and train_vqa.py save: the tensors, the tied ones twice, and position ids."""
    with torch.device("meta"):
        model = generator_of(config)
    state = dict(filled(model, seed, std))
    for name, table in list(state.items()):
        if name.endswith(".position_embeddings.weight"):
            ids = torch.arange(len(table)).unsqueeze(0)  # (1, positions)
            state[name.removesuffix("position_embeddings.weight") + "position_ids"] = ids
    return state | {copy: state[source] for copy, source in BLIP_COPIES.items()}


def stage2_state(config: Blip2LlmConfig, seed: int = 0, std: float = 0.02) -> State:
    """All of BLIP-2's second stage but its language model, under LAVIS's names."""
    with torch.device("meta"):
        model = generator_of(config)
        del model.llm_model
    projection = PROJECTIONS[type(config.llm)]
    return {name.replace("llm_proj", projection): tensor for name, tensor in filled(model, seed, std)}


def without_encoder(state: Mapping[str, Tensor]) -> State:
    """What LAVIS saves when the image encoder is frozen."""
    return {name: tensor for name, tensor in state.items() if not name.startswith("visual_encoder.")}


def spilled(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The same, each mapped from a file of `folder`: of all of them the system keeps in memory what it has room for."""
    for n, (name, tensor) in enumerate(tensors):
        kept = torch.from_file(str(folder / f"{n}"), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        yield name, kept.copy_(tensor)


def llm_state(
    llm: LlmConfig, seed: int = 1, std: float = 0.02, dtype: torch.dtype = torch.float32, spill: Path | None = None
) -> State:
    """A language model under the names of its published files: with tied words twice, Vicuna without [PAD], Baichuan's
    queries, keys and values in one matrix. With a folder to `spill` to, memory need not hold it."""
    with torch.device("meta"):
        model = language_model(llm)
    tensors = filled(model, seed, std, dtype)
    state = dict(spilled(tensors, spill) if spill else tensors)
    if isinstance(llm, OptConfig):
        return state | {HEAD: state[OPT_WORDS]}
    if isinstance(llm, T5Config):
        return state | {f"{part}.embed_tokens.weight": state[T5_WORDS] for part in ("encoder", "decoder")}
    if llm.family == VICUNA:
        state |= {name: state[name][:-1].clone() for name in TABLES[LlamaConfig]}
    for n in range(llm.depth if llm.family == BAICHUAN else 0):
        stem = f"model.layers.{n}.self_attn."
        state[f"{stem}W_pack.weight"] = torch.cat([state.pop(f"{stem}{part}_proj.weight") for part in "qkv"])
    for n in range(llm.depth):
        turns = torch.arange(llm.width // llm.heads // 2, dtype=torch.float32)
        state[f"model.layers.{n}.self_attn.rotary_emb.inv_freq"] = llm.theta ** (-turns / len(turns))
    return state


def llm_settings(llm: LlmConfig) -> dict[str, Any]:
    """The config.json that is published with it."""
    if isinstance(llm, OptConfig):
        return {
            "model_type": "opt",
            "vocab_size": llm.vocab,
            "hidden_size": llm.width,
            "num_hidden_layers": llm.depth,
            "num_attention_heads": llm.heads,
            "ffn_dim": llm.ffn,
            "word_embed_proj_dim": llm.embed,
            "max_position_embeddings": llm.positions,
            "do_layer_norm_before": llm.pre_norm,
            "activation_function": "relu",
        }
    if isinstance(llm, T5Config):
        return {
            "model_type": "t5",
            "vocab_size": llm.vocab,
            "d_model": llm.width,
            "num_layers": llm.depth,
            "num_decoder_layers": llm.depth,
            "num_heads": llm.heads,
            "d_kv": llm.head_width,
            "d_ff": llm.ffn,
            "relative_attention_num_buckets": llm.buckets,
            "relative_attention_max_distance": llm.farthest,
            "layer_norm_epsilon": llm.eps,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        }
    return {
        "model_type": "baichuan" if llm.family == BAICHUAN else "llama",
        "vocab_size": llm.vocab - (llm.family == VICUNA),
        "hidden_size": llm.width,
        "num_hidden_layers": llm.depth,
        "num_attention_heads": llm.heads,
        "intermediate_size": llm.ffn,
        "max_position_embeddings": llm.positions,
        "rms_norm_eps": llm.eps,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def write_llm(folder: Path, llm: LlmConfig, state: Mapping[str, Tensor], limit: int = 5 * 10**9) -> Path:
    """A Hugging Face folder, in shards of at most `limit` bytes; tied words once, as safetensors has them."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(llm_settings(llm)))
    once = {id(tensor): name for name, tensor in list(state.items())[::-1]}
    write_shards(folder, {name: tensor for name, tensor in state.items() if once[id(tensor)] == name}, limit)
    return folder


def write(config: GenerationConfig, out: Path, seed: int, dtype: torch.dtype = torch.float32, std: float = 0.02) -> None:
    """Save a model of `config` as its authors do: BLIP in one file; of BLIP-2 what is trained, and beside it the image
    encoder, <name>_vit.pth, and the language model, the folder <name>_llm, in `dtype`."""
    if not isinstance(config, Blip2LlmConfig):
        torch.save({"model": blip_state(config, seed, std), **TRAINING}, out)
        return
    state = stage2_state(config, seed, std)
    encoder = {name.removeprefix("visual_encoder."): t for name, t in state.items() if name.startswith("visual_encoder.")}
    torch.save(encoder, out.with_name(f"{out.stem}_vit.pth"))
    torch.save({"model": without_encoder(state), **TRAINING}, out)
    del state, encoder
    with TemporaryDirectory(dir=out.parent) as folder:
        write_llm(out.with_name(f"{out.stem}_llm"), config.llm, llm_state(config.llm, seed + 1, std, dtype, Path(folder)))


def whole(config: Blip2LlmConfig, state: Mapping[str, Tensor], llm: Mapping[str, Tensor]) -> State:
    """Both in one file, as LAVIS saves a model of which all is trained."""
    prefix = PROJECTIONS[type(config.llm)].replace("_proj", "_model.")
    return {**state, **{prefix + name: tensor for name, tensor in llm.items()}}


def ours(config: Blip2LlmConfig, state: Mapping[str, Tensor], llm: Mapping[str, Tensor]) -> State:
    """The same under our names."""
    projection = PROJECTIONS[type(config.llm)]
    renamed = {name.replace(projection, "llm_proj"): tensor for name, tensor in state.items()}
    return {**renamed, **{LLM + name: tensor for name, tensor in llm.items()}}
