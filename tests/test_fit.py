"""training/fit.py and the commands over it: tiny models of every task learn, go on where they stopped, and are exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import export.__main__
from models import manifest
from models.blip import BlipPretrain
from models.checkpoint import load_generator
from models.config import Blip2Config, Blip2LlmConfig, BlipConfig, BlipVqaConfig
from models.errors import UserError
from tests import chain
from tests.generators import speaking, write_vocabulary
from tests.tiny import fill, random_stage1, save_weights
from tests.trainings import (
    SMALL,
    assert_one_training,
    call,
    described,
    equal,
    logged,
    sizes,
    small,
    speaker,
    stage2,
    trained,
    weights,
    written,
)
from tests.two_processes import train_two
from training.fit import fit
from training.settings_file import presets, read_settings


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
    # The language model, which has a file of its own, is in the state of the training.
    state = load_file(tmp_path / "out" / "step-0000030" / "model.safetensors")
    llm, _ = load_generator(speaking(kind), tmp_path / "stage2.safetensors", None, tmp_path / "llm")
    assert all(torch.equal(state[name], tensor) for name, tensor in llm.named_parameters() if name.startswith("llm_model."))


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


def test_lora_is_merged_and_exported(tmp_path: Path, pictures: Path) -> None:
    values = stage2(tmp_path, pictures, model={"lora": {"rank": 2, "alpha": 4}})
    fitted = trained(tmp_path, values)
    assert any(name.startswith("llm_model.") for name in weights(fitted))
    # The weights know their sizes.
    options = ["--config", fitted.weights, "--checkpoint", fitted.weights, "--tokenizer", values["model"]["tokenizer"]]
    said = chain.done(chain.call(export.__main__.main, *options, "--graphs", "llm", "--out", tmp_path / "graphs"))
    assert "llm" in said


@pytest.mark.parametrize("kind", ["caption", "vqa"])
def test_blip_writes(tmp_path: Path, pictures: Path, kind: str) -> None:
    """What is written is whole for blip-export, which reads it so; tests/test_training_validate.py exports one."""
    values = described(tmp_path, pictures, kind, speaker(tmp_path, kind), run={"steps": 30, "save_every": 30})
    fitted = trained(tmp_path, values)
    losses = logged(tmp_path, "losses")
    (name,) = losses[30]
    assert losses[30][name] < losses[10][name]
    assert fitted.weights
    model, report = load_generator(speaking(kind), fitted.weights)
    assert not report.unexpected
    assert equal({name: tensor for name, tensor in model.state_dict().items() if name in weights(fitted)}, weights(fitted))


def test_retrieval_with_momentum(tmp_path: Path, pictures: Path) -> None:
    """Also stopped and gone on: the copies and the queue come back."""
    momentum = {"decay": 0.9, "queue": 16, "alpha": 0.4, "ramp_epochs": 1}
    model = {**small(tmp_path, "pretrain"), "momentum": momentum}
    values = described(tmp_path, pictures, "retrieval", model)
    once = weights(trained(tmp_path, values, f"run.out={tmp_path / 'once'}"))
    for _ in range(2):
        last = trained(tmp_path, values, f"run.out={tmp_path / 'twice'}", resume=True, max_steps=3)
    assert equal(once, weights(last))
    assert not any(name.startswith(("momentum", "text_decoder")) for name in once)


@pytest.mark.parametrize("kind", SMALL)
def test_recall_chooses_the_best(tmp_path: Path, pictures: Path, kind: str) -> None:
    """It is measured as often as asked, and its state stays though others are removed."""
    source = {"annotations": str(pictures / "train.json"), "images": str(pictures)}
    values = described(tmp_path, pictures, "retrieval", small(tmp_path, kind), data={"validation": source})
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
    if name.startswith(("lavis", "paddlemix", "demo")) and task == "caption":
        kind = "opt"
    if kind in ("opt", "llama"):
        model = stage2(tmp_path, pictures, kind)["model"]
        named = {key: model[key] for key in ("config", "checkpoint", "llm_checkpoint", "tokenizer")}
    elif kind:
        named = {**speaker(tmp_path, kind), "checkpoint": None}
    else:
        blip2 = task == "stage1" or name.startswith("lavis")
        named = {**small(tmp_path, "stage1" if blip2 else "pretrain"), "checkpoint": None}
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
        sizes = SMALL["pretrain"]
        assert isinstance(sizes, BlipConfig)
        save_weights(BlipPretrain(sizes), tmp_path / "blip.safetensors")
        changed["model.vit_checkpoint"] = str(tmp_path / "blip.safetensors")
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


def test_commands(tmp_path: Path, pictures: Path) -> None:
    values = stage2(tmp_path, pictures)
    file = written(tmp_path, values)
    said = chain.done(call("stage2", "--config", file, "--max-steps", 2, "--perf"))
    assert "fps:" in said
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["perf"]
    said = chain.done(call("stage2", "--config", file, "--max-steps", 2, "--resume"))
    assert f"{tmp_path / 'out'} holds no state to go on from: this training begins at the start." in said
    assert "Stopped after step 2. The same command with --resume goes on from there." in said
    assert "holds a training already (step-0000002)" in chain.refusal(call("stage2", "--config", file), 2)
    said = chain.done(call("stage2", "--config", file, "--resume"))
    assert "going on after step 2\n" in said
    assert "holds no state" not in said
    assert f"{tmp_path / 'out' / 'weights.safetensors'}: " in said
    found = chain.done(call("stage2", "--config", "?")).split()
    assert found == [name for name in presets() if "stage2" in name]


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
    file = written(tmp_path, values)
    assert said in chain.refusal(call("stage2", "--config", file, *arguments), code)
    assert not list((tmp_path / "out").glob("step-*"))


def test_two_trainings_in_one_folder(tmp_path: Path, pictures: Path) -> None:
    values = stage2(tmp_path, pictures)
    (tmp_path / "out").mkdir()
    file = written(tmp_path, values)
    with manifest.locked(tmp_path / "out", "busy"):
        said = chain.refusal(call("stage2", "--config", file), 1)
    assert "Another training writes into" in said
    (tmp_path / "file").touch()
    said = chain.refusal(call("stage2", "--config", file, "--set", f"run.out={tmp_path / 'file' / 'out'}"), 2)
    assert "cannot be made" in said


def test_several_settings_at_once() -> None:
    """Behind one --set, or each behind its own."""
    for sets in (["--set", "run.steps=3", "run.seed=5"], ["--set", "run.seed=9", "run.steps=3", "--set", "run.seed=5"]):
        shown = yaml.safe_load(chain.done(call("stage1", "--config", "demo-stage1", *sets, "--show")))
        assert (shown["run"]["steps"], shown["run"]["seed"]) == (3, 5)
    said = chain.refusal(call("stage1", "--config", "demo-stage1", "--set", "run.steps=3", "seed"), 2)
    assert "--set is 'seed'; expected KEY=VALUE" in said
    said = chain.refusal(call("stage1", "--config", "demo-stage1", "--set", "preset=lavis-stage1"), 2)
    assert "a preset is what settings begin from: name it by --config" in said


def test_the_command_says_the_task(tmp_path: Path, pictures: Path) -> None:
    values = stage2(tmp_path, pictures)
    del values["task"]
    assert yaml.safe_load(chain.done(call("stage2", "--config", written(tmp_path, values), "--show")))["task"] == "stage2"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.train.0.images=nowhere", "There is no folder nowhere; images takes the folder that the paths in"),
        ("model.llm_checkpoint=null", "Add model.llm_checkpoint"),
    ],
)
def test_readers_speak_of_keys(tmp_path: Path, pictures: Path, change: str, said: str) -> None:
    """And not of the options that other commands have for them."""
    found = chain.refusal(call("stage2", "--config", written(tmp_path, stage2(tmp_path, pictures)), "--set", change), 1)
    assert said in found
    assert "--" not in found


def test_a_loss_that_is_no_number(tmp_path: Path, pictures: Path) -> None:
    values = stage2(tmp_path, pictures)
    said = chain.refusal(call("stage2", "--config", written(tmp_path, values), "--set", "schedule.lr=1e30"), 1)
    assert "The loss is not a number at step" in said
    assert "epoch 0, batch" in said
    last = json.loads((tmp_path / "out" / "log.jsonl").read_text("utf-8").splitlines()[-1])
    assert last["stopped"].startswith("the loss is not a number: lm ")
    assert f" at step {last['step']} (" in said
    assert last["at"] in said


def test_the_largest_seed(tmp_path: Path, pictures: Path) -> None:
    trained(tmp_path, stage2(tmp_path, pictures), f"run.seed={2**63 - 1}", "run.steps=1")


@pytest.mark.parametrize("layout", ["ours", "BLIP's"])
def test_answers_begin_with_blips_pretraining(tmp_path: Path, pictures: Path, layout: str) -> None:
    """As salesforce/BLIP's configs/vqa.yaml has it. To be exported, such a file is refused."""
    config = speaking("vqa")
    assert isinstance(config, BlipVqaConfig)
    text = replace(config.text, width=config.vision.width, heads=config.vision.heads)  # as in BLIP
    config = replace(config, text=text, decoder=text)
    first = BlipPretrain(BlipConfig(config.vision, config.text, embed=8))
    fill(first, 3, 0.05)
    file = tmp_path / ("pretrained.safetensors" if layout == "ours" else "pretrained.pth")
    if layout == "ours":
        save_weights(first, file)
    else:
        torch.save({"model": first.state_dict()}, file)
    named = {"config": sizes(tmp_path, config), "tokenizer": str(write_vocabulary(tmp_path / "words", config))}
    values = described(tmp_path, pictures, "vqa", named)
    values["model"]["checkpoint"] = str(file)
    found = weights(trained(tmp_path, values, "run.steps=1", "schedule.warmup_lr=0", "schedule.lr=1e-30"))
    state = first.state_dict()
    for part in ("visual_encoder", "text_encoder", "text_decoder"):
        names = [name for name in found if name.startswith(part)]
        assert names
        assert all(torch.allclose(found[name], state[name], atol=1e-6) for name in names)
    with pytest.raises(UserError, match="its decoder looks at pictures, not at questions"):
        load_generator(config, file)


