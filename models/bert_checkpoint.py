"""BERT out of a file, for what starts from it: BLIP's text encoder and decoder, and BLIP-2's Q-Former.

A file holds BERT as Hugging Face publishes it (bert-base-uncased), or BLIP in any layout of models/layouts.py, whose text
encoder without its cross-attention is BERT. What it lacks stays as it is: cross-attention, and the words that BERT does not
know ([DEC], [ENC]), as `resize_token_embeddings` leaves them. The queries of the Q-Former begin with BERT's feed-forward
layers (salesforce/LAVIS models/blip2_models/blip2_qformer.py). BERT adds an embedding of the segment to each word; BLIP's has
none (salesforce/BLIP models/med.py), and leaves it. Of a BERT with fewer layers, such as the demo's, the last ones stay too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models.config import Blip2Config, BlipCaptionConfig, BlipConfig, BlipVqaConfig, TextConfig
from models.errors import UserError
from models.fit import check_numbers
from models.layouts import HUGGINGFACE, IDS, Source, has, known_as, open_checkpoint, without_copies
from models.llm_settings import settings_of
from models.weights_file import Weights, aligned, is_plain, listed, read_weights, renamed

Spoken = BlipConfig | BlipCaptionConfig | BlipVqaConfig | Blip2Config  # sizes of a model whose words BERT reads

READERS = ("text_encoder.", "text_decoder.bert.", "Qformer.bert.")  # begin our names of what is BERT
HEADS = ("text_decoder.cls.", "Qformer.cls.")  # and of its head over the vocabulary
BERT = "bert."  # begins the published names of all but the head
WORDS, HEAD = "embeddings.word_embeddings.weight", "cls.predictions."
COPIES = {f"{HEAD}decoder.weight": WORDS, f"{HEAD}decoder.bias": f"{HEAD}bias"}
LEFT = {  # what BERT has and BLIP has not
    r"embeddings\.token_type_embeddings\.": "embeddings of segments",
    r"pooler\.|cls\.seq_relationship\.": "tensors that tell whether sentences follow one another",
    r"embeddings\.position_ids$": IDS,
}
LAYER = re.compile(r"encoder\.layer\.(\d{1,4})\.")
SHOWN = {  # size -> the tensor and the axis that show it
    "width": (WORDS, 1),
    "positions": ("embeddings.position_embeddings.weight", 0),
    "ffn": ("encoder.layer.0.intermediate.dense.weight", 0),
}
SAID = {"heads": "num_attention_heads", "eps": "layer_norm_eps"}  # what only BERT's config.json tells


@dataclass(frozen=True)
class PartReport:
    """What a part of a model took from a file that was made for another model."""

    what: str
    path: Path
    sha256: str
    taken: int  # tensors
    ignored: Mapping[str, int]  # what it is -> how many tensors
    notes: tuple[str, ...]  # what stays random, and so on

    def lines(self) -> list[str]:
        """The report as the user reads it."""
        lines = [f"{self.what} {self.path} (sha256 {self.sha256[:12]}), {self.taken} tensors", *self.notes]
        if self.ignored:
            lines.append("ignored: " + ", ".join(f"{count} {what}" for what, count in self.ignored.items()))
        return lines


def load_bert(model: nn.Module, config: Spoken, path: Path) -> PartReport:
    """Fill what is BERT in `model`, which is made of `config`, from the file or folder `path`, in place.

    Raises UserError when it cannot be read, holds no BERT or one of other sizes, or lacks, misshapes or spoils a tensor.
    """
    source, state = _open(path), model.state_dict()
    head = has(source.tensors, HEAD[:-1])
    wanted = {name: within for name in state if (within := _within(name)) is not None}
    readers = {name: _sizes(config, name) for name in READERS if has(wanted, name[:-1])}
    for sizes in readers.values():
        _check_sizes(source, sizes, _added(config))
    depth = _depth(source)
    if not head:
        wanted = {name: within for name, within in wanted.items() if not within.startswith(HEAD)}
    wanted = {name: within for name, within in wanted.items() if not (at := LAYER.match(within)) or int(at[1]) < depth}
    found = {name: _grown(source.tensors.get(within), within, state[name]) for name, within in wanted.items()}
    fill(model, source, found, wanted)
    known = len(source.tensors[WORDS])
    new = max(sizes.vocab - known for sizes in readers.values())
    deepest = max(sizes.depth for sizes in readers.values())
    random = ["cross-attention"] + [f"{new} words"] * (new > 0) + [f"layers from {depth} on"] * (depth < deepest)
    random += ["the head over the vocabulary"] * (not head and any(has(state, name[:-1]) for name in HEADS))
    unused = [name for name in source.tensors if name not in wanted.values()]
    ignored = Counter(known_as(name, LEFT) or "other tensors" for name in unused)
    notes = (*source.notes, f"left random: {', '.join(random)}")
    return PartReport("BERT", path, source.weights.sha256(), len({*wanted.values()}), {**source.left, **ignored}, notes)


def fill(model: nn.Module, source: Source, tensors: Mapping[str, Tensor | None], names: Mapping[str, str]) -> None:
    """Write `tensors`, by our names, into `model`; `names` are those within the source. Raises UserError when one is missing,
    misshaped or holds no numbers."""
    state, wrong = model.state_dict(), []
    for name, tensor in tensors.items():
        if tensor is None:
            wrong.append(f"{source.spell(names[name])} is missing")
        elif tensor.shape != state[name].shape:
            wrong.append(f"{source.spell(names[name])} is {tuple(tensor.shape)}, expected {tuple(state[name].shape)}")
        elif not is_plain(tensor):
            wrong.append(f"{source.spell(names[name])} holds {tensor.dtype}, expected floating-point numbers")
    if wrong := list(dict.fromkeys(wrong)):  # parts of a model may take the same tensor
        raise UserError(f"{source.path} does not fit the model: {listed(wrong, '; ')}. Give a complete file of the same sizes.")
    found = {name: aligned(tensor) for name, tensor in tensors.items() if tensor is not None}
    check_numbers(source, [(names[name], tensor) for name, tensor in found.items()])
    with torch.no_grad():
        for name, tensor in found.items():
            state[name].copy_(tensor)


def _open(path: Path) -> Source:
    """BERT's tensors, by our names within a text encoder, and with those of the head under `cls.`."""
    weights = read_weights(path)
    source = _of_blip(path) if has(weights.tensors, "text_encoder") else _of_bert(path, weights)
    if WORDS not in source.tensors or source.tensors[WORDS].dim() != 2:
        held = listed(list(dict.fromkeys(name.split(".")[0] for name in [*weights.tensors, *weights.beside])))
        raise UserError(
            f"{path} holds no BERT: it has no {source.spell(WORDS)}. It holds {held or 'nothing'}. Give the folder of "
            "bert-base-uncased, or a checkpoint of BLIP that has a text encoder."
        )
    return source


