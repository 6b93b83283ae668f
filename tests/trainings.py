"""Short trainings of tiny models: their settings, and what they leave. Shared by several test files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.config import EVA, Blip2Config, Blip2LlmConfig, BlipConfig, Config, Protocol, QformerConfig, TextConfig, VisionConfig
from models.config_file import to_dict
from models.fit import generator_of
from tests.generators import speaking, write_vocabulary
from tests.make_generator import write_llm
from tests.tiny import DEMO, fill
from training.__main__ import main
from training.fit import Fitted, fit
from training.settings_file import read_settings

# Models that find pictures and captions, by the task that makes them, with the words of demo/tokenizer.
VISION = VisionConfig(image_size=16, patch=8, width=16, depth=1, heads=2, mlp=32)
SMALL: dict[str, Config] = {
    "pretrain": BlipConfig(
        VISION, TextConfig(vocab=85, width=16, depth=1, heads=2, ffn=32, positions=35), embed=8, protocol=Protocol(k_test=4)
    ),
    "stage1": Blip2Config(
        dataclasses.replace(VISION, kind=EVA),
        QformerConfig(vocab=84, width=16, depth=2, heads=2, ffn=32, positions=35, queries=3),
        embed=8,
        protocol=Protocol(encode_token="[CLS]", k_test=4),
    ),
}


def described(folder: Path, pictures: Path, task: str, model: dict[str, Any], **more: dict[str, Any]) -> dict[str, Any]:
    """Settings of a short training, as a file has them. `pictures` is the fixture of tests/conftest.py, or a folder like it."""
    source = {"annotations": str(pictures / "train.json"), "images": str(pictures), "per_picture": True}
    if task == "vqa":
        source = {"kind": "vqa", "annotations": str(pictures / "questions.json"), "images": str(pictures)}
    return {
        "task": task,
        "model": {"freeze_vit": False, **model},
        "data": {"train": [source], "workers": 1, **more.get("data", {})},
        "optimizer": more.get("optimizer", {}),
        "schedule": {"kind": "lavis", "lr": 1e-3, "min_lr": 0.0, "warmup_lr": 1e-5, "warmup_steps": 2},
        "run": {
            "steps": 6,
            "batchsize": 4,
            "precision": "fp32",
            "save_every": 2,
            "log_every": 10,
            "out": str(folder / "out"),
            **more.get("run", {}),
        },
    }


def sizes(folder: Path, config: Any) -> str:
    """The file of a model's sizes."""
    folder.mkdir(exist_ok=True)
    file = folder / "sizes.json"
    file.write_text(json.dumps(to_dict(config)), "utf-8")
    return str(file)


def small(folder: Path, task: str) -> dict[str, Any]:
    """What names SMALL[task] in settings."""
    return {"config": sizes(folder, SMALL[task]), "tokenizer": str(DEMO / "tokenizer")}


def speaker(folder: Path, kind: str) -> dict[str, Any]:
    """What names tests.generators.speaking(kind), which writes words, in settings."""
    config = speaking(kind)
    return {"config": sizes(folder, config), "tokenizer": str(write_vocabulary(folder / "words", config))}


def stage2(folder: Path, pictures: Path, kind: str = "opt", **more: dict[str, Any]) -> dict[str, Any]:
    """A second stage upon a random first one and a random language model, of which only the Q-Former and so on learn."""
    config = speaking(kind)
    assert isinstance(config, Blip2LlmConfig)
    model = generator_of(config)
    fill(model, 3, 0.05)
    state = model.state_dict()
    write_llm(
        folder / "llm", config.llm, {n.removeprefix("llm_model."): t for n, t in state.items() if n.startswith("llm_model.")}
    )
    save_file({n: t for n, t in state.items() if not n.startswith("llm_model.")}, folder / "stage2.safetensors")
    named = speaker(folder, kind) | {
        "checkpoint": str(folder / "stage2.safetensors"),
        "llm_checkpoint": str(folder / "llm"),
        "freeze_vit": True,
        "prompt": "a",
        "trailing_newline": kind == "opt",
        **more.pop("model", {}),
    }
    return described(folder, pictures, "stage2", named, **more)


def short(folder: Path, pictures: Path, task: str, **run: Any) -> dict[str, Any]:
    """SMALL[task] from nothing, 20 steps, measured on pictures that are held out."""
    values = described(folder, pictures, task, small(folder, task))
    values["data"] |= {"crop_scale": None, "flip": 0.0, "shift": 1, "together": 5}
    values["data"]["validation"] = {"annotations": str(pictures / "test.json"), "images": str(pictures), "split": "test"}
    values["schedule"] = {"kind": "cosine", "lr": 5e-3, "min_lr": 1e-4, "warmup_steps": 2}
    values["run"] |= {"steps": 20, "batchsize": 10, "save_every": 20, "validate_every": 10, "log_every": 10} | run
    return values


def written(folder: Path, values: dict[str, Any]) -> Path:
    """The settings as a file."""
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(values), "utf-8")
    return file


def trained(folder: Path, values: dict[str, Any], *sets: str, **options: Any) -> Fitted:
    """What the settings with the changes `sets` come to, in this process."""
    return fit(read_settings(written(folder, values), sets), **options)


def call(*arguments: object) -> Result:
    """blip-train in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def logged(folder: Path, what: str) -> dict[int, dict[str, float]]:
    """The "losses" or "metrics" of a training in folder/out, by step."""
    lines = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text("utf-8").splitlines()]
    return {line["step"]: line[what] for line in lines if what in line}


def weights(fitted: Fitted) -> dict[str, Tensor]:
    """Those that a training ended with."""
    assert fitted.weights
    return load_file(fitted.weights)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """To the bit."""
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def assert_one_training(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """That the weights of two processes are those of one, but for rounding. AdamW divides by the root of a mean of squares, so
    that a gradient which rounding alone makes is a whole step of lr: where it is 0 in theory (biases of keys), weights may go
    either way."""
    assert one.keys() == two.keys()
    far = {name for name in one if float((one[name] - two[name]).abs().max()) > 1e-5}
    assert all(name.endswith(("key.bias", "qkv.bias")) for name in far), far
