"""The language model of BLIP-2's second stage: out of a Hugging Face folder of its own, or out of the checkpoint.

Its tensors bear the names of transformers' OPTForCausalLM, LlamaForCausalLM (Vicuna's too) and T5ForConditionalGeneration, or
of Baichuan-7B's own code, under `llm_model.`. Copies of the word embeddings are left out once they are seen to be copies, and
so is what follows from the sizes. Numbers stay in the precision they are stored in (models/stored.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from models.config import Blip2LlmConfig
from models.errors import Misuse, UserError
from models.layouts import HUGGINGFACE, MINDSPORE, WORDS, Source, has, is_blip2, known_as, without_copies
from models.llm_config import BAICHUAN, VICUNA, LlamaConfig, LlmConfig, OptConfig, T5Config
from models.llm_settings import Settings, check_settings, refuse_lookalikes, settings_of
from models.stored import HALVES
from models.weights_file import is_plain, listed, read_weights, renamed

LLM = "llm_model."  # begins our names of the language model's tensors
LAYERS = {  # what only the names of one kind begin with
    OptConfig: re.compile(r"(model\.)?decoder\.layers\.\d"),
    LlamaConfig: re.compile(r"model\.layers\.\d"),
    T5Config: re.compile(r"(encoder|decoder)\.block\.\d"),
}
PROJECTIONS: dict[type[LlmConfig], str] = {OptConfig: "opt_proj", LlamaConfig: "llm_proj", T5Config: "t5_proj"}  # LAVIS's names
OPT_WORDS, LLAMA_WORDS, T5_WORDS = "model.decoder.embed_tokens.weight", "model.embed_tokens.weight", "shared.weight"
HEAD = "lm_head.weight"
COPIES: dict[type[LlmConfig], dict[str, str]] = {
    OptConfig: {HEAD: OPT_WORDS},
    LlamaConfig: {},
    T5Config: {"encoder.embed_tokens.weight": T5_WORDS, "decoder.embed_tokens.weight": T5_WORDS},
}
TABLES: dict[type[LlmConfig], tuple[str, ...]] = {  # a row for every word
    OptConfig: (OPT_WORDS,),
    LlamaConfig: (LLAMA_WORDS, HEAD),
    T5Config: (T5_WORDS, HEAD),
}
# What no result depends on: pattern from the start of a name -> what it is.
UNUSED = {
    r"(.*\.)?rotary_emb\.inv_freq$": "wavelengths of rotated positions, which the sizes give",
    r"(model\.)?decoder\.version$": "version numbers",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$": "biases that T5 does not use",
}
# The same of what LAVIS saves of a model that it does not train: its filter knows parameters, not what repeats them.
LEAKED = {
    r"lm_head\.weight$|(encoder|decoder)\.embed_tokens\.weight$": "tied copies of the language model's words",
    **UNUSED,
}
PACKED = re.compile(r"(.*\.self_attn)\.W_pack\.weight$")  # queries, keys and values, Baichuan's
THIRDS = re.compile(r"\.self_attn\.[qkv]_proj\.weight$")
# Later versions of transformers added a placeholder for pictures to the words and padded them to a multiple of this
# (huggingface/transformers, issue 34109).
ROUNDED = 64
ROWS = 4096  # that are widened at once

Tensors = dict[str, Tensor]


def open_stage2(
    source: Source, config: Blip2LlmConfig, llm_checkpoint: Path | None, needed: bool = True
) -> tuple[Source, list[Source]]:
    """A checkpoint of the second stage, its language model in order, and a second source where that lies in one of its own.

    Raises UserError when the checkpoint is of the first stage or of InstructBLIP, when the language model is `needed` and
    neither held nor given, or is damaged or not built here; Misuse when there are two.
    """
    if not is_blip2(source.tensors):
        return source, []  # what it lacks is said with all the rest
    _refuse_others(source, config.llm)
    inner = {name.removeprefix(LLM): tensor for name, tensor in source.tensors.items() if name.startswith(LLM)}
    if kind_of(inner):
        if llm_checkpoint:
            raise Misuse(f"{source.path} already holds a language model. Leave --llm-checkpoint out.")
        settings = settings_of(source.path, "text_config")
        return _in_order(source, inner, config.llm, settings, resized=source.layout == HUGGINGFACE), []
    leaked = Counter(what for name in inner if (what := known_as(name, LEAKED)))
    kept = {n: t for n, t in source.tensors.items() if not (n.startswith(LLM) and known_as(n.removeprefix(LLM), LEAKED))}
    source = replace(source, tensors=kept, left=Counter(source.left) + leaked)
    if llm_checkpoint:
        return source, [open_language_model(llm_checkpoint, config.llm)]
    if not needed:
        return source, []
    raise UserError(
        f"{source.path} holds no language model: LAVIS publishes the weights that it trained without it. Add --llm-checkpoint "
        f"with the Hugging Face folder of {_called(config.llm)}."
    )


def open_language_model(path: Path, llm: LlmConfig) -> Source:
    """The tensors of a folder, or a file, that holds a language model alone. Raises UserError when it cannot be read, or
    holds none of the kinds that are known here."""
    weights = read_weights(path)
    if not kind_of(weights.tensors):
        held = listed(list(dict.fromkeys(name.split(".")[0] for name in [*weights.tensors, *weights.beside])))
        raise UserError(
            f"{path} holds no language model of a known kind (OPT, LLaMA, Baichuan-7B, FlanT5). It holds {held or 'nothing'}. "
            f"Give --llm-checkpoint the Hugging Face folder of {_called(llm)}."
        )
    source = Source(path, weights, HUGGINGFACE, {}, lambda name: name.removeprefix(LLM), {}, (), part=LLM)
    settings = settings_of(path)
    if settings is None:
        note = f"{path} has no config.json: what no tensor shows, such as epsilons and heads, is taken to be as configured"
        source = replace(source, notes=(note,))
    return _in_order(source, weights.tensors, llm, settings)


def check_config_json(source: Source, llm: LlmConfig) -> None:
    """Raises UserError when the config.json beside a language model, of a BLIP-2 or its own, is of another one than `llm`."""
    within = not source.part
    if settings := settings_of(source.path, "text_config" if within else None):
        check_settings(settings, llm, of_blip2=within)


def kind_of(names: Iterable[str]) -> type[LlmConfig] | None:
    """Whose layers have such names, without a prefix."""
    names = [name for name in names if not known_as(name, UNUSED)]
    return next((kind for kind, pattern in LAYERS.items() if any(pattern.match(name) for name in names)), None)


def shown_kind(source: Source) -> type[LlmConfig] | None:
    """Which language model a source holds, or was trained for as far as LAVIS's names say so."""
    inner = {name.removeprefix(LLM): tensor for name, tensor in source.tensors.items() if name.startswith(LLM)}
    projection = source.spell("llm_proj.weight").split(".")[0] if has(source.tensors, "llm_proj") else ""
    # llm_proj may be anyone's: it is our name too.
    named = next((kind for kind, name in PROJECTIONS.items() if projection == name != "llm_proj"), None)
    return kind_of(inner) or named


