"""The layouts that checkpoints come in, told by the names of their tensors, and their tensors under our names.

- original: salesforce/BLIP's .pth (`visual_encoder.*`, `text_encoder.*`, `text_decoder.*`); lavis: salesforce/LAVIS's of
  BLIP-2 (`visual_encoder.*`, `Qformer.bert.*`). Our names are theirs, but for the language model (models/blip2_llm.py).
- huggingface: transformers' models of BLIP (`vision_model.*`) and of BLIP-2 (also `qformer.*`).
- mindspore: mindformers' of BLIP-2 (`qformer.bert.*`).
- ours: our names in safetensors.

The image encoder of BLIP-2 may lie in a file of its own, without a prefix, and so may its language model
(models/llm_checkpoint.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from models import huggingface, mindspore
from models.config import CLIP, Blip2Config, Blip2LlmConfig, Config
from models.errors import Misuse, UserError
from models.weights_file import Weights, is_plain, listed, read_weights, renamed

ORIGINAL, LAVIS, HUGGINGFACE, MINDSPORE, OURS = "original", "lavis", "huggingface", "mindspore", "ours"
ENCODER = "visual_encoder."  # begins our names of the image encoder's tensors
ENCODER_PREFIXES = (ENCODER, "vit.")  # of names in a file of the image encoder; the published ones have none
VIT_FILES = {False: "eva_vit_g.pth", True: "clip_vit_L.pth"}  # as LAVIS calls them; true is CLIP's
WORDS = "Qformer.bert.embeddings.word_embeddings.weight"
# A tensor of BLIP-2 that repeats another one: LAVIS keeps both.
COPIES = {
    "Qformer.cls.predictions.decoder.weight": WORDS,
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}
BLIP_WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"
BLIP_COPIES = {  # the same of BLIP's decoder
    "text_decoder.cls.predictions.decoder.weight": BLIP_WORDS,
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}
# What BLIP's pretraining has one of for the encoder and the decoder (salesforce/BLIP models/blip_pretrain.py): all but
# self-attention. In our layout it bears the encoder's name.
SHARED = re.compile(r"text_decoder\.bert\.(embeddings|encoder\.layer\.\d+\.(crossattention|intermediate|output))\.")
BLOCK = re.compile(r"visual_encoder\.(?:transformer\.res)?blocks\.(\d{1,4})\.")
END = "tensors of the image encoder's end, which BLIP-2 leaves out"
REST = "tensors of BLIP-2 beside the image encoder"
TRAINING, IDS = "records of the training run", "position ids"
# What only a checkpoint of the second stage has: by our names, Hugging Face's, mindformers'.
STAGE2 = ("llm_proj", "llm_model", "language_projection", "language_model", "llama_proj", "llama_model")
LAVIS_LLM = re.compile(r"(opt|t5)_(proj|model)\.")  # how LAVIS begins these names for two families
# Attention that knows relative positions: another image encoder than BLIP-2's (salesforce/LAVIS models/eva_vit.py).
RELATIVE = re.compile(r"visual_encoder\.(blocks\.\d+\.attn\.)?(rope\.|rel_pos_bias\.|relative_position_bias_table$)")
# All tables: pattern from the start of our name -> what it is.
# What a file of BLIP-2 may hold and no result depends on: no layout keeps it.
UNUSED = {
    r"visual_encoder\.(norm|fc_norm|head|lm_head|ln_post)\.|visual_encoder\.proj$": END,
    r"visual_encoder\.mask_token$": "mask tokens of the image encoder's pretraining",
    r"(adam_m|adam_v|moments|moment1|moment2|accu_grads)\.": TRAINING,
    r"(beta[12]_power|global_step|learning_rate|scale_sense|loss_scale|epoch_num|step_num|"
    r"current_iterator_step|last_overflow_iterator_step)$": TRAINING,
}
# What inference leaves out besides; a conversion keeps it.
IGNORED = {
    r"(visual_encoder|text_encoder|text_decoder|vision_proj|text_proj)_m\.": "momentum copies",
    r"(image|text|idx|ptr)_queue$|queue_ptr$": "training queues",
    rf"visual_encoder\.blocks\.\d+{re.escape(huggingface.KEYS)}$": "key biases, which change no result",
    r".*\.position_ids$": IDS,
    r"(optimizer|config|epoch|scaler)$": TRAINING,
}
IGNORED_BY_RETRIEVAL = {r"text_decoder\.": "text decoder", r"Qformer\.cls\.": "head over the vocabulary", **IGNORED}
IGNORED_BY_CAPTIONS = {
    r"text_encoder\.": "text encoder",
    r"(vision_proj|text_proj|itm_head)\.|temp$": "heads of retrieval",
    **IGNORED,
}


@dataclass(frozen=True)
class Source:
    """A file or a folder of weights, its tensors under our names."""

    path: Path
    weights: Weights
    layout: str
    tensors: dict[str, Tensor]
    spell: Callable[[str], str]  # our name of a tensor to the one in the file
    left: Mapping[str, int]  # what was dropped -> how many tensors
    notes: tuple[str, ...]  # what else there is to say
    part: str = ""  # begins the names of what is expected of it, when there are others for the rest


def is_blip2(names: Iterable[str]) -> bool:
    """Whether names, of any layout, are BLIP-2's."""
    return any(name.startswith(("Qformer.", "qformer.")) for name in names)


