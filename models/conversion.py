"""A checkpoint in one layout to the same checkpoint in another: every tensor keeps its values and its type.

What a layout has no place for is not lost. transformers has none for the temperature and the head over the vocabulary: they
lie beside, in a file of their own, which is read again on the way back. LAVIS's tied copies and position ids are left out of
the other layouts and made again. Of BLIP-2's second stage LAVIS's layout and ours may lack what was frozen, the image encoder
and the language model; transformers' has to have both. transformers norms BLIP-2's image features with an epsilon of 1e-6 where
the original has 1e-5, so its outputs differ by about 1e-5; its weights do not.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from models.config import Blip2Config, Blip2LlmConfig, BlipCaptionConfig, BlipConfig, BlipVqaConfig, Config
from models.config_file import from_dict, to_dict
from models.errors import Misuse, UserError
from models.fit import check_model, check_numbers, check_shapes, shared_out, wanted_shapes
from models.huggingface import KEYS, huggingface_config, to_huggingface
from models.layouts import (
    BLIP_COPIES,
    COPIES,
    ENCODER,
    IDS,
    OURS,
    STAGE2,
    TRAINING,
    WORDS,
    Source,
    has,
    is_blip2,
    open_checkpoint,
    with_decoder,
    with_image_encoder,
)
from models.llm_checkpoint import COPIES as LLM_COPIES
from models.llm_checkpoint import LLM, PROJECTIONS, check_config_json, open_stage2, refuse_mindformers, shown_kind
from models.llm_settings import picture_id
from models.manifest import empty, locked
from models.positions import NAMES as POSITIONS
from models.positions import side_of
from models.sizes import preset_of
from models.targets import HF, LAVIS
from models.weights_file import EXTRAS, aligned, listed
from models.write_weights import write_safetensors, write_shards, write_torch

HEAD, TEMPERATURE = "Qformer.cls", "temp"  # what only the first stage's training uses, and classification
POSITION_TABLE, POSITION_IDS = ".position_embeddings.weight", ".position_ids"
OUR_LLM = re.compile(r"^llm_(proj|model)\.")  # LAVIS calls both after the language model
ARCHITECTURES: dict[type[Config], tuple[str, str]] = {
    BlipConfig: ("BlipForImageTextRetrieval", "blip"),
    Blip2Config: ("Blip2ForImageTextRetrieval", "blip-2"),
    BlipCaptionConfig: ("BlipForConditionalGeneration", "blip"),
    BlipVqaConfig: ("BlipForQuestionAnswering", "blip"),
    Blip2LlmConfig: ("Blip2ForConditionalGeneration", "blip-2"),
}


@dataclass(frozen=True)
class Wish:
    """What is to be converted, and to what."""

    checkpoint: Path
    to: str  # one of models.targets.TARGETS
    out: Path  # a folder for HF, a file otherwise
    vit_checkpoint: Path | None = None
    config: Config | None = None  # None: the preset that has the sizes of the checkpoint
    llm_checkpoint: Path | None = None  # a folder


def convert(wish: Wish, say: Callable[[str], None]) -> None:
    """Write `wish.out`, which must not be there yet, and say what became of everything.

    Raises UserError when the checkpoint cannot be read, is incomplete, or has no form in that layout: nothing is written then.
    Raises Misuse when `wish.out` is there, or when there are two image encoders or language models.
    """
    if wish.out.exists() or wish.out.is_symlink():
        raise Misuse(f"{wish.out} is there already. Choose another --out, or remove it.")
    source = open_checkpoint(wish.checkpoint)
    config, kind = wish.config, _kind_of(source)
    if config is None and kind is Blip2LlmConfig:
        refuse_mindformers(source)
        config = _config_within(source) or preset_of(wish.checkpoint, kind, source.tensors, shown_kind(source))
    config = config or preset_of(wish.checkpoint, kind, source.tensors)
    if wish.llm_checkpoint and not isinstance(config, Blip2LlmConfig):
        raise Misuse("--llm-checkpoint is for BLIP-2's second stage; this model has no language model.")
    if isinstance(config, BlipCaptionConfig | BlipVqaConfig):
        source = with_decoder(source, wanted_shapes(config))
    if wish.to == HF:
        huggingface_config(config)  # refuses what transformers does not have
    others = list[Source]()
    if isinstance(config, Blip2LlmConfig):
        source, others = open_stage2(source, config, wish.llm_checkpoint, needed=wish.to == HF)
    sources = [*with_image_encoder(source, wish.vit_checkpoint, config, needed=wish.to == HF), *others]
    tensors, config = _complete(sources, config)
    for line in _lines(sources, tensors, wish.to):
        say(line)
    with new_path(wish.out) as part:
        if wish.to == HF:
            extras = _write_huggingface(part, tensors, config)
            if extras:
                say(f"beside it, in {EXTRAS}, what transformers has no place for: {len(extras)} tensors")
            if isinstance(config, Blip2LlmConfig) and picture_id(config.llm) is None:
                say("image_token_index is left open: set it to a word of this vocabulary that no prompt holds")
        elif wish.to == LAVIS:
            write_torch(part, _with_copies(tensors, config))
        else:
            write_safetensors(part, tensors, {"config": json.dumps(to_dict(config))})
        size = sum(file.stat().st_size for file in (part.rglob("*") if part.is_dir() else [part]))
    say(f"{wish.out} ({wish.to} layout): {len(tensors)} tensors, {size / 1e9:.2f} GB")


@contextmanager
def new_path(out: Path) -> Iterator[Path]:
    """Yield a path for a file or a folder, which becomes `out` when the block ends well; otherwise nothing is left.

    Raises Misuse when `out` is there by then, UserError when another run is writing it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.parent / f".{out.name}.part"
    beside.mkdir(exist_ok=True)
    with locked(beside, f"Another run is writing {out}; wait for it, or choose another --out."):
        try:
            empty(beside)  # of a run that was killed
            yield beside / out.name
            if out.exists():
                raise Misuse(f"{out} was made by something else meanwhile. Choose another --out, or remove it.")
            (beside / out.name).rename(out)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _kind_of(source: Source) -> type[Config]:
    """Which model the names are of. The pretraining has a decoder too and is converted as a model for retrieval."""
    if is_blip2(source.tensors):
        return Blip2LlmConfig if WORDS not in source.tensors and has(source.tensors, *STAGE2) else Blip2Config
    if not has(source.tensors, "text_decoder") or has(source.tensors, "itm_head"):
        return BlipConfig
    return BlipVqaConfig if has(source.tensors, "text_encoder") else BlipCaptionConfig


