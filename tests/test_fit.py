"""training/fit.py and the commands over it: tiny models of every task learn, go on where they stopped, and are exported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

import export.__main__
from demo import shapes
from models import manifest
from models.config import Blip2Config, Blip2LlmConfig
from models.config_file import to_dict
from models.fit import generator_of
from models.presets import PRESETS
from tests import chain
from tests.generators import speaking, write_vocabulary
from tests.make_generator import write_llm
from tests.tiny import fill, random_stage1
from tests.two_processes import run_two
from training.__main__ import main
from training.fit import Fitted, fit
from training.settings_file import presets, read_settings

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    shapes.write(folder, "train", 24, 1)
    entries = json.loads((folder / "train.json").read_text("utf-8"))
    questions = [
        {"image": entry["image"], "question": "What is it?", "question_id": n, "answer": ["a dot", "a dot", "none"]}
        for n, entry in enumerate(entries)
    ]
    (folder / "questions.json").write_text(json.dumps(questions), "utf-8")
    return folder


def described(folder: Path, pictures: Path, task: str, model: dict[str, Any], **more: dict[str, Any]) -> dict[str, Any]:
    """Settings of a short training, as a file has them."""
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
    file = folder / "sizes.json"
    file.write_text(json.dumps(to_dict(config)), "utf-8")
    return str(file)


def stage2(folder: Path, pictures: Path, kind: str = "opt", **more: dict[str, Any]) -> dict[str, Any]:
    """A second stage upon a random first one and a random language model, of which only the Q-Former and so on learn."""
    config = speaking(kind)
    assert isinstance(config, Blip2LlmConfig)
    words = write_vocabulary(folder / "words", config)
    model = generator_of(config)
    fill(model, 3, 0.05)
    state = model.state_dict()
    write_llm(
        folder / "llm", config.llm, {n.removeprefix("llm_model."): t for n, t in state.items() if n.startswith("llm_model.")}
    )
    save_file({n: t for n, t in state.items() if not n.startswith("llm_model.")}, folder / "stage2.safetensors")
    named = {
        "config": sizes(folder, config),
        "checkpoint": str(folder / "stage2.safetensors"),
        "llm_checkpoint": str(folder / "llm"),
        "tokenizer": str(words),
        "freeze_vit": True,
        "prompt": "a",
        "trailing_newline": kind == "opt",
        **more.pop("model", {}),
    }
    return described(folder, pictures, "stage2", named, **more)


def trained(folder: Path, values: dict[str, Any], *sets: str, **options: Any) -> Fitted:
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(values), "utf-8")
    return fit(read_settings(file, sets), **options)


def logged(folder: Path, what: str) -> dict[int, dict[str, float]]:
    """By step."""
    lines = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text("utf-8").splitlines()]
    return {line["step"]: line[what] for line in lines if what in line}


def weights(fitted: Fitted) -> dict[str, Tensor]:
    assert fitted.weights
    return load_file(fitted.weights)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["opt", "llama", "t5"])
def test_the_second_stage(tmp_path: Path, pictures: Path, kind: str) -> None:
    """What is frozen stays as it was, bit for bit; the rest moves; the loss falls."""
    values = stage2(tmp_path, pictures, kind, run={"steps": 30, "save_every": 30}, data={"crop_scale": None, "flip": 0.0})
    found = weights(trained(tmp_path, values))
    before = load_file(tmp_path / "stage2.safetensors")
    assert found.keys() == before.keys()
    moved = {name for name in found if not torch.equal(found[name], before[name])}
    assert moved == {n for n in found if not n.startswith("visual_encoder.")} - unmoved(found, before)
    losses = logged(tmp_path, "losses")
    assert losses[30]["lm"] < losses[10]["lm"]


def unmoved(found: dict[str, Tensor], before: dict[str, Tensor]) -> set[str]:
    """Parts of the Q-Former that no second stage uses, such as its heads."""
    return {n for n in found if "bert" not in n and "llm" not in n and "query" not in n and "ln_vision" not in n}


def test_a_second_stage_begins_with_the_first(tmp_path: Path, pictures: Path) -> None:
    values = stage2(tmp_path, pictures)
    config = speaking("opt")
    assert isinstance(config, Blip2LlmConfig)
    first = random_stage1(Blip2Config(config.vision, replace(config.qformer, vocab=60, positions=40), embed=8))
    save_file({n: t.contiguous() for n, t in first.state_dict().items()}, tmp_path / "stage1.safetensors")
    values["model"]["checkpoint"] = str(tmp_path / "stage1.safetensors")
    found = weights(trained(tmp_path, values, "run.steps=1", "schedule.warmup_lr=0", "schedule.lr=1e-30"))
    state = first.state_dict()
    shared = [name for name in found if name in state]
    assert len(shared) > 20
    for name in shared:
        torch.testing.assert_close(found[name], state[name], atol=1e-6, rtol=0)
    assert found["llm_proj.weight"].std() > 0


def test_stopped_and_gone_on_is_undisturbed(tmp_path: Path, pictures: Path) -> None:
    """To the bit: batches, moments, hard negatives, LoRA's dropout. Two batches to a step."""
    lora = {"lora": {"rank": 2, "alpha": 4, "dropout": 0.3}}
    values = stage2(tmp_path, pictures, model=lora, optimizer={"accumulate": 2})
    once = weights(trained(tmp_path, values, f"run.out={tmp_path / 'once'}"))
    for _ in range(3):
        last = trained(tmp_path, values, f"run.out={tmp_path / 'often'}", resume=True, max_steps=2)
    assert last.step == 6
    assert equal(once, weights(last))
    other = weights(trained(tmp_path, values, f"run.out={tmp_path / 'other'}", "run.seed=7"))
    assert not equal(once, other)