def refuse_mindformers(source: Source) -> None:
    """Raises UserError when `source`, of the second stage, is mindformers'."""
    if source.layout == MINDSPORE:
        raise UserError(
            f"{source.path} is a checkpoint of mindformers, of which only the first stage is read. Give one of the second stage "
            "in LAVIS's layout or Hugging Face's."
        )


def _refuse_others(source: Source, llm: LlmConfig) -> None:
    """What is not of the second stage, or of another one than ours."""
    refuse_mindformers(source)
    if not has(source.tensors, "llm_proj"):
        raise UserError(
            f"{source.path} has no {PROJECTIONS[type(llm)]}, the projection into the language model: it is a checkpoint of "
            "BLIP-2's first stage. Give one of the second stage, such as blip2_pretrained_opt2.7b.pth."
        )
    if has(source.tensors, WORDS.removesuffix(".weight"), "qformer.embeddings.word_embeddings"):
        raise UserError(
            f"{source.path} is a checkpoint of InstructBLIP, whose Q-Former reads the prompt beside the picture; this model's "
            "reads the picture alone. Give a checkpoint of BLIP-2's second stage."
        )


def _in_order(source: Source, inner: Tensors, llm: LlmConfig, settings: Settings | None, resized: bool = False) -> Source:
    """`source` with the tensors `inner` of a language model, named without a prefix, as our model wants them."""
    if settings is not None:
        refuse_lookalikes(settings)
    kind = kind_of(inner) or type(llm)
    left = Counter(what for name in inner if (what := known_as(name, UNUSED)))
    inner = {name: tensor for name, tensor in inner.items() if not known_as(name, UNUSED)}
    older = kind is OptConfig and any(name.startswith("decoder.") for name in inner)
    if older:
        inner = renamed(inner, lambda name: f"model.{name}" if name.startswith("decoder.") else name, source.path)
    inner, copies = without_copies(inner, source.path, COPIES[kind])
    packed = any(PACKED.match(name) for name in inner)
    if packed:
        inner = _unpacked(inner, source.path)
    notes = source.notes
    if kind is type(llm):
        if kind is T5Config and HEAD not in inner and T5_WORDS in inner and settings is not None and settings.same_head:
            inner[HEAD] = inner[T5_WORDS]
            notes = (*notes, "the language model's head is its word embeddings")
        inner, said = _with_words(inner, llm, resized)
        notes = (*notes, *said)
    halves = dict.fromkeys(tensor.dtype for tensor in inner.values() if tensor.dtype in HALVES)
    if halves:
        called = " and ".join(str(dtype).removeprefix("torch.") for dtype in halves)
        notes = (*notes, f"the language model's numbers stay as they are stored, in {called}")
    outer = {name: tensor for name, tensor in source.tensors.items() if not name.startswith(LLM)}
    spelt = source.spell

    def spell(name: str) -> str:
        if not name.startswith(LLM):
            return spelt(name)
        bare = name.removeprefix(LLM)
        bare = bare.removeprefix("model.") if older else bare
        return spelt(LLM + (THIRDS.sub(".self_attn.W_pack.weight", bare) if packed else bare))

    tensors = outer | {LLM + name: tensor for name, tensor in inner.items()}
    return replace(source, tensors=tensors, spell=spell, left=Counter(source.left) + left + Counter(copies), notes=notes)