def has(names: Iterable[str], *parts: str) -> bool:
    """Whether there is a tensor called, or under, one of `parts`."""
    return any(name == part or name.startswith(f"{part}.") for name in names for part in parts)


def known_as(name: str, table: Mapping[str, str]) -> str | None:
    """What a tensor is by one of the tables, None when it is not there."""
    return next((what for pattern, what in table.items() if re.match(pattern, name)), None)


def open_checkpoint(path: Path) -> Source:
    """The tensors of a checkpoint. Raises UserError when it cannot be read, is of another image encoder, or holds two tensors
    that should be equal and are not."""
    weights = read_weights(path)
    names = weights.tensors.keys()
    blip2 = is_blip2(names)
    tensors, notes = weights.tensors, tuple[str, ...]()
    spell: Callable[[str], str] = str
    if has(names, "vision_model", "qformer.encoder") and not has(names, "visual_encoder"):
        layout = HUGGINGFACE
        tensors = huggingface.from_huggingface(tensors, path, blip2)

        def spell(name: str) -> str:
            return huggingface.to_their_name(name, blip2)
    elif has(names, "qformer.bert"):
        layout, spell = MINDSPORE, mindspore.to_their_name
        tensors, notes = mindspore.from_mindspore(tensors, path)
    else:
        layout = OURS if weights.safe else LAVIS if blip2 else ORIGINAL
        if family := next((found[1] for name in names if blip2 and (found := LAVIS_LLM.match(name))), ""):
            tensors = renamed(tensors, lambda name: LAVIS_LLM.sub(r"llm_\2.", name), path)

            def spell(name: str) -> str:
                return re.sub(r"^llm_(?=(proj|model)\.)", f"{family}_", name)

    if (temperature := tensors.get("temp")) is not None and is_plain(temperature) and temperature.numel() == 1:
        tensors = tensors | {"temp": temperature.reshape(())}  # MindSpore saves (1,)
    if not blip2:
        return Source(path, weights, layout, tensors, spell, {}, notes)
    used, left = _without_unused(tensors, path, spell)
    used, copies = without_copies(used, path, COPIES)
    return Source(path, weights, layout, used, spell, left | copies, notes)


def open_image_encoder(path: Path, config: Blip2Config | Blip2LlmConfig) -> Source:
    """The tensors of a file that holds BLIP-2's image encoder, LAVIS's or mindformers', without the blocks that BLIP-2 leaves
    out; of a whole BLIP-2 it alone. Raises UserError when it cannot be read, or holds none or one of another architecture."""
    weights = read_weights(path)
    prefix = next((prefix for prefix in ENCODER_PREFIXES if any(name.startswith(prefix) for name in weights.tensors)), "")

    def name_of(name: str) -> str:
        return ENCODER + name.removeprefix(prefix) if name.startswith(prefix) else name

    def spell(name: str) -> str:
        return prefix + (mindspore.to_their_name(name) if foreign else name).removeprefix(ENCODER)

    tensors, notes = renamed(weights.tensors, name_of, path), tuple[str, ...]()
    foreign = f"{ENCODER}cls_tokens" in tensors
    if foreign:
        tensors, notes = mindspore.from_mindspore(tensors, path)
    if not has(tensors, f"{ENCODER}cls_token", f"{ENCODER}class_embedding"):
        held = listed(list(dict.fromkeys(name.split(".")[0] for name in [*weights.tensors, *weights.beside])))
        raise UserError(
            f"{path} holds no image encoder of BLIP-2: it has neither cls_token nor class_embedding. "
            f"It holds {held or 'nothing'}. Give --vit-checkpoint {VIT_FILES[config.vision.kind == CLIP]}."
        )
    blocks = {name: int(found[1]) for name in tensors if (found := BLOCK.match(name))}
    last = {name for name, block in blocks.items() if block >= config.vision.depth}
    rest = {name for name in tensors if not name.startswith(ENCODER)} if is_blip2(tensors) else set()
    used, left = _without_unused({name: tensor for name, tensor in tensors.items() if name not in last | rest}, path, spell)
    if last:
        left[END] = left.get(END, 0) + len(last)
    if rest:
        left[REST] = left.get(REST, 0) + len(rest)
    return Source(path, weights, MINDSPORE if foreign else LAVIS, used, spell, left, notes, part=ENCODER)


