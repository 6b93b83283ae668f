"""What settings may say: ranges, and values that contradict each other. Imports no torch."""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Literal

from models.config import Blip2Config, Blip2LlmConfig, BlipCaptionConfig, BlipConfig, BlipVqaConfig, Config
from models.errors import Misuse
from models.llm_config import T5Config
from models.presets import PRESETS, preset
from training.schedule import WITH_DECAY, WITHOUT_START, WITHOUT_WARMUP, Schedule

if TYPE_CHECKING:  # training.settings imports this file: what is made is checked
    from training.settings import Data, Optimizer, Settings, Source

MODELS: dict[str, tuple[type, ...]] = {  # what a task trains
    "pretrain": (BlipConfig,),
    "stage1": (Blip2Config,),
    "stage2": (Blip2LlmConfig,),
    "caption": (BlipCaptionConfig, Blip2LlmConfig),
    "retrieval": (BlipConfig, Blip2Config),
    "vqa": (BlipVqaConfig,),
}
METRICS: dict[
    str, tuple[Literal["recall", "caption", "vqa"], ...]
] = {  # what a task can be measured by; the first is taken when nothing is said
    "pretrain": ("recall",),
    "stage1": ("recall",),
    "stage2": ("caption", "vqa"),
    "caption": ("caption",),
    "retrieval": ("recall",),
    "vqa": ("vqa",),
}
RECALLS = tuple(f"{way}_r{k}" for way in ("txt", "img") for k in (1, 5, 10))
BEST: dict[str, tuple[str, ...]] = {  # the figures of each metric; the best state is chosen by the first when nothing is said
    "recall": ("r_mean", "txt_r_mean", "img_r_mean", *RECALLS, *(f"itc_{name}" for name in RECALLS)),
    "caption": ("agg", "CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L"),
    "vqa": ("accuracy",),
    "none": ("",),
}
KINDS = {"recall": ("karpathy", "flickr8k"), "caption": ("karpathy", "flickr8k"), "vqa": ("vqa",)}  # of data.validation
SEEDS = 2**63  # as many as PyTorch takes


def check(settings: Settings) -> None:
    """Raises Misuse with the key, what was found and what was expected."""
    _check_model(settings)
    _check_data(settings.data, settings.run.batchsize)
    _check_texts(settings)
    _check_optimizer(settings.optimizer, settings.schedule)
    _check_run(settings)


def _expect(ok: bool, key: str, found: object, expected: str) -> None:
    if not ok:
        raise Misuse(f"{key} is {_yaml(found)}; expected {expected}.")


def _yaml(value: object) -> object:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else value


def _share(key: str, value: float) -> None:
    _expect(0 <= value <= 1, key, value, "a number from 0 to 1")


def _below_one(key: str, value: float | None) -> None:
    _expect(value is None or 0 <= value < 1, key, value, "a number from 0 to below 1")


def _above(key: str, value: float | None) -> None:
    _expect(value is None or 0 < value < math.inf, key, value, "a number above 0")


def _least(key: str, value: int | None, least: int) -> None:
    _expect(value is None or value >= least, key, value, f"{least} or more")


