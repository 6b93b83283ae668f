"""training/settings.py: what may be said together, and in which range."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from models.errors import Misuse
from models.presets import PRESETS
from training.schedule import Schedule
from training.settings import Data, Generation, Lora, Model, Momentum, Optimizer, Run, Settings, Source, Task
from training.settings_check import METRICS, MODELS, NEEDED
from training.transforms import NAMED, RandAugment

COCO = Source(annotations=Path("coco.json"), images=Path("coco"))
ASKED = dataclasses.replace(COCO, kind="vqa")
STAGE1 = Settings(
    "stage1", Data((COCO,)), Model("blip2-demo", freeze_vit=False), schedule=Schedule(warmup_lr=1e-6), run=Run(epochs=1)
)
PRETRAIN = dataclasses.replace(STAGE1, task="pretrain", model=Model("blip-demo", freeze_vit=False))
STAGE2 = dataclasses.replace(STAGE1, task="stage2", model=Model("blip2-opt-125m", freeze_vit=False))


def changed(settings: Settings, part: str, **values: Any) -> Settings:
    """`settings` with other values in one part."""
    return dataclasses.replace(settings, **{part: dataclasses.replace(getattr(settings, part), **values)})


RANGES: list[tuple[str, dict[str, Any], str]] = [
    ("model", {"name": None}, "model has neither name nor config; expected one of"),
    ("model", {"config": Path("sizes.json")}, "model has name and config; expected one of"),
    ("model", {"name": "blip2-dem"}, "No model is called 'blip2-dem'. Did you mean 'blip2-demo'?"),
    (
        "model",
        {"name": "blip-demo"},
        "model.name is blip-demo, which stage1 does not train; expected one of blip2-stage1-vit-g, blip2-stage1-vit-l, ",
    ),
    ("model", {"freeze_vit": True}, "nothing gives the image encoder its weights; expected model.checkpoint"),
    ("model", {"freeze_qformer": True}, "task is stage1; expected stage2 or caption, with model.freeze_qformer"),
    ("model", {"image_size": 0}, "model.image_size is 0; expected 1 or more"),
    ("model", {"lora": Lora()}, "task is stage1; expected stage2 or caption, with model.lora"),
    ("model", {"momentum": Momentum()}, "task is stage1; expected pretrain or retrieval, with model.momentum"),
    ("model", {"prompt": "a photo of"}, "task is stage1; expected stage2 or caption, with model.prompt"),
    ("model", {"trailing_newline": True}, "task is stage1; expected stage2 or caption, with model.trailing_newline"),
    (
        "model",
        {"llm_checkpoint": Path("opt")},
        "model.name is blip2-demo; expected a model of BLIP-2's second stage, with model.llm_",
    ),
    ("model", {"image_size": 100}, "model.image_size is 100; expected a multiple of 8, the side of a patch"),
    (
        "data",
        {"train": (COCO, ASKED)},
        "data.train.1.kind is vqa; expected karpathy, flickr8k or shards, captions, for the task stage1",
    ),
    ("data", {"train": ()}, "data.train is empty; expected a list of sources"),
    ("data", {"train": (COCO, Source())}, "data.train.1.annotations is null; expected a value, for the kind karpathy"),
    ("data", {"train": (dataclasses.replace(COCO, weight=0.0),)}, "data.train.0.weight is 0.0; expected a number above 0"),
    (
        "data",
        {"train": (dataclasses.replace(COCO, samples=3),)},
        "data.train.0.samples is 3; expected null, for the kind karpathy",
    ),
    ("data", {"train": (Source("shards"),)}, "data.train.0.shards is null; expected a value"),
    (
        "data",
        {"train": (Source("shards", shards="a.tar", weight=2.0),)},
        "data.train.0.weight is 2.0; expected 1.0, for the kind shards",
    ),
    (
        "data",
        {"train": (Source("shards", shards="a.tar", per_picture=True),)},
        "data.train.0.per_picture is true; expected false, for the kind shards",
    ),
    (
        "data",
        {"train": (Source("shards", shards="a.tar"),), "together": 2},
        "data.together is 2; expected 1, with a source of the kind shards",
    ),
    ("data", {"validation": Source("shards", shards="a.tar", samples=2)}, "data.validation.kind is shards; expected karpathy"),
    ("data", {"crop_scale": (0.5, 1.5)}, "data.crop_scale is [0.5, 1.5]; expected two shares"),
    ("data", {"crop_scale": (0.9, 0.5)}, "data.crop_scale is [0.9, 0.5]; expected two shares"),
    ("data", {"flip": 1.5}, "data.flip is 1.5; expected a number from 0 to 1"),
    ("data", {"shift": -1}, "data.shift is -1; expected 0 or more"),
    ("data", {"together": 5}, "run.batchsize is 32; expected a multiple of data.together, 5"),
    ("data", {"together": 0}, "data.together is 0; expected 1 or more"),
    ("data", {"easy_steps": 100}, "data.easy is 0; expected the number of easy pictures"),
    ("data", {"max_length": 2}, "data.max_length is 2; expected 3 or more"),
    ("data", {"prefetch": 5}, "data.prefetch is 5; expected 1 to 4"),
    ("data", {"validation": dataclasses.replace(COCO, weight=2.0)}, "data.validation.weight is 2.0; expected 1.0"),
    (
        "data",
        {"validation": dataclasses.replace(COCO, transform="blip_image_train")},
        "data.validation.transform is blip_image_train; expected null",
    ),
    ("data", {"train": (dataclasses.replace(ASKED, split="val"),)}, "data.train.0.split is val; expected null, for the kind vqa"),
    (
        "run",
        {"generation": Generation(num_beams=3)},
        "run.generation.num_beams is 3; expected null, for stage1, which writes no texts",
    ),
    ("data", {"workers": 0}, "data.workers is 0; expected 1 or more"),
    ("optimizer", {"betas": (0.9, 1.0)}, "optimizer.betas.1 is 1.0; expected a number from 0 to below 1"),
    ("optimizer", {"eps": 0.0}, "optimizer.eps is 0.0; expected a number above 0"),
    ("optimizer", {"weight_decay": -0.1}, "optimizer.weight_decay is -0.1; expected 0 or more"),
    ("optimizer", {"clip": 0.0}, "optimizer.clip is 0.0; expected a number above 0"),
    ("optimizer", {"accumulate": 0}, "optimizer.accumulate is 0; expected 1 or more"),
    ("schedule", {"lr": 0.0}, "schedule.lr is 0.0; expected a number above 0"),
    ("schedule", {"lr": float("nan")}, "schedule.lr is nan; expected a number above 0"),
    ("schedule", {"min_lr": 1e-3}, "schedule.min_lr is 0.001; expected a number from 0 to schedule.lr, 0.0001"),
    ("schedule", {"warmup_steps": -1}, "schedule.warmup_steps is -1; expected 0 or more"),
    ("schedule", {"kind": "blip", "warmup_steps": 10}, "schedule.warmup_steps is 10; expected 0: blip has no warm-up"),
    ("schedule", {"kind": "cosine"}, "schedule.warmup_lr is 1e-06; expected 0: cosine does not use it"),
    ("schedule", {"kind": "lavis-step"}, "schedule.decay_rate is null; expected a number above 0, to 1, for lavis-step"),
    ("schedule", {"decay_rate": 0.9}, "schedule.decay_rate is 0.9; expected null: lavis does not use it"),
    ("run", {"epochs": None}, "run.epochs is null and run.steps is null; expected one of them"),
    ("run", {"steps": 5}, "run.epochs is 1 and run.steps is 5; expected one of them"),
    ("run", {"epochs": 0}, "run.epochs is 0; expected 1 or more"),
    ("run", {"batchsize": 0}, "run.batchsize is 0; expected 1 or more"),
    ("run", {"loss_scale": 1024.0}, "run.loss_scale is 1024.0; expected null, with bf16"),
    ("run", {"ema": 1.0}, "run.ema is 1.0; expected a number from 0 to below 1"),
    ("run", {"seed": 2**63}, "run.seed is 9223372036854775808; expected a number from 0"),
    ("run", {"keep": 0}, "run.keep is 0; expected 1 or more"),
    ("run", {"validate": "recall"}, "data.validation is null; expected a source, with run.validate: recall"),
    ("run", {"validate": "vqa"}, "run.validate is vqa; expected recall or none, for stage1"),
    (
        "run",
        {"generation": Generation(min_length=40, max_length=30)},
        "run.generation.max_length is 30; expected min_length, 40, or more",
    ),
    ("run", {"generation": Generation(num_beams=0)}, "run.generation.num_beams is 0; expected 1 or more"),
    ("run", {"cache_features": True}, "model.freeze_vit is false; expected true, with run.cache_features"),
]


@pytest.mark.parametrize(("part", "values", "said"), RANGES, ids=[said[:50] for _, _, said in RANGES])
def test_out_of_range(part: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(Misuse) as caught:
        changed(STAGE1, part, **values)
    assert said in caught.value.message
    assert caught.value.message.count("\n") == 0


def test_lora_and_momentum_have_ranges() -> None:
    with pytest.raises(Misuse, match=r"model\.lora\.rank is 0; expected 1 or more"):
        changed(STAGE2, "model", lora=Lora(rank=0))
    with pytest.raises(Misuse, match=r"model\.lora\.dropout is 1\.0; expected a number from 0 to below 1"):
        changed(STAGE2, "model", lora=Lora(dropout=1.0))
    with pytest.raises(Misuse, match=r"model\.momentum\.queue is 0; expected 1 or more"):
        changed(PRETRAIN, "model", momentum=Momentum(queue=0))
    with pytest.raises(Misuse, match=r"model\.momentum\.ramp_epochs is -1; expected 0 or more"):
        changed(PRETRAIN, "model", momentum=Momentum(ramp_epochs=-1))
    assert changed(STAGE2, "model", lora=Lora()).model.lora == Lora(16, 32.0, 0.05)


def test_what_a_model_does_not_have_is_not_left_out_in_silence() -> None:
    caption = Settings("caption", STAGE1.data, Model("blip-caption-demo", freeze_vit=False), run=Run(epochs=1))
    for values in ({"lora": Lora()}, {"freeze_qformer": True}, {"llm_checkpoint": Path("opt")}):
        with pytest.raises(Misuse, match="is blip-caption-demo; expected a model of BLIP-2's second stage, with model"):
            changed(caption, "model", **values)
    retrieval = dataclasses.replace(STAGE1, task="retrieval")
    with pytest.raises(Misuse, match="is blip2-demo; expected a model of BLIP, with model"):
        changed(retrieval, "model", momentum=Momentum())
    assert changed(retrieval, "model", name="blip-demo", momentum=Momentum()).model.momentum
    with pytest.raises(Misuse, match="is karpathy; expected vqa, questions with answers, for the task vqa"):
        Settings("vqa", STAGE1.data, Model("blip-vqa-base", freeze_vit=False), run=Run(epochs=1))


def test_kept_features_need_the_same_pictures() -> None:
    frozen = changed(STAGE1, "model", freeze_vit=True, vit_checkpoint=Path("eva.pth"))
    still = changed(frozen, "data", crop_scale=None, flip=0.0)
    assert changed(still, "run", cache_features=True).run.cache_features
    moved = (
        {"crop_scale": (0.5, 1.0)},
        {"flip": 0.5},
        {"shift": 1},
        {"rand_augment": RandAugment()},
        {"train": (dataclasses.replace(COCO, transform="blip_image_train"),)},
    )
    for values in moved:
        with pytest.raises(Misuse, match="pictures are changed at random; expected the same features in each epoch"):
            changed(changed(still, "data", **values), "run", cache_features=True)


def test_what_is_measured() -> None:
    assert STAGE1.metric == "none"
    measured = changed(STAGE1, "data", validation=COCO)
    assert measured.metric == "recall"
    assert changed(measured, "run", validate="none").metric == "none"
    data = dataclasses.replace(STAGE2.data, validation=dataclasses.replace(COCO, kind="vqa"))
    asked = dataclasses.replace(STAGE2, data=data, run=dataclasses.replace(STAGE2.run, validate="vqa"))
    assert (asked.metric, asked.best) == ("vqa", "accuracy")


def test_what_the_best_is_chosen_by() -> None:
    recall = changed(STAGE1, "data", validation=COCO)
    captions = changed(STAGE2, "data", validation=COCO)
    assert (recall.best, captions.best, STAGE1.best) == ("r_mean", "agg", "")
    assert changed(recall, "run", best="txt_r_mean").best == "txt_r_mean"
    with pytest.raises(Misuse, match=r"run\.best is CIDer; did you mean CIDEr\? caption gives agg, CIDEr, Bleu_1"):
        changed(captions, "run", best="CIDer")
    with pytest.raises(Misuse, match=r"run\.best is agg; did you mean .*\? recall gives r_mean"):
        changed(recall, "run", best="agg")


def test_what_would_do_nothing_is_refused() -> None:
    with pytest.raises(Misuse, match=r"run\.itm_after is 5; expected 0, for stage2, which has no matching loss"):
        changed(STAGE2, "run", itm_after=5)
    for settings in (STAGE1, STAGE2):
        with pytest.raises(Misuse, match=r"model\.name is .*; expected a model of BLIP, with parallel\.negatives: own"):
            changed(settings, "parallel", negatives="own")
    assert changed(PRETRAIN, "parallel", negatives="own").parallel.negatives == "own"
    t5 = dataclasses.replace(STAGE2, model=Model("blip2-flan-t5-xl", freeze_vit=False))
    with pytest.raises(Misuse, match=r"run\.checkpointing is true; expected false: FlanT5"):
        changed(t5, "run", checkpointing=True)


@pytest.mark.parametrize(("settings", "kind"), [(STAGE1, "vqa"), (STAGE2, "vqa")])
def test_what_it_is_measured_on(settings: Settings, kind: Any) -> None:
    with pytest.raises(Misuse, match=f"data.validation.kind is {kind}; expected karpathy"):
        changed(settings, "data", validation=dataclasses.replace(COCO, kind=kind))


def test_every_task_has_models_and_metrics() -> None:
    assert set(get_args(Task)) == set(MODELS) == set(METRICS)
    for task in get_args(Task):
        assert any(isinstance(config, MODELS[task]) for config in PRESETS.values())


def test_names_are_those_of_the_code_that_reads_them() -> None:
    hints = get_type_hints(Source)
    assert set(get_args(hints["kind"])) == set(NEEDED)
    assert set(get_args(get_args(hints["transform"])[0])) == set(NAMED)


@pytest.mark.parametrize("kind", [Settings, Model, Data, Source, Optimizer, Run, Lora, Momentum])
def test_parts_cannot_be_changed(kind: type) -> None:
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
