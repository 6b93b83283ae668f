"""training/presets: the published recipes give the published numbers, and the demo's are those that trained it."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.presets import preset as sizes
from training.schedule import Length, learning_rate
from training.settings import Momentum
from training.settings_file import ALIASES, FOLDER, presets, read_settings

ROOT = Path(__file__).parent.parent
# Of each: task, model, pictures in a batch, epochs, and the learning rate at (epoch, step) of epochs of 6,000 steps.
PUBLISHED = {
    "lavis-stage1": (
        "stage1",
        "blip2-stage1-vit-g",
        100,
        10,
        {(0, 0): 1e-6, (0, 2500): 5.05e-5, (0, 5500): 1e-4, (5, 9): 5.5e-5},
    ),
    "lavis-stage2-opt-2.7b": ("stage2", "blip2-opt-2.7b", 64, 10, {(0, 1000): 5.05e-5, (0, 2000): 1e-4, (5, 0): 5.5e-5}),
    "lavis-stage2-vicuna-7b": ("stage2", "blip2-vicuna-7b", 64, 10, {(0, 1000): 5.05e-5, (5, 0): 5.5e-5}),
    "lavis-caption-coco": ("caption", "blip2-opt-2.7b-coco", 16, 5, {(0, 0): 1e-8, (0, 500): 5.005e-6, (4, 7): 9.549150e-7}),
    "lavis-retrieval-coco": ("retrieval", "blip2-retrieval-coco", 14, 5, {(0, 500): 5.005e-6, (1, 0): 9.045085e-6}),
    "blip-pretrain": ("pretrain", "blip-pretrained-base", 75, 20, {(0, 0): 1e-6, (0, 3000): 3e-4, (2, 0): 2.43e-4}),
    "blip-retrieval-coco": ("retrieval", "blip-retrieval-base-coco", 32, 6, {(0, 0): 1e-5, (3, 11): 5e-6, (2, 0): 7.5e-6}),
    "blip-retrieval-flickr": ("retrieval", "blip-retrieval-base-flickr", 32, 6, {(0, 0): 1e-5, (3, 11): 5e-6}),
    "blip-caption-coco": ("caption", "blip-caption-base", 32, 5, {(0, 0): 1e-5, (1, 0): 9.045085e-6}),
    "blip-vqa": ("vqa", "blip-vqa-base", 16, 10, {(0, 0): 2e-5, (5, 0): 1e-5}),
    "mindformers-stage1": ("stage1", "blip2-stage1-vit-g", 80, 10, {(0, 1): 1.02e-6, (0, 4999): 1.0098e-4, (0, 5000): 1e-4}),
    "mindformers-stage2-llama-7b": ("stage2", "blip2-llama-7b", 24, 1, {(0, 0): 1e-6, (0, 2000): 1e-4, (0, 4000): 7.5e-5}),
    "mindformers-stage2-llama-7b-910b": ("stage2", "blip2-llama-7b", 64, 1, {(0, 2000): 1e-4, (0, 4000): 7.5e-5}),
    "mindformers-stage2-baichuan-7b": ("stage2", "blip2-baichuan-7b", 16, 1, {(0, 2000): 1e-4, (0, 4000): 5.5e-5}),
    "paddlemix-stage1": ("stage1", "blip2-stage1-vit-g", 256, 10, {(0, 0): 1e-6, (0, 2500): 5.05e-5, (5, 0): 5.5e-5}),
    "paddlemix-stage2": ("stage2", "blip2-opt-2.7b", 32, 10, {(0, 1000): 5.05e-5, (1, 0): 9.779754e-5, (5, 0): 5.5e-5}),
    "paddlemix-lora-sft": ("caption", "blip2-opt-2.7b", 32, 10, {(0, 0): 1e-3, (5, 0): 5.05e-4}),
}
DEMO = ("demo-caption", "demo-pretrain", "demo-stage1", "demo-stage2")


def test_all_are_in_the_tables() -> None:
    assert presets() == sorted([*PUBLISHED, *DEMO])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    task, model, batchsize, epochs, rates = PUBLISHED[name]
    found = read_settings(name)
    assert found.task == task
    assert found.model.name is not None
    assert sizes(found.model.name) == sizes(model)
    assert (found.run.batchsize, found.run.epochs, found.run.seed) == (batchsize, epochs, 42)
    assert found.optimizer.weight_decay == 0.05
    assert found.optimizer.clip is None
    length = Length(6000, 6000 * epochs)
    for place, rate in rates.items():
        assert learning_rate(found.schedule, length, *place) == pytest.approx(rate, rel=1e-6), place


def test_what_sets_the_systems_apart() -> None:
    betas = {"lavis": (0.9, 0.999), "blip": (0.9, 0.999), "mindformers": (0.9, 0.98), "paddlemix": (0.9, 0.999)}
    for name in PUBLISHED:
        wanted = (0.9, 0.95) if name == "paddlemix-lora-sft" else betas[name.partition("-")[0]]
        assert read_settings(name).optimizer.betas == wanted, name
    assert [read_settings(name).run.loss_scale for name in ("mindformers-stage1", "lavis-stage1")] == [1024, None]
    assert [read_settings(name).parallel.negatives for name in ("blip-retrieval-coco", "blip-retrieval-flickr")] == ["all", "own"]
    assert read_settings("blip-pretrain").data.crop_scale == (0.2, 1.0)
    assert read_settings("blip-pretrain").model.momentum == Momentum(0.995, 57_600, 0.4, 2)
    assert read_settings("blip-retrieval-coco").model.momentum == Momentum(0.995, 57_600, 0.4, 1)
    assert read_settings("lavis-caption-coco").model.prompt == "a photo of"
    assert [source.transform for source in read_settings("lavis-stage1").data.train] == ["blip2_image_train", "blip_image_train"]
    assert [read_settings(name).model.freeze_vit for name in ("lavis-stage2-opt-2.7b", "lavis-caption-coco")] == [True, False]
    lora = read_settings("paddlemix-lora-sft").model.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.dropout) == (16, 32, 0.05)


def test_names_of_others() -> None:
    for alias, name in ALIASES.items():
        assert read_settings(alias) == read_settings(name)
    assert read_settings("run_blip2_stage1_vit_g_qformer_pretrain").run.save_every == 7084
    assert not set(ALIASES) & set(presets())


def test_each_says_where_it_is_from() -> None:
    sources = {
        "lavis": "salesforce/LAVIS",
        "blip": "salesforce/BLIP",
        "mindformers": "mindformers r1.0",
        "paddlemix": "PaddleMIX",
    }
    for name in PUBLISHED:
        comment = "".join(line for line in (FOLDER / f"{name}.yaml").read_text("utf-8").splitlines(True) if line.startswith("#"))
        assert sources[name.partition("-")[0]] in comment or "publishes no such file" in comment, name
        assert ".yaml" in comment or ".json" in comment or ".py" in comment, name


def test_they_are_packaged() -> None:
    assert 'training = ["presets/*.yaml"]' in (ROOT / "pyproject.toml").read_text("utf-8").splitlines()
    assert {path.suffix for path in FOLDER.iterdir()} == {".yaml"}