def _check_model(settings: Settings) -> None:
    model, task = settings.model, settings.task
    given = [key for key in ("name", "config") if getattr(model, key) is not None]
    if len(given) != 1:
        raise Misuse(f"model has {' and '.join(given) or 'neither name nor config'}; expected one of name and config, the sizes.")
    sizes = None if model.name is None else preset(model.name)  # those of model.config are read when a training begins
    if sizes is not None and not isinstance(sizes, MODELS[task]):
        fitting = ", ".join(name for name, config in PRESETS.items() if isinstance(config, MODELS[task]))
        raise Misuse(f"model.name is {model.name}, which {task} does not train; expected one of {fitting}.")
    if model.freeze_vit and model.checkpoint is None and model.vit_checkpoint is None:
        raise Misuse(
            "model.freeze_vit is true, but nothing gives the image encoder its weights; expected model.checkpoint, "
            "model.vit_checkpoint, or freeze_vit: false."
        )
    _least("model.image_size", model.image_size, 1)
    if model.bert_checkpoint is not None:
        _expect(task != "stage2", "task", task, "one whose words BERT reads, with model.bert_checkpoint")
        _expect(model.checkpoint is None, "model.checkpoint", model.checkpoint, "null, with model.bert_checkpoint: it holds BERT")
    _below_one("model.dropout", model.dropout)
    _below_one("model.drop_path", model.drop_path)
    _expect(not (model.drop_path and model.freeze_vit), "model.drop_path", model.drop_path, "0, with model.freeze_vit")
    if model.freeze_qformer:
        _expect(task in ("stage2", "caption"), "task", task, "stage2 or caption, with model.freeze_qformer")
    if model.lora is not None:
        _expect(task in ("stage2", "caption"), "task", task, "stage2 or caption, with model.lora")
        _least("model.lora.rank", model.lora.rank, 1)
        _above("model.lora.alpha", model.lora.alpha)
        _below_one("model.lora.dropout", model.lora.dropout)
    if model.momentum is not None:
        _expect(task in ("pretrain", "retrieval"), "task", task, "pretrain or retrieval, with model.momentum")
        _below_one("model.momentum.decay", model.momentum.decay)
        _least("model.momentum.queue", model.momentum.queue, 1)
        _share("model.momentum.alpha", model.momentum.alpha)
        _expect(0 <= model.momentum.ramp_epochs < math.inf, "model.momentum.ramp_epochs", model.momentum.ramp_epochs, "0 or more")
    if model.prompt or model.trailing_newline:
        key = "model.prompt" if model.prompt else "model.trailing_newline"
        _expect(task in ("stage2", "caption"), "task", task, f"stage2 or caption, with {key}")
    if sizes is not None:
        check_parts(settings, sizes)


OF_STAGE2 = ("lora", "freeze_qformer", "llm_checkpoint")  # what other models than those of BLIP-2's second stage would leave out


def check_parts(settings: Settings, sizes: Config) -> None:
    """What is asked of parts that a model of these sizes does not have would be left out in silence."""
    model = settings.model
    key, named = ("model.config", model.config) if model.config else ("model.name", model.name)
    for part in OF_STAGE2:
        fits = not getattr(model, part) or isinstance(sizes, Blip2LlmConfig)
        _expect(fits, key, named, f"a model of BLIP-2's second stage, with model.{part}")
    if isinstance(sizes, Blip2LlmConfig) and isinstance(sizes.llm, T5Config):
        _expect(not settings.run.checkpointing, "run.checkpointing", True, "false: FlanT5's language model is not reached by it")
    own = settings.parallel.negatives == "own" and not isinstance(sizes, BlipConfig)
    _expect(not own, key, named, "a model of BLIP, with parallel.negatives: own")
    follows = model.momentum is None or isinstance(sizes, BlipConfig)
    _expect(follows, key, named, "a model of BLIP, with model.momentum")
    patch = sizes.vision.patch
    whole = model.image_size is None or model.image_size % patch == 0
    _expect(whole, "model.image_size", model.image_size, f"a multiple of {patch}, the side of a patch")


def _check_data(data: Data, batchsize: int) -> None:
    _expect(len(data.train) > 0, "data.train", "empty", "a list of sources")
    for number, source in enumerate(data.train):
        _check_source(f"data.train.{number}", source)
    if data.validation is not None:
        _check_source("data.validation", data.validation)
        _expect(data.validation.kind != "shards", "data.validation.kind", "shards", "karpathy, flickr8k or vqa")
        _expect(data.validation.weight == 1, "data.validation.weight", data.validation.weight, "1.0: each sample counts once")
        changed = data.validation.transform
        _expect(changed is None, "data.validation.transform", changed, "null: pictures are measured as they are")
    if data.crop_scale is not None:
        low, high = data.crop_scale
        _expect(0 < low <= high <= 1, "data.crop_scale", list(data.crop_scale), "two shares above 0, the smaller first, to 1")
    _share("data.flip", data.flip)
    for key in ("shift", "easy", "easy_steps"):
        _least(f"data.{key}", getattr(data, key), 0)
    for key in ("together", "max_words", "workers"):
        _least(f"data.{key}", getattr(data, key), 1)
    _expect(1 <= data.prefetch <= 4, "data.prefetch", data.prefetch, "1 to 4")
    _least("data.max_length", data.max_length, 3)  # [CLS], a token and [SEP]
    _expect(batchsize % data.together == 0, "run.batchsize", batchsize, f"a multiple of data.together, {data.together}")
    if any(source.kind == "shards" for source in data.train):
        for name, least in ORDERED.items():
            value = getattr(data, name)
            _expect(value == least, f"data.{name}", value, f"{least}, with a source of the kind shards")
    _expect(data.easy > 0 or data.easy_steps == 0, "data.easy", data.easy, "the number of easy pictures, with data.easy_steps")