def test_lora_is_merged_and_exported(tmp_path: Path, pictures: Path) -> None:
    values = stage2(tmp_path, pictures, model={"lora": {"rank": 2, "alpha": 4}})
    fitted = trained(tmp_path, values)
    assert any(name.startswith("llm_model.") for name in weights(fitted))
    options = ["--config", values["model"]["config"], "--checkpoint", fitted.weights, "--tokenizer", values["model"]["tokenizer"]]
    said = chain.done(chain.call(export.__main__.main, *options, "--graphs", "llm", "--out", tmp_path / "graphs"))
    assert "llm" in said


@pytest.mark.parametrize("kind", ["caption", "vqa"])
def test_blip_writes(tmp_path: Path, pictures: Path, kind: str) -> None:
    config = speaking(kind)
    words = write_vocabulary(tmp_path / "words", config)
    model = {"config": sizes(tmp_path, config), "tokenizer": str(words)}
    values = described(tmp_path, pictures, kind, model, run={"steps": 30, "save_every": 30})
    fitted = trained(tmp_path, values)
    losses = logged(tmp_path, "losses")
    (name,) = losses[30]
    assert losses[30][name] < losses[10][name]
    options = ["--config", model["config"], "--checkpoint", fitted.weights, "--tokenizer", words]
    chain.done(chain.call(export.__main__.main, *options, "--out", tmp_path / "graphs"))


def test_retrieval_with_momentum(tmp_path: Path, pictures: Path) -> None:
    """Also stopped and gone on: the copies and the queue come back."""
    model = {"name": "blip-demo", "momentum": {"decay": 0.9, "queue": 16, "alpha": 0.4, "ramp_epochs": 1}}
    values = described(tmp_path, pictures, "retrieval", model)
    once = weights(trained(tmp_path, values, f"run.out={tmp_path / 'once'}"))
    for _ in range(2):
        last = trained(tmp_path, values, f"run.out={tmp_path / 'twice'}", resume=True, max_steps=3)
    assert equal(once, weights(last))
    assert not any(name.startswith(("momentum", "text_decoder")) for name in once)


@pytest.mark.parametrize("name", ["blip-demo", "blip2-demo"])
def test_recall_chooses_the_best(tmp_path: Path, pictures: Path, name: str) -> None:
    """It is measured as often as asked, and its state stays though others are removed."""
    source = {"annotations": str(pictures / "train.json"), "images": str(pictures)}
    values = described(tmp_path, pictures, "retrieval", {"name": name}, data={"validation": source})
    fitted = trained(tmp_path, values, "run.validate_every=3", "run.keep=1", "run.save_every=1")
    found = {step: metrics["r_mean"] for step, metrics in logged(tmp_path, "metrics").items()}
    assert sorted(found) == [3, 6]
    best = max(found, key=lambda step: (found[step], -step))
    assert {folder.name for folder in (tmp_path / "out").glob("step-*")} == {"step-0000006", f"step-{best:07d}"}
    # Measuring changes nothing.
    other = trained(tmp_path, values, "data.validation=null", f"run.out={tmp_path / 'other'}")
    assert equal(weights(fitted), weights(other))