def with_decoder(source: Source, expected: Iterable[str]) -> Source:
    """A checkpoint of BLIP with every tensor of its decoder under the decoder's name, and once: what the pretraining shares
    with the encoder, and our layout keeps under that name, is the decoder's here (of a model for answers, both have it). Raises
    UserError when two tensors that should be equal are not."""
    tensors, left = without_copies(source.tensors, source.path, BLIP_COPIES)
    wanted = set(expected)
    theirs = {name: name.replace("text_decoder.bert.", "text_encoder.", 1) for name in wanted if SHARED.match(name)}
    theirs = {name: other for name, other in theirs.items() if name not in tensors and other in tensors}
    if source.layout != OURS or not has(tensors, "itm_head") or not theirs:
        return replace(source, tensors=tensors, left={**source.left, **left})
    shared = {name: tensors[other] for name, other in theirs.items()}
    own = {name: tensor for name, tensor in tensors.items() if name in wanted or name not in theirs.values()}
    note = "the decoder shares all but its self-attention and its head with the text encoder, as in the pretraining"
    return replace(
        source,
        tensors=own | shared,
        spell=lambda name: source.spell(theirs.get(name, name)),
        left={**source.left, **left},
        notes=(*source.notes, note),
    )


def with_image_encoder(source: Source, vit_checkpoint: Path | None, config: Config, needed: bool = True) -> list[Source]:
    """The checkpoint, and the file of its image encoder when there is one.

    Raises Misuse when the image encoder is in both, UserError when it is `needed` and in neither, or cannot be read, and for
    a checkpoint of BLIP-2's second stage where the first is wanted.
    """
    stage2 = is_blip2(source.tensors) and WORDS not in source.tensors and has(source.tensors, *STAGE2)
    if stage2 and isinstance(config, Blip2Config):
        raise UserError(
            f"{source.path} is a stage-2 checkpoint, which has no text branch; retrieval needs a stage-1 checkpoint, such as "
            "blip2_pretrained.pth."
        )
    within = has(source.tensors, "visual_encoder")
    if vit_checkpoint and not isinstance(config, Blip2Config | Blip2LlmConfig):
        raise Misuse(f"--vit-checkpoint is for BLIP-2: a checkpoint of BLIP holds its image encoder, as {source.path} should.")
    if vit_checkpoint and within and is_blip2(source.tensors):
        raise Misuse(f"{source.path} already holds an image encoder. Leave --vit-checkpoint out.")
    if not isinstance(config, Blip2Config | Blip2LlmConfig) or within or not is_blip2(source.tensors):
        return [source]  # what else it lacks is said with all the rest
    if vit_checkpoint:
        return [source, open_image_encoder(vit_checkpoint, config)]
    if needed:
        raise UserError(
            f"{source.path} holds no image encoder: LAVIS publishes the weights that it trained without it. "
            f"Add --vit-checkpoint {VIT_FILES[config.vision.kind == CLIP]}."
        )
    return [source]


def _without_unused(
    tensors: Mapping[str, Tensor], path: Path, spell: Callable[[str], str]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    if relative := [spell(name) for name in tensors if RELATIVE.match(name)]:
        raise UserError(
            f"{path} is of another architecture: attention in its image encoder depends on {listed(relative)}, which BLIP-2's "
            "has not. Give an image encoder of BLIP-2."
        )
    what = {name: known_as(name, UNUSED) for name in tensors}
    used = {name: tensor for name, tensor in tensors.items() if what[name] is None}
    return used, dict(Counter(kind for kind in what.values() if kind))


def without_copies(
    tensors: Mapping[str, Tensor], path: Path, copies: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Each tensor once, without those that `copies` says repeat another one, and how many were dropped. Raises UserError
    when one that should repeat another differs from it."""
    once, dropped = dict(tensors), 0
    for copy, source in copies.items():
        if copy not in once:
            continue
        repeated = once.pop(copy)
        if not same_bits(once.setdefault(source, repeated), repeated):
            raise UserError(
                f"{path}: {copy} differs from {source}, but the model uses one for both (they are tied). The file was changed "
                "after training; give the one that was published."
            )
        dropped += 1
    return once, {"tied copies": dropped} if dropped else {}


def same_bits(source: Tensor, copy: Tensor) -> bool:
    """Whether two tensors are the same, numbers that are none included; true when the first is not plain."""
    if not is_plain(source):
        return True  # what is wrong with it is said later
    if not is_plain(copy) or (source.shape, source.dtype) != (copy.shape, copy.dtype):
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (source, copy)))