def _check_texts(settings: Settings) -> None:
    """Questions would be learned as captions, and captions have no answers."""
    asked = settings.task == "vqa"
    wanted = "vqa, questions with answers" if asked else "karpathy, flickr8k or shards, captions"
    for number, source in enumerate(settings.data.train):
        fits = (source.kind == "vqa") == asked
        _expect(fits, f"data.train.{number}.kind", source.kind, f"{wanted}, for the task {settings.task}")


NEEDED = {  # of each kind of source
    "karpathy": ("annotations", "images"),
    "flickr8k": ("annotations", "images"),
    "vqa": ("annotations", "images"),
    "shards": ("shards",),
}
OPTIONAL = {"vqa": ("questions",), "shards": ("samples",)}
NOT_OF: dict[str, dict[str, object]] = {  # with what is meant by leaving it out; shards have no list, and are read alone
    "vqa": {"split": None, "per_picture": False},
    "shards": {"split": None, "per_picture": False, "weight": 1.0},
}
ORDERED = {"together": 1, "easy": 0, "easy_steps": 0}  # what says in which order samples in files come


def _check_source(key: str, source: Source) -> None:
    for name in NEEDED[source.kind]:
        _expect(getattr(source, name) is not None, f"{key}.{name}", None, f"a value, for the kind {source.kind}")
    allowed = (*NEEDED[source.kind], *OPTIONAL.get(source.kind, ()))
    for name in ("annotations", "images", "questions", "shards", "samples"):
        unused = getattr(source, name) is None or name in allowed
        _expect(unused, f"{key}.{name}", getattr(source, name), f"null, for the kind {source.kind}")
    for name, usual in NOT_OF.get(source.kind, {}).items():
        value = getattr(source, name)
        _expect(value == usual, f"{key}.{name}", value, f"{_yaml(usual)}, for the kind {source.kind}")
    _least(f"{key}.samples", source.samples, 1)
    _above(f"{key}.weight", source.weight)


def _check_optimizer(optimizer: Optimizer, schedule: Schedule) -> None:
    for number, beta in enumerate(optimizer.betas):
        _below_one(f"optimizer.betas.{number}", beta)
    _above("optimizer.eps", optimizer.eps)
    _expect(0 <= optimizer.weight_decay < math.inf, "optimizer.weight_decay", optimizer.weight_decay, "0 or more")
    _above("optimizer.clip", optimizer.clip)
    _least("optimizer.accumulate", optimizer.accumulate, 1)
    kind = schedule.kind
    _above("schedule.lr", schedule.lr)
    for key in ("min_lr", "warmup_lr"):
        value = getattr(schedule, key)
        _expect(0 <= value <= schedule.lr, f"schedule.{key}", value, f"a number from 0 to schedule.lr, {schedule.lr:g}")
    _least("schedule.warmup_steps", schedule.warmup_steps, 0)
    if kind in WITHOUT_WARMUP:
        _expect(schedule.warmup_steps == 0, "schedule.warmup_steps", schedule.warmup_steps, f"0: {kind} has no warm-up")
    if kind in WITHOUT_START:
        _expect(schedule.warmup_lr == 0, "schedule.warmup_lr", schedule.warmup_lr, f"0: {kind} does not use it")
    if kind in WITH_DECAY:
        rate = schedule.decay_rate
        _expect(rate is not None and 0 < rate <= 1, "schedule.decay_rate", rate, f"a number above 0, to 1, for {kind}")
    else:
        _expect(schedule.decay_rate is None, "schedule.decay_rate", schedule.decay_rate, f"null: {kind} does not use it")


