"""training/trainer.py: a training, its measurement and its answers in Python are those of the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from demo import shapes
from models.errors import Misuse, UserError
from tests.generators import speaking, write_vocabulary
from tests.test_fit import described, equal, logged, sizes, stage2, trained, weights
from tests.test_training import SMALL, short
from training.settings import Settings
from training.settings_file import read_settings
from training.trainer import Trainer

DEMO = Path(__file__).parent.parent / "demo"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    shapes.write(folder, "train", 20, 1)
    shapes.write(folder, "test", 10, 1)
    entries = json.loads((folder / "train.json").read_text("utf-8"))
    asked = [
        {"image": e["image"], "question": "What is it?", "question_id": n, "answer": ["a dot"]} for n, e in enumerate(entries)
    ]
    (folder / "questions.json").write_text(json.dumps(asked), "utf-8")
    return folder


def files(pictures: Path, count: int = 3) -> list[Path]:
    return sorted((pictures / "train").iterdir())[:count]


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
    with pytest.raises(Misuse, match="expected data"):
        trainer.evaluate()


def test_it_answers(tmp_path: Path, pictures: Path) -> None:
    config = speaking("vqa")
    words = write_vocabulary(tmp_path / "words", config)
    trainer = Trainer(
        "vqa", args=described(tmp_path, pictures, "vqa", {"config": sizes(tmp_path, config), "tokenizer": str(words)})
    )
    trainer.train(max_steps=2)
    assert len(trainer.predict(files(pictures), ["What is it?"] * 3)) == 3
    with pytest.raises(Misuse, match=r"3 pictures and 2 questions"):
        trainer.predict(files(pictures), ["What is it?"] * 2)


def test_what_it_is_told_may_have_any_form(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: demo-stage1\nrun: {out: there}\n", "utf-8")
    found: list[Settings] = [
        Trainer("stage1", args=given, run={"out": Path("there")}).settings
        for given in ("demo-stage1", file, {"preset": "demo-stage1"}, read_settings("demo-stage1"))
    ]
    assert found == [read_settings(file)] * 4
    assert Trainer("stage1", model="blip2-stage1-vit-g", args="demo-stage1").settings.model.name == "blip2-stage1-vit-g"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"task": "stage2", "args": "demo-stage1"}, "args are of the task stage1; expected stage2"),
        ({"task": "stage1", "args": "demo-stage1", "run": {"batchsiz": 4}}, "batchsize"),
        ({"task": "stage1", "args": {"preset": "demo-stag1"}}, "Did you mean demo-stage1"),
        ({"task": "stage1"}, "data"),
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