def _config_within(source: Source) -> Config | None:
    """The configuration that our file of the second stage holds: without a language model its sizes do not tell."""
    if source.layout != OURS or len(source.weights.files) > 1:
        return None
    with safe_open(source.weights.files[0], "pt") as file:
        said = (file.metadata() or {}).get("config")
    try:
        config = from_dict(json.loads(said), str(source.path)) if said else None
    except ValueError:
        return None
    return config if isinstance(config, Blip2LlmConfig) else None


def _complete(sources: list[Source], config: Config) -> tuple[dict[str, Tensor], Config]:
    """Every tensor once, checked, and the configuration for the picture size that the checkpoint is for: positions are not
    interpolated here."""
    main, asked = sources[0], config
    encoder = next((source for source in sources if source.part == ENCODER), main)
    for name in POSITIONS:
        if name in encoder.tensors and encoder.tensors[name].dim() > 1 and (side := side_of(encoder.tensors[name])):
            config = replace(config, vision=replace(config.vision, image_size=side * config.vision.patch))
    expected = wanted_shapes(config)
    frozen = (ENCODER, LLM) if isinstance(config, Blip2LlmConfig) else (ENCODER,) if isinstance(config, Blip2Config) else ()
    lacking = tuple(part for part in frozen if not any(has(source.tensors, part.removesuffix(".")) for source in sources))
    expected = {name: shape for name, shape in expected.items() if not name.startswith(lacking)}
    tensors = {name: tensor for name, tensor in main.tensors.items() if not name.endswith(POSITION_IDS)}
    for source, its_own in zip(sources, shared_out(expected, sources), strict=True):
        check_model(source, asked, its_own)
        if isinstance(config, Blip2LlmConfig) and any(name.startswith(LLM) for name in its_own):
            check_config_json(source, config.llm)
        _refuse_key_bias(source)
        check_shapes(source, config, its_own, source.tensors)
        check_numbers(source, ((name, aligned(source.tensors[name])) for name in its_own))
        tensors |= {name: source.tensors[name] for name in its_own}
    return tensors, config


