"""What each reference system writes its texts with: the defaults of `--as`, in one table.

A length counts one of three things:
    IDS        what the original's input_ids hold: BLIP's prompt, [DEC] before it, or the one id that OPT, LLaMA and T5 begin
               with; and the new words. It is transformers' own max_length and min_length.
    NEW        the new words alone: transformers' max_new_tokens.
    POSITIONS  queries, prompt and new words: mindformers' seq_length.
With the rule "transformers" both lengths count the new words, whatever the row says.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.config import Blip2LlmConfig, Config
from models.errors import Misuse
from models.llm_config import BAICHUAN, LLAMA, OPT, T5, VICUNA
from preprocess.annotations import is_text
from runtime.decoding import ORIGINAL, ORIGINAL_BLIP, TRANSFORMERS, Decoding, check
from runtime.outputs import CAPTION, LAVIS, MINDFORMERS, VQA

BLIP, PADDLEMIX = "blip", "paddlemix"
AS = (BLIP, LAVIS, PADDLEMIX, MINDFORMERS)
IDS, NEW, POSITIONS = "ids", "new", "positions"
COUNTED = {IDS: "the ids before the new words and these", NEW: "the new words", POSITIONS: "queries, prompt and new words"}
PLACE = "{}"  # where a template takes the question
MED = "med"  # BLIP's own decoder, beside the families of language models

SHORT = "Question: {} Short answer:"
DECODERS = (OPT, LLAMA, BAICHUAN)


@dataclass(frozen=True)
class Defaults:
    """One system with one kind of model in one task."""

    prompt: str  # in VQA a template
    num_beams: int
    max_length: int
    min_length: int
    max_counts: str = IDS
    min_counts: str = IDS
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    rule: str = ORIGINAL
    clean_prompt: bool = False  # the whole prompt as a caption is cleaned
    echo_prompt: bool = False  # texts begin with the prompt
    # With do_sample alone. transformers draws from the 50 likeliest words unless told otherwise, and BLIP and LAVIS do not tell.
    top_k: int = 50
    top_p: float = 0.9
    sampled_penalty: float | None = None  # repetition_penalty then; None: the same


# BLIP: salesforce/BLIP configs/caption_coco.yaml and configs/nocaps.yaml (20, 5, 3 beams, the prompt), models/blip.py
# (nucleus sampling: 0.9, 1.1), models/blip_vqa.py (3 beams, 10, 1). LAVIS has the same in projects/blip/eval; its task of
# captions hands BLIP penalties that BLIP's `generate` does not take, so there is nothing else to follow.
_BLIP_CAPTION = Defaults("a picture of ", 3, 20, 5, rule=ORIGINAL_BLIP, sampled_penalty=1.1)
_BLIP_VQA = Defaults(PLACE, 3, 10, 1, rule=ORIGINAL_BLIP)
# mindformers: configs/blip2/*_image_to_text_generation.yaml and the scripts of its model card: 32 queries and 32 tokens of
# text, no beams. Its text generator returns the prompt with the text. Where it prepares data, CaptionTransform cleans the
# prompt together with the caption; its pipeline hands the prompt on as it is, which is clean_prompt False.
_MINDFORMERS = Defaults("a picture of", 1, 64, 0, POSITIONS, NEW, clean_prompt=True, echo_prompt=True, top_k=0, top_p=1.0)
TABLE: dict[tuple[str, str, tuple[str, ...]], Defaults] = {
    (BLIP, CAPTION, (MED,)): _BLIP_CAPTION,
    (BLIP, VQA, (MED,)): _BLIP_VQA,
    (LAVIS, CAPTION, (MED,)): _BLIP_CAPTION,
    (LAVIS, VQA, (MED,)): _BLIP_VQA,
    # LAVIS with BLIP-2: projects/blip2/eval (5 beams, 30, 8; 10, 1; the template), tasks/captioning.py (penalties 1.15 and 0),
    # `predict_answers` of models/blip2_models/blip2_{opt,t5,vicuna_instruct}.py (penalties; T5's and all answers are limited
    # by max_new_tokens, Vicuna's by max_length). Vicuna's captions: the defaults of its `generate`, and the prompt of
    # configs/models/blip2/blip2_instruct_vicuna7b.yaml. LAVIS has no plain LLaMA and no Baichuan: they are taken as OPT.
    (LAVIS, CAPTION, DECODERS): Defaults("a photo of", 5, 30, 8, length_penalty=0.0, repetition_penalty=1.15),
    (LAVIS, CAPTION, (T5,)): Defaults("a photo of", 5, 30, 8, NEW, length_penalty=0.0, repetition_penalty=1.15),
    (LAVIS, CAPTION, (VICUNA,)): Defaults("", 5, 256, 1, repetition_penalty=1.5),
    (LAVIS, VQA, DECODERS): Defaults(SHORT, 5, 10, 1, NEW, length_penalty=0.0),
    (LAVIS, VQA, (T5,)): Defaults(SHORT, 5, 10, 1, NEW, length_penalty=-1.0),
    (LAVIS, VQA, (VICUNA,)): Defaults(SHORT, 5, 10, 1, length_penalty=0.0, repetition_penalty=1.5),
    # PaddleMIX: models/blip2/modeling.py asks for 5 beams and for decode_strategy "greedy_search", which goes before.
    # PaddleNLP's lengths count the new words. Its template is part of the weights' processor: LAVIS's is taken.
    (PADDLEMIX, CAPTION, (OPT, LLAMA, T5)): Defaults("a photo of ", 1, 30, 8, NEW, NEW, top_k=0),
    (PADDLEMIX, VQA, (OPT, LLAMA, T5)): Defaults(SHORT, 1, 10, 1, NEW, NEW, length_penalty=0.0, top_k=0),
    (MINDFORMERS, CAPTION, (LLAMA, BAICHUAN, VICUNA)): _MINDFORMERS,
    # It has no task of questions: they are prompts of its generator, whose echo no official score of answers would take.
    (MINDFORMERS, VQA, (LLAMA, BAICHUAN, VICUNA)): dataclasses.replace(
        _MINDFORMERS, prompt="Question: {} Answer:", echo_prompt=False
    ),
}

# What may be asked for: the fields of Decoding, and these.
TEXTUAL = ("prompt", "clean_prompt", "echo_prompt")
OPTIONS = (*TEXTUAL, *(field.name for field in dataclasses.fields(Decoding)))
SAMPLED = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}  # what has no effect without do_sample, and its value then
SEARCHED = {"length_penalty": 1.0, "early_stopping": False}  # what has none without beams


@dataclass(frozen=True)
class Settings:
    """How texts are written: a row of the table, and what was asked for instead."""

    preset: str
    prompt: str
    clean_prompt: bool
    echo_prompt: bool
    max_counts: str
    min_counts: str
    decoding: Decoding  # its lengths as asked for

    def after(self, before: int) -> Decoding:
        """The lengths as `runtime.decode.generate` counts them, where `before` ids count ahead of the new words."""
        longest, shortest = self.decoding.max_length, self.decoding.min_length
        return dataclasses.replace(
            self.decoding,
            max_length=longest + (before if self.max_counts == NEW else 0),
            min_length=shortest + (before if self.min_counts == NEW else 0),
        )

    def content(self) -> dict[str, Any]:
        """As a manifest keeps it."""
        named = {"as": self.preset, "prompt": self.prompt, "clean_prompt": self.clean_prompt, "echo_prompt": self.echo_prompt}
        counts = {"max_length_counts": self.max_counts, "min_length_counts": self.min_counts}
        return named | dataclasses.asdict(self.decoding) | counts


def family_of(config: Config) -> str:
    """Which models of the table `config` belongs to, when it is of one that writes."""
    return config.llm.family if isinstance(config, Blip2LlmConfig) else MED


def settings_for(config: Config, task: str, preset: str | None, asked: Mapping[str, Any]) -> Settings:
    """What `preset` (None: blip for BLIP, lavis for BLIP-2) writes texts with, and `asked` in the place of its own.

    Raises Misuse for an unknown preset or option, for a preset without such a model, and for a value that cannot be.
    """
    preset, row = _row(config, task, preset)
    if unknown := [name for name in asked if name not in OPTIONS]:
        near = difflib.get_close_matches(unknown[0], OPTIONS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise Misuse(f"There is no option {unknown[0]!r}.{hint} Known options: {', '.join(OPTIONS)}.")
    _check_texts(task, asked)
    sampled = bool(asked.get("do_sample", False))
    values = {
        "num_beams": 1 if sampled else row.num_beams,
        "max_length": row.max_length,
        "min_length": row.min_length,
        "length_penalty": row.length_penalty,
        "repetition_penalty": row.sampled_penalty if sampled and row.sampled_penalty else row.repetition_penalty,
        "rule": row.rule,
        **({"top_k": row.top_k, "top_p": row.top_p} if sampled else {}),
        **{name: value for name, value in asked.items() if name not in TEXTUAL},
    }
    if values["rule"] == ORIGINAL:
        values["rule"] = row.rule
    decoding = Decoding(**values)
    check(decoding)
    idle = [name for name, none in SAMPLED.items() if not sampled and asked.get(name, none) != none]
    if idle:
        raise Misuse(f"{idle[0]} is {asked[idle[0]]}, but it is read with do_sample alone. Ask for do_sample, or leave it out.")
    idle = [name for name, none in SEARCHED.items() if decoding.num_beams == 1 and asked.get(name, none) != none]
    if idle:
        raise Misuse(f"{idle[0]} is {asked[idle[0]]}, but it is read with num_beams above 1 alone. Leave it out.")
    new = decoding.rule == TRANSFORMERS
    return Settings(
        preset,
        asked.get("prompt", row.prompt),
        asked.get("clean_prompt", row.clean_prompt),
        asked.get("echo_prompt", row.echo_prompt),
        NEW if new else row.max_counts,
        NEW if new else row.min_counts,
        decoding,
    )


def _row(config: Config, task: str, preset: str | None) -> tuple[str, Defaults]:
    family = family_of(config)
    preset = preset or (BLIP if family == MED else LAVIS)
    if preset not in AS:
        raise Misuse(f"There is no preset {preset!r:.60}; known presets: {', '.join(AS)}.")
    rows = {name: row for (name, of, families), row in TABLE.items() if of == task and family in families}
    if preset not in rows:
        model = "BLIP" if family == MED else f"BLIP-2 with {family}"
        raise Misuse(f"{preset} has no {model}; presets of this model: {', '.join(rows)}.")
    return preset, rows[preset]


def _check_texts(task: str, asked: Mapping[str, Any]) -> None:
    prompt = asked.get("prompt", PLACE)
    if not isinstance(prompt, str) or not is_text(prompt):
        raise Misuse(f"prompt is {prompt!r:.60}; expected a text.")
    if task == VQA and prompt.count(PLACE) != 1:
        raise Misuse(f"The template {prompt!r:.60} must hold one {PLACE}, where the question goes: {SHORT!r}.")
    for name in ("clean_prompt", "echo_prompt"):
        if not isinstance(asked.get(name, False), bool):
            raise Misuse(f"{name} is {asked[name]!r:.60}; expected True or False.")