def test_two_processes_train_what_one_does(tmp_path: Path, pictures: Path) -> None:
    """The same batches, half of each in each process; states are written, and one process reads them."""
    values = stage2(tmp_path, pictures)
    file = written(tmp_path, values)
    one = weights(trained(tmp_path, values, f"run.out={tmp_path / 'one'}"))
    modes = ("ddp", "full_shard")
    sets = {mode: (f"parallel.mode={mode}", "run.batchsize=2", f"run.out={tmp_path / mode}") for mode in modes}
    # A loss that begins later leaves weights without a gradient until then.
    folder = tmp_path / "late"
    late = written(folder, described(folder, pictures, "retrieval", small(folder, "pretrain"), run={"itm_after": 2}))
    begins = ("run.batchsize=2", f"run.out={folder / 'two'}")
    train_two(
        *(["stage2", "--config", file, *(f"--set={said}" for said in sets[mode])] for mode in modes),
        ["retrieval", "--config", late, *(f"--set={said}" for said in begins)],
    )
    assert_one_training(weights(fit(read_settings(late))), load_file(folder / "two" / "weights.safetensors"))
    for mode in modes:
        assert_one_training(one, load_file(tmp_path / mode / "weights.safetensors"))
    assert not equal(one, load_file(tmp_path / "stage2.safetensors"))