def _refuse_key_bias(source: Source) -> None:
    if biases := [source.spell(name) for name in source.tensors if name.endswith(KEYS)]:
        raise UserError(
            f"{source.path}: {listed(biases)} is not zero for the keys of BLIP-2's image encoder, and no other layout has a "
            "place for that. It adds the same to all scores of a query and changes no result: set it to zero."
        )


def _lines(sources: list[Source], tensors: Mapping[str, Tensor], to: str) -> list[str]:
    """What the user is told about the checkpoint."""
    lines = [f"{source.path} ({source.layout} layout)" for source in sources]
    lines += [note for source in sources for note in source.notes]
    left = Counter[str]()
    for source in sources:
        left.update(source.left)
        left[TRAINING] += len(source.weights.beside)
        left[IDS] += sum(name.endswith(POSITION_IDS) for name in source.tensors)
    if left := +left:
        again = f" (copies and {IDS} are made again)" if to == LAVIS else ""
        lines.append("left out: " + ", ".join(f"{count} {what}" for what, count in left.items()) + again)
    if is_blip2(tensors):
        stage2 = has(tensors, "llm_proj")
        parts = {"head over the vocabulary": HEAD, "temperature": TEMPERATURE}
        parts = {"image encoder": "visual_encoder", **({"language model": LLM.removesuffix(".")} if stage2 else parts)}
        if lacking := [what for what, part in parts.items() if not has(tensors, part)]:
            lines.append(f"the checkpoint has no {', no '.join(lacking)}: neither will the new one")
    return lines


def _with_copies(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """With what LAVIS and BLIP keep besides: tied copies and position ids; LAVIS's names of the language model's tensors."""
    state = dict(tensors)
    if isinstance(config, Blip2LlmConfig):
        tied = {LLM + copy: LLM + once for copy, once in LLM_COPIES[type(config.llm)].items()}
        state |= {copy: state[once] for copy, once in tied.items() if once in state}
        family = PROJECTIONS[type(config.llm)].removesuffix("proj")
        return {OUR_LLM.sub(rf"{family}\1.", name): tensor for name, tensor in state.items()}
    for name, table in tensors.items():
        if name.endswith(POSITION_TABLE) and table.dim() == 2:
            state[name.removesuffix(POSITION_TABLE) + POSITION_IDS] = torch.arange(len(table)).unsqueeze(0)  # (1, positions)
    copies = COPIES if has(tensors, HEAD) else BLIP_COPIES if isinstance(config, BlipCaptionConfig | BlipVqaConfig) else {}
    return state | {copy: state[source] for copy, source in copies.items() if source in state}


def _write_huggingface(folder: Path, tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Write what transformers' `from_pretrained` reads, and beside it what it has no place for, which is returned."""
    theirs = to_huggingface(tensors, config)
    placed = wanted_shapes(config)
    extras = {name: tensor for name, tensor in tensors.items() if name not in placed}
    architecture, kind = ARCHITECTURES[type(config)]
    # Encoders that were saved in half precision are mixed with the rest in single: both are read as single.
    content = {"architectures": [architecture], "model_type": kind, "dtype": "float32", **huggingface_config(config)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_shards(folder, theirs)
    if extras:
        write_safetensors(folder / EXTRAS, extras, {})
    return extras