def _check_run(settings: Settings) -> None:
    run, model, data = settings.run, settings.model, settings.data
    if (run.epochs is None) == (run.steps is None):
        found = f"run.epochs is {run.epochs or 'null'} and run.steps is {run.steps or 'null'}"
        raise Misuse(f"{found}; expected one of them, and null as the other.")
    for key in ("epochs", "steps", "batchsize", "eval_batchsize", "save_every", "keep", "validate_every", "log_every"):
        _least(f"run.{key}", getattr(run, key), 1)
    _least("run.itm_after", run.itm_after, 0)
    matching = settings.task in ("pretrain", "stage1", "retrieval")
    _expect(matching or not run.itm_after, "run.itm_after", run.itm_after, f"0, for {settings.task}, which has no matching loss")
    _above("run.loss_scale", run.loss_scale)
    _expect(run.loss_scale is None or run.precision == "fp16", "run.loss_scale", run.loss_scale, f"null, with {run.precision}")
    _below_one("run.ema", run.ema)
    _expect(0 <= run.seed < SEEDS, "run.seed", run.seed, "a number from 0 to 2^63 - 1")
    if run.validate not in (None, "none"):
        fitting = METRICS[settings.task]
        _expect(run.validate in fitting, "run.validate", run.validate, f"{' or '.join(fitting)} or none, for {settings.task}")
        _expect(data.validation is not None, "data.validation", None, f"a source, with run.validate: {run.validate}")
    _check_validation(settings)
    least, most = run.generation.min_length, run.generation.max_length
    _least("run.generation.num_beams", run.generation.num_beams, 1)
    _least("run.generation.min_length", least, 0)
    _least("run.generation.max_length", most, 1)
    _expect(most is None or most >= (least or 0), "run.generation.max_length", most, f"min_length, {least}, or more")
    _above("run.generation.repetition_penalty", run.generation.repetition_penalty)
    for key in ("num_beams", "max_length", "min_length", "length_penalty", "repetition_penalty"):
        value = getattr(run.generation, key)
        _expect(
            value is None or not matching, f"run.generation.{key}", value, f"null, for {settings.task}, which writes no texts"
        )
    if run.cache_features:
        _expect(settings.task in ("stage1", "stage2"), "task", settings.task, "stage1 or stage2, with run.cache_features")
        _expect(model.freeze_vit, "model.freeze_vit", model.freeze_vit, "true, with run.cache_features")
        for number, source in enumerate(data.train):
            in_files = source.kind != "shards"
            _expect(in_files, f"data.train.{number}.kind", source.kind, "pictures in files, with run.cache_features")
        changed = data.crop_scale is not None or data.flip > 0 or data.shift > 0 or data.rand_augment is not None
        changed = changed or any(source.transform not in (None, "blip_image_eval") for source in data.train)
        if changed:
            raise Misuse(
                "run.cache_features is true, but pictures are changed at random; expected the same features in each epoch: "
                "crop_scale: null, flip: 0, shift: 0, rand_augment: null and sources without a transform, in data."
            )


def _check_validation(settings: Settings) -> None:
    metric, best, source = settings.metric, settings.run.best, settings.data.validation
    if metric == "none" or source is None:
        return
    fitting = " or ".join(KINDS[metric])
    _expect(source.kind in KINDS[metric], "data.validation.kind", source.kind, f"{fitting}, which {metric} is measured on")
    if best is not None and best not in BEST[metric]:
        near = difflib.get_close_matches(best, BEST[metric], n=1, cutoff=0.0)[0]
        known = ", ".join(BEST[metric])
        raise Misuse(f"run.best is {best}; did you mean {near}? {metric} gives {known}.")
