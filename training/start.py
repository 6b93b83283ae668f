"""What a training starts from: a model of random numbers, or one with the weights of a checkpoint, ready to learn."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from models import presets
from models.bert_checkpoint import PartReport, Spoken, load_bert
from models.blip import BlipPretrain
from models.blip2 import Blip2Stage1
from models.blip2_llm import Blip2Llm
from models.checkpoint import LoadReport, begin_stage2, load_generator, load_image_encoder, load_model, load_stage1
from models.config import Blip2Config, Blip2LlmConfig, BlipCaptionConfig, BlipConfig, BlipVqaConfig, Config
from models.config_file import from_file
from models.errors import Misuse
from models.fit import Generator, generator_of
from models.vit_checkpoint import load_plain_vit
from training.dropout import add_drop_path, add_dropout
from training.initial import initialise
from training.lora import add_lora
from training.pretrain import BlipFinetune
from training.settings import Model, Settings
from training.settings_check import MODELS, check_parts


def sizes_of(settings: Settings) -> Config:
    """The sizes of the model. Raises Misuse when there are none of that name, or when they are of another task's model."""
    model = settings.model
    config = from_file(model.config) if model.config else presets.preset(model.name or "")
    if not isinstance(config, MODELS[settings.task]):
        wanted = " or ".join(kind.__name__.removesuffix("Config") for kind in MODELS[settings.task])
        raise Misuse(
            f"model {model.config or model.name} has the sizes of {type(config).__name__.removesuffix('Config')}, "
            f"but task {settings.task} trains {wanted}."
        )
    check_parts(settings, config)
    if model.image_size:
        config = replace(config, vision=replace(config.vision, image_size=model.image_size))
    return config


def started(settings: Settings, config: Config) -> tuple[nn.Module, list[str]]:
    """The model of a task with what is frozen frozen, and what there is to say of its weights. All that is trained is float32
    and of its own. Raises UserError and Misuse as models/checkpoint.py does."""
    asked = settings.model
    model: BlipPretrain | BlipFinetune | Blip2Stage1 | Generator
    if isinstance(config, BlipConfig):
        model, said = _blip(asked, config, settings)
    elif isinstance(config, Blip2Config):
        model, said = _stage1(asked, config, settings.run.seed)
    else:
        model, said = _generator(asked, config, settings.run.seed)
    freeze(model, asked)
    if isinstance(model, Blip2Llm) and asked.lora:
        add_lora(model.llm_model, asked.lora.rank, asked.lora.alpha, asked.lora.dropout)
    add_dropout(model, asked.dropout)
    add_drop_path(model.visual_encoder, asked.drop_path)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float().clone()  # weights from a file are mapped, and read alone
    return model, said


def freeze(model: BlipPretrain | BlipFinetune | Blip2Stage1 | Generator, asked: Model) -> None:
    """All learns but the language model, and, where asked, image encoder and Q-Former. The norm behind BLIP-2's image encoder,
    `ln_vision`, learns with the Q-Former (LAVIS Blip2Base)."""
    model.requires_grad_(True)
    model.visual_encoder.requires_grad_(not asked.freeze_vit)
    if isinstance(model, Blip2Llm):
        model.llm_model.requires_grad_(False)
        for part in (model.Qformer, model.query_tokens, model.ln_vision):
            part.requires_grad_(not asked.freeze_qformer)
        # LoRA then is all that learns, as in PaddleMIX (paddlemix/tools/supervised_finetune.py)
        model.llm_proj.requires_grad_(not (asked.freeze_qformer and asked.lora))


def _blip(asked: Model, config: BlipConfig, settings: Settings) -> tuple[BlipPretrain | BlipFinetune, list[str]]:
    pretraining = settings.task == "pretrain"
    model = BlipPretrain(config) if pretraining else BlipFinetune(config)
    initialise(model, settings.run.seed)
    if asked.checkpoint is None:
        return model, _parts(model, asked, config)
    if pretraining:
        raise Misuse("task pretrain starts from nothing. Leave model.checkpoint out.")
    loaded, report = load_model(config, asked.checkpoint, asked.vit_checkpoint)
    model.load_state_dict(loaded.state_dict(), strict=False)
    if report.temperature is not None:
        model.temp.data.fill_(report.temperature)
    return model, report.lines()


def _stage1(asked: Model, config: Blip2Config, seed: int) -> tuple[Blip2Stage1, list[str]]:
    if asked.checkpoint:
        loaded, report = load_stage1(config, asked.checkpoint, asked.vit_checkpoint)
        return loaded, report.lines()
    model = Blip2Stage1(config)
    initialise(model, seed)
    return model, _parts(model, asked, config)


def _generator(asked: Model, config: Config, seed: int) -> tuple[Generator, list[str]]:
    assert isinstance(config, BlipCaptionConfig | BlipVqaConfig | Blip2LlmConfig)
    if asked.checkpoint is None:
        model = generator_of(config)
        initialise(model, seed)
        if isinstance(config, Blip2LlmConfig):
            _refuse_parts(asked)
            return model, []
        return model, _parts(model, asked, config)
    if isinstance(config, Blip2LlmConfig) and asked.llm_checkpoint:
        torch.manual_seed(seed)
        if begun := begin_stage2(config, asked.checkpoint, asked.vit_checkpoint, asked.llm_checkpoint):
            return begun[0], begun[1].lines()
    loaded, report = load_generator(config, asked.checkpoint, asked.vit_checkpoint, asked.llm_checkpoint, begins=True)
    return loaded, report.lines()


def _parts(model: nn.Module, asked: Model, config: Spoken) -> list[str]:
    """Fill what has a file of its own, the image encoder and BERT, and return what there is to say of it."""
    said = []
    if path := asked.vit_checkpoint:
        report: PartReport | LoadReport | None = load_plain_vit(model, config, path)
        if report is None:
            assert isinstance(model, Blip2Stage1)
            report = load_image_encoder(model, path)
        said += report.lines()
    return said + (load_bert(model, config, asked.bert_checkpoint).lines() if asked.bert_checkpoint else [])


def _refuse_parts(asked: Model) -> None:
    for key in ("vit_checkpoint", "bert_checkpoint", "llm_checkpoint"):
        if found := getattr(asked, key):
            raise Misuse(
                f"model.{key} is {found}, but model.checkpoint is null; expected the first or the second stage of BLIP-2 there, "
                "which this one goes on from."
            )