def test_a_language_model_in_half_precision(tmp_path: Path, pictures: Path) -> None:
    """It stays as it is stored, and what learns is float32; with checkpointing of activations nothing changes."""
    values = stage2(tmp_path, pictures)
    halves = {name: tensor.half() for name, tensor in load_file(tmp_path / "llm" / "model.safetensors").items()}
    save_file(halves, tmp_path / "llm" / "model.safetensors", {"format": "pt"})
    found = weights(trained(tmp_path, values))
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    again = trained(tmp_path, values, "run.checkpointing=true", f"run.out={tmp_path / 'again'}")
    for name, tensor in weights(again).items():
        torch.testing.assert_close(tensor, found[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", presets())
def test_every_preset_starts(tmp_path: Path, pictures: Path, name: str) -> None:
    """Two steps, in tiny sizes."""
    task = read_settings(name).task
    kind = {"stage2": "llama" if "llama" in name or "7b" in name else "opt", "vqa": "vqa", "caption": "caption"}.get(task, "")
    if name.startswith(("lavis", "paddlemix")) and task == "caption":
        kind = "opt"
    if kind in ("opt", "llama"):
        model = stage2(tmp_path, pictures, kind)["model"]
        named = {key: model[key] for key in ("config", "checkpoint", "llm_checkpoint", "tokenizer")}
    elif kind:
        config = speaking(kind)
        words = write_vocabulary(tmp_path / "words", config)
        named = {"config": sizes(tmp_path, config), "tokenizer": str(words), "checkpoint": None}
    else:
        blip2 = task == "stage1" or name.startswith("lavis")
        named = {"checkpoint": None, "tokenizer": str(ROOT / "demo" / "tokenizer")}
        named["config"] = sizes(tmp_path, PRESETS["blip2-demo" if blip2 else "blip-demo"])
    source = described(tmp_path, pictures, task, {})["data"]["train"]
    changed = {f"model.{key}": value for key, value in named.items()} | {
        "model.name": None,
        "model.vit_checkpoint": None,
        "model.bert_checkpoint": None,
        "model.image_size": None,
        "data.train": source,
        "data.validation": {**source[0], "per_picture": False},
        "data.workers": 1,
        "data.together": 2,
        "optimizer.accumulate": 1,
        "run.epochs": None,
        "run.steps": 2,
        "run.batchsize": 4,
        "run.precision": "fp32",
        "run.loss_scale": None,
        "run.out": str(tmp_path / "out"),
    }
    if read_settings(name).run.cache_features and task == "stage1":
        changed["model.vit_checkpoint"] = str(ROOT / "demo" / "weights.safetensors")
    elif kind not in ("opt", "llama"):
        changed["model.freeze_vit"] = False
    if read_settings(name).data.easy:
        changed |= {"data.easy": 10, "data.easy_steps": 1, "run.itm_after": 1}
    if read_settings(name).model.momentum:
        changed["model.momentum.queue"] = 8
    fitted = fit(read_settings(name, [f"{key}={json.dumps(value)}" for key, value in changed.items()]))
    assert fitted.step == 2
    assert fitted.weights


# The commands


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_commands(tmp_path: Path, pictures: Path) -> None:
    values = stage2(tmp_path, pictures)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(values), "utf-8")
    said = chain.done(call("stage2", "--config", file, "--max-steps", 2, "--perf"))
    assert "fps:" in said
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["perf"]
    said = chain.done(call("stage2", "--config", file, "--max-steps", 2))
    assert "Stopped after step 2. The same command with --resume goes on from there." in said
    assert "holds a training already (step-0000002)" in chain.refusal(call("stage2", "--config", file), 2)
    said = chain.done(call("stage2", "--config", file, "--resume"))
    assert f"{tmp_path / 'out' / 'weights.safetensors'}: " in said


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--perf",), 2, "Add --max-steps N."),
        (("--set", "run.batchsiz=3"), 2, "run.batchsize"),
        (("--set", "run.precision=fp16"), 2, "Set run.precision to bf16 or fp32"),
        (("--set", "run.batchsize=400"), 2, "an epoch has only"),
        (("--set", "optimizer.accumulate=100"), 2, "Choose fewer"),
        (("--set", "model.tokenizer=none"), 1, "There is no tokenizer"),
        (("--set", "model.checkpoint=none.pth"), 1, "There is no checkpoint none.pth"),
        (("--set", "data.train.0.annotations=none.json"), 1, "none.json"),
        (("--set", "run.ema=1"), 2, "run.ema is 1"),
        (("--set", "model.bert_checkpoint=x"), 2, "task is stage2; expected one whose words BERT reads"),
        (("--set", "task=caption"), 2, "is of the task caption. Use blip-train caption"),
    ],
)
def test_misuse(tmp_path: Path, pictures: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    values = stage2(tmp_path, pictures)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(values), "utf-8")
    assert said in chain.refusal(call("stage2", "--config", file, *arguments), code)
    assert not list((tmp_path / "out").glob("step-*"))