def _of_blip(path: Path) -> Source:
    blip, begin = open_checkpoint(path), READERS[0]
    own = {n.removeprefix(begin): t for n, t in blip.tensors.items() if n.startswith(begin) and ".crossattention." not in n}
    note = "it is BLIP's: its text encoder is taken, without cross-attention"
    return replace(blip, tensors=own, spell=lambda name: blip.spell(begin + name), left={}, notes=(*blip.notes, note))


def _of_bert(path: Path, weights: Weights) -> Source:
    begin = BERT if has(weights.tensors, BERT[:-1]) or not has(weights.tensors, "encoder") else ""
    theirs = {_our_name(name): name for name in weights.tensors}
    tensors, left = without_copies(renamed(weights.tensors, _our_name, path), path, COPIES)
    return Source(path, weights, HUGGINGFACE, tensors, lambda name: theirs.get(name, begin + name), left, ())


def _our_name(name: str) -> str:
    """BERT's published files still have LayerNorm's old names."""
    return re.sub(r"LayerNorm\.(gamma|beta)$", _norm, name.removeprefix(BERT))


def _norm(found: re.Match[str]) -> str:
    return "LayerNorm.weight" if found[1] == "gamma" else "LayerNorm.bias"


def _within(name: str) -> str | None:
    """What a tensor of ours is called in BERT; None when BERT has none for it."""
    if begin := next((begin for begin in READERS if name.startswith(begin)), None):
        within = re.sub(r"\.(intermediate|output)_query\.", r".\1.", name.removeprefix(begin))
        return None if ".crossattention." in within else within
    begin = next((begin for begin in HEADS if name.startswith(begin)), None)
    return begin and f"cls.{name.removeprefix(begin)}"


def _grown(tensor: Tensor | None, name: str, own: Tensor) -> Tensor | None:
    """BERT's tensor `name` with as many words as the model's `own` has; of those that it lacks, own rows."""
    if tensor is None or name not in (WORDS, f"{HEAD}bias") or tensor.shape[1:] != own.shape[1:] or not is_plain(tensor):
        return tensor
    return torch.cat([aligned(tensor)[: len(own)], own[len(tensor) :]])


def _sizes(config: Spoken, reader: str) -> TextConfig:
    if isinstance(config, BlipVqaConfig) and reader == READERS[1]:
        return config.decoder
    return config.text


def _added(config: Spoken) -> int:
    """How many words a model has that BERT has not: [DEC], and BLIP's [ENC]."""
    return len({config.protocol.decode_token, config.protocol.encode_token} - {"[CLS]"})


def _depth(source: Source) -> int:
    return max((int(at[1]) for name in source.tensors if (at := LAYER.match(name))), default=-1) + 1


def _check_sizes(source: Source, sizes: TextConfig, added: int) -> None:
    """Raises UserError when the tensors, or the config.json beside them, show other sizes."""
    found: dict[str, object] = {
        size: source.tensors[name].shape[axis]
        for size, (name, axis) in SHOWN.items()
        if name in source.tensors and source.tensors[name].dim() > axis
    }
    if (depth := _depth(source)) > sizes.depth or not depth:
        found["depth"] = depth
    settings = settings_of(source.path) if source.path.is_dir() else None
    if settings and settings.values.get("model_type") == "bert":
        found |= {size: settings.values[key] for size, key in SAID.items() if key in settings.values}
    model = {size: getattr(sizes, size) for size in found}
    wrong = [f"{size}: it has {held}, the model has {model[size]}" for size, held in found.items() if held != model[size]]
    words, base = len(source.tensors[WORDS]), sizes.vocab - added
    if not base <= words <= base + 2:  # BERT's own, with [DEC], with [DEC] and [ENC]
        wrong.append(f"words: it has {words:,}, the model has {sizes.vocab:,}, {added} of them its own")
    if wrong:
        raise UserError(f"{source.path} is a BERT of other sizes: {'; '.join(wrong)}. Give one of the model's sizes.")
