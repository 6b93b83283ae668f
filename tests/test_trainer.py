"""training/trainer.py: a training, its measurement and its answers in Python are those of the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.errors import Misuse, UserError
from tests.trainings import SMALL, described, equal, logged, short, speaker, stage2, trained, weights
from training.settings import Lora, Settings
from training.settings_file import read_settings
from training.task import task_of
from training.trainer import Trainer
from training.whole import tensors_of


def files(pictures: Path, count: int = 3) -> list[Path]:
    return sorted((pictures / "train").iterdir())[:count]


def save_start(path: Path, trainer: Trainer) -> Path:
    """The weights that a training of these settings would start from, as a file."""
    model = task_of(trainer.settings).model
    save_file(tensors_of(model), path)
    return path


@pytest.mark.parametrize("task", SMALL)
def test_it_trains_measures_and_compares(tmp_path: Path, pictures: Path, task: str) -> None:
    values = short(tmp_path, pictures, task)
    trainer = Trainer(task=task, args=values)
    start = trainer.evaluate()
    fitted = trainer.train()
    command = trained(tmp_path / "other", short(tmp_path / "other", pictures, task))
    assert equal(weights(fitted), weights(command))
    metrics = logged(tmp_path, "metrics")[20]
    assert trainer.evaluate() == pytest.approx(metrics)
    assert start != trainer.evaluate()
    alike = trainer.predict(files(pictures), ["a red circle", "two blue stars"])
    assert isinstance(alike, np.ndarray)
    assert alike.shape == (3, 2)
    assert np.abs(alike).max() <= 1 + 1e-5
    other = Trainer(task, args=values, run={"out": tmp_path / "nothing"})
    assert np.array_equal(other.predict(files(pictures), ["a red circle", "two blue stars"], fitted.weights), alike)
    with pytest.raises(Misuse, match="give predict both"):
        trainer.predict(files(pictures))
    for images, texts in (([], ["a red circle"]), (files(pictures), [])):
        nothing = trainer.predict(images, texts)
        assert isinstance(nothing, np.ndarray)
        assert nothing.shape == (len(images), len(texts))
    after = trainer.evaluate()
    state = tmp_path / "out" / "step-0000020"
    first = save_start(tmp_path / "start.safetensors", trainer)
    assert trainer.evaluate(first) == start
    assert trainer.evaluate() == after  # those of the training again
    assert trainer.evaluate(state) == after


def test_it_describes_after_lora(tmp_path: Path, pictures: Path) -> None:
    values = stage2(
        tmp_path, pictures, model={"lora": {"rank": 2, "alpha": 4}}, run={"generation": {"max_length": 8, "min_length": 1}}
    )
    trainer = Trainer("stage2", args=values)
    before = trainer.predict(files(pictures))
    trainer.train()
    texts = trainer.predict([str(file) for file in files(pictures)])
    assert [type(text) for text in texts] == [str] * 3
    assert len(before) == 3
    assert trainer.predict(str(files(pictures)[0])) == texts[:1]
    assert trainer.predict(files(pictures)[0], "What is it?") == trainer.predict(files(pictures)[:1], ["What is it?"])
    state = next((tmp_path / "out").glob("step-*6"))
    assert trainer.predict(files(pictures), weights=state) == texts  # with the narrow matrices beside
    only = Trainer(
        "stage2", args=values, run={"trainable_only": True, "out": str(tmp_path / "only")}, model={"freeze_qformer": True}
    )
    only.train()
    assert only.predict(files(pictures), weights=next((tmp_path / "only").glob("step-*6"))) == only.predict(files(pictures))
    with pytest.raises(Misuse, match="expected data"):
        trainer.evaluate()


def test_lora_in_half_precision_is_asked_as_it_was_learnt(tmp_path: Path, pictures: Path) -> None:
    """Merged matrices are float32; rounded to the half precision that the others have they would be other ones."""
    values = stage2(tmp_path, pictures, model={"lora": {"rank": 2, "alpha": 4}}, run={"generation": {"max_length": 8}})
    halves = {name: tensor.half() for name, tensor in load_file(tmp_path / "llm" / "model.safetensors").items()}
    save_file(halves, tmp_path / "llm" / "model.safetensors", {"format": "pt"})
    trainer = Trainer("stage2", args=values)
    fitted = trainer.train()
    trainer.predict(files(pictures))
    assert fitted.weights
    assert trainer._task
    written, held = load_file(fitted.weights), trainer._task.model.state_dict()
    assert {tensor.dtype for name, tensor in written.items() if name.startswith("llm_model.")} == {torch.float16, torch.float32}
    assert all(torch.equal(held[name], tensor) for name, tensor in written.items())
    merged = next(tensor for name, tensor in written.items() if name.endswith("q_proj.weight") and "llm_model" in name)
    assert not torch.equal(merged.half().float(), merged)


def test_it_answers(tmp_path: Path, pictures: Path) -> None:
    trainer = Trainer("vqa", args=described(tmp_path, pictures, "vqa", speaker(tmp_path, "vqa")))
    trainer.train(max_steps=2)
    assert len(trainer.predict(files(pictures), ["What is it?"] * 3)) == 3
    for images, kind in ((3, "int"), ([None], "NoneType"), (np.zeros((3, 16, 16)), "ndarray")):
        with pytest.raises(Misuse, match=f"images holds a value of the type {kind}; expected names of picture files"):
            trainer.predict(images, ["What is it?"])  # type: ignore[arg-type]
    with pytest.raises(Misuse, match="args is of the type int; expected a file, a preset"):
        Trainer("vqa", args=3)  # type: ignore[arg-type]
    with pytest.raises(Misuse, match=r"3 pictures and 2 questions"):
        trainer.predict(files(pictures), ["What is it?"] * 2)
    captioner = Trainer("caption", args=described(tmp_path, pictures, "caption", speaker(tmp_path, "caption")))
    with pytest.raises(Misuse, match="describes pictures and answers no questions; leave texts out"):
        captioner.predict(files(pictures), ["What is it?"] * 3)


def test_what_it_is_told_may_have_any_form(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: demo-stage1\nrun: {out: there}\n", "utf-8")
    found: list[Settings] = [
        Trainer("stage1", args=given, run={"out": Path("there")}).settings
        for given in ("demo-stage1", file, {"preset": "demo-stage1"}, read_settings("demo-stage1"))
    ]
    assert found == [read_settings(file)] * 4
    assert Trainer("stage1", model="blip2-stage1-vit-g", args="demo-stage1").settings.model.name == "blip2-stage1-vit-g"
    changed = Trainer("stage2", model={"lora": {"rank": 4}}, args="demo-stage2").settings.model
    assert (changed.name, changed.lora) == ("blip2-opt-demo", Lora(rank=4))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"task": "stage2", "args": "demo-stage1"}, "args are of the task stage1; expected stage2"),
        ({"task": "stage1", "args": "demo-stage1", "run": {"batchsiz": 4}}, "batchsize"),
        ({"task": "stage1", "args": {"preset": "demo-stag1"}}, "Did you mean demo-stage1"),
        ({"task": "stage1"}, "data"),
        ({"task": "stage3", "args": "demo-stage1"}, "task is 'stage3'; expected one of pretrain, stage1, "),
        ({"task": "stage1", "args": "demo-stage1", "run.epochs": 2}, "run.epochs is one key; expected run with epochs below it"),
    ],
)
def test_misuse(given: dict[str, Any], said: str) -> None:
    with pytest.raises(Misuse, match=said):
        Trainer(**given)


def test_other_weights_are_refused(tmp_path: Path, pictures: Path) -> None:
    trainer = Trainer("pretrain", args=short(tmp_path, pictures, "pretrain"))
    save_file({"itm_head.weight": torch.zeros(2, 3)}, tmp_path / "w.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for name, said in (
        ("w", "is of another model"),
        ("text", "cannot be read as weights"),
        ("none", "cannot be read as weights"),
    ):
        with pytest.raises(UserError, match=said):
            trainer.evaluate(tmp_path / f"{name}.safetensors")