def test_two_trainings_in_one_folder(tmp_path: Path, pictures: Path) -> None:
    values = stage2(tmp_path, pictures)
    (tmp_path / "out").mkdir()
    with manifest.locked(tmp_path / "out", "busy"):
        said = chain.refusal(call("stage2", "--config", written(tmp_path, values)), 1)
    assert "Another training writes into" in said
    (tmp_path / "file").touch()
    assert "cannot be made" in chain.refusal(
        call("stage2", "--config", written(tmp_path, values), "--set", f"run.out={tmp_path / 'file' / 'out'}"), 2
    )


def test_a_loss_that_is_no_number(tmp_path: Path, pictures: Path) -> None:
    values = stage2(tmp_path, pictures)
    said = chain.refusal(call("stage2", "--config", written(tmp_path, values), "--set", "schedule.lr=1e30"), 1)
    assert "The loss is not a number at step" in said
    assert "epoch 0, batch" in said


def written(folder: Path, values: dict[str, Any]) -> Path:
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(values), "utf-8")
    return file


def test_killed_at_any_moment(tmp_path: Path, pictures: Path) -> None:
    """kill -9, again and again, then --resume: the weights of an undisturbed training, to the bit."""
    values = stage2(tmp_path, pictures, run={"steps": 12, "save_every": 1})
    once = weights(trained(tmp_path, values, f"run.out={tmp_path / 'once'}"))
    file = written(tmp_path, values)
    command = [sys.executable, "-m", "training", "stage2", "--config", str(file), "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed, found = 0, tmp_path / "out" / "weights.safetensors"
    for delay in (0.0, 0.15, 0.4, 0.05, 0.3):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begun = newest(tmp_path / "out")
        while process.poll() is None and newest(tmp_path / "out") == begun:  # until it has saved something new
            time.sleep(0.005)
        time.sleep(delay)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert killed >= 2
    assert equal(once, load_file(found))


def newest(out: Path) -> str:
    return max((folder.name for folder in out.glob("step-*")), default="")


@pytest.mark.parametrize("mode", ["ddp", "full_shard"])
def test_two_processes_train_what_one_does(tmp_path: Path, pictures: Path, mode: str) -> None:
    """The same batches, half of each in each process; states are written, and one process reads them."""
    values = stage2(tmp_path, pictures)
    file = written(tmp_path, values)
    one = weights(trained(tmp_path, values, f"run.out={tmp_path / 'one'}"))
    sets = [f"--set={said}" for said in (f"parallel.mode={mode}", "run.batchsize=2", f"run.out={tmp_path / 'two'}")]
    run_two("training", "stage2", "--config", str(file), *sets)
    two = load_file(tmp_path / "two" / "weights.safetensors")
    assert one.keys() == two.keys()
    # AdamW divides by the root of a mean of squares, so that a gradient that rounding alone makes is a whole step of lr:
    # where gradients are 0 in theory (biases of keys), they may go either way.
    far = {name for name in one if float((one[name] - two[name]).abs().max()) > 1e-5}
    assert all("key.bias" in name for name in far), far
    assert not equal(one, load_file(tmp_path / "stage2.safetensors"))