def _unpacked(inner: Tensors, path: Path) -> Tensors:
    """Queries, keys and values as three matrices, which stay where the one lies."""
    apart: Tensors = {}
    for name, tensor in inner.items():
        found = PACKED.match(name)
        if not found:
            apart[name] = tensor
            continue
        if tensor.dim() != 2 or len(tensor) % 3 or not is_plain(tensor):
            raise UserError(f"{path}: {listed([name])} is {tuple(tensor.shape)}, expected three equal parts. Give another copy.")
        thirds = {f"{found[1]}.{part}_proj.weight": third for part, third in zip("qkv", tensor.chunk(3), strict=True)}
        if twice := thirds.keys() & inner.keys():
            raise UserError(f"{path} holds {listed([min(twice)])} twice, once within {listed([name])}. Give another copy.")
        apart |= thirds
    return apart


def _with_words(inner: Tensors, llm: LlmConfig, resized: bool) -> tuple[Tensors, list[str]]:
    """The tables of words with as many rows as the model has words, where the difference is known; what to say about it."""
    held = {name: inner[name] for name in TABLES[type(llm)] if name in inner and is_plain(inner[name])}
    tables = {name: table for name, table in held.items() if table.dim() == 2 and len(table)}
    more = {name: len(table) - llm.vocab for name, table in tables.items()}
    short = [name for name, rows in more.items() if llm.family == VICUNA and rows == -1]
    long = [name for name, rows in more.items() if resized and 0 < rows < ROUNDED and len(tables[name]) % ROUNDED == 0]
    notes = []
    if short:
        # LAVIS adds [PAD] (models/blip2_models/blip2_vicuna_instruct.py), with rows of random numbers that it does not save.
        # As a word to read it is masked. As a word to write the average of all is never the likeliest.
        inner = inner | {name: torch.cat([tables[name], _average(tables[name])]) for name in short}
        notes.append(
            f"[PAD] has no row in {listed(short, ' and ')}: it got the average of all, which is never the likeliest word"
        )
    if long:
        inner = inner | {name: tables[name][: llm.vocab] for name in long}
        notes.append(f"the last {more[long[0]]} rows of {listed(long, ' and ')}, which are of no word, are left out")
    return inner, notes


def _average(table: Tensor) -> Tensor:
    """(V, D) to the mean row (1, D), summed in float32, a part of the table at a time."""
    total = torch.zeros(table.shape[1])
    for start in range(0, len(table), ROWS):
        total += table[start : start + ROWS].to(torch.float32).sum(dim=0)
    return (total / len(table)).to(table.dtype)[None]


def _called(llm: LlmConfig) -> str:
    """The published folder of a language model, as an example for messages."""
    if isinstance(llm, OptConfig):
        return "OPT, such as facebook/opt-2.7b"
    if isinstance(llm, T5Config):
        return "FlanT5, such as google/flan-t5-xl"
    known = {VICUNA: "Vicuna, such as lmsys/vicuna-7b-v1.1", BAICHUAN: "Baichuan-7B, baichuan-inc/Baichuan-7B"}
    return known.get(llm.family, "LLaMA, such as huggyllama/llama-7b")
