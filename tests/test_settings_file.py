"""training/settings_file.py: YAML, --set and presets to settings, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from models.errors import Misuse
from training.schedule import Schedule
from training.settings import Lora, Run, Settings
from training.settings_file import LARGEST, presets, read_settings, to_dict
from training.settings_values import OF_OTHERS, keys

MINIMAL = """
task: stage1
model: {name: blip2-demo, freeze_vit: false}
data:
  train:
    - {annotations: a.json, images: pictures}
run: {epochs: 2}
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(MINIMAL, "utf-8")
    return path


def read(tmp_path: Path, text: str, *sets: str) -> Settings:
    path = tmp_path / "train.yaml"
    path.write_text(text, "utf-8")
    return read_settings(path, sets)


def refused(tmp_path: Path, text: str | bytes, *sets: str) -> str:
    """The one sentence that such a file gets."""
    path = tmp_path / "train.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(Misuse) as caught:
        read_settings(path, sets)
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    return caught.value.message.replace(str(path), "FILE")


def test_defaults(written: Path) -> None:
    found = read_settings(written)
    assert found.task == "stage1"
    assert found.data.train[0].images == Path("pictures")  # below the working directory, not beside the file
    assert found.schedule == Schedule()
    assert found.run == Run(epochs=2)
    assert read_settings(str(written)) == found


def test_set(written: Path) -> None:
    found = read_settings(
        written,
        [
            "schedule.lr=1e-3",  # which YAML 1.1 takes for a text
            "schedule.warmup_steps=5e3",
            "optimizer.betas=[0.9, 0.98]",
            "optimizer.betas.0=0.8",
            "data.train.0.images=elsewhere",
            "data.validation={annotations: b.json, images: pictures}",
            "data.validation.split=val",
            "data.crop_scale=null",
            'data.train.0.split="a part of: "',
            "run.epochs=",
            "run.steps=7",
        ],
    )
    assert (found.schedule.lr, found.schedule.warmup_steps) == (1e-3, 5000)
    assert found.optimizer.betas == (0.8, 0.98)
    assert (found.data.train[0].annotations, found.data.train[0].images) == (Path("a.json"), Path("elsewhere"))
    assert found.data.validation is not None
    assert (found.data.validation.annotations, found.data.validation.split) == (Path("b.json"), "val")
    assert found.data.crop_scale is None
    assert found.data.train[0].split == "a part of: "
    assert (found.run.epochs, found.run.steps) == (None, 7)


def test_a_home_is_a_home(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the ~ of run.out=~/x to us, and YAML always does."""
    monkeypatch.setenv("HOME", "/home/someone")
    assert read_settings(written, ["run.out=~/x"]).run.out == Path("/home/someone/x")
    assert read_settings(written, ["run.out=x/~y"]).run.out == Path("x/~y")


def test_later_changes_win(written: Path) -> None:
    assert read_settings(written, ["run.seed=1", "run.seed=2"]).run.seed == 2


def test_a_file_goes_on_from_a_preset(tmp_path: Path) -> None:
    found = read(tmp_path, "preset: lavis-stage1\nschedule: {lr: 2e-4}\ndata: {train: [{annotations: a.json, images: b}]}\n")
    base = read_settings("lavis-stage1")
    assert found.schedule == dataclasses.replace(base.schedule, lr=2e-4)
    assert len(base.data.train) == 2
    assert [source.annotations for source in found.data.train] == [Path("a.json")]  # a list takes the place of a list
    assert found.data.train[0].transform is None
    assert found.run == base.run
    only = read(tmp_path, "preset: run_blip2_stage2_vit_g_llama_7b\n")
    assert only == read_settings("mindformers-stage2-llama-7b")


def test_parts_can_be_begun_and_left_out(tmp_path: Path) -> None:
    lora = read(tmp_path, "preset: lavis-stage2-opt-2.7b\nmodel: {lora: {rank: 4}}\n")
    assert lora.model.lora == Lora(rank=4)
    assert read(tmp_path, "preset: paddlemix-lora-sft\nmodel: {lora: null}\n").model.lora is None
    assert read(tmp_path, "preset: paddlemix-lora-sft\nmodel: {lora: {rank: 4}}\n").model.lora == Lora(rank=4)


@pytest.mark.parametrize("name", presets())
def test_there_and_back(tmp_path: Path, name: str) -> None:
    settings = read_settings(name)
    assert read(tmp_path, yaml.safe_dump(to_dict(settings))) == settings
    assert read(tmp_path, json.dumps(to_dict(settings))) == settings  # JSON is YAML


TAGGED = ("!!int many", "!!bool 3", "!!timestamp x", "!!map [1, 2]", "!!map 3", "!!binary x", "2023-13-45", "0x_")
BAD: list[tuple[str, str, tuple[str, ...]]] = [
    ("", "FILE is empty; expected the keys of a training", ()),
    ("# nothing\n", "FILE is empty", ()),
    ("- task: stage1\n", "FILE holds a list of 1; expected keys with values, such as task: stage1", ()),
    ("stage1\n", "FILE holds 'stage1'; expected keys", ()),
    ("task: [stage1\n", "FILE is not YAML that can be used: line 2: ", ()),
    ("task: stage1\n\tdata: 3\n", "FILE is not YAML that can be used: line 2: ", ()),
    ("task: stage1\n---\ntask: stage2\n", "FILE is not YAML that can be used: line 2: ", ()),
    ("task: !!python/name:os.system\n", "FILE is not YAML that can be used: line 1: ", ()),
    ("task: \x07\n", "FILE is not YAML that can be used: ", ()),
    *((f"run: {{seed: {tag}}}\n", "FILE is not YAML that can be used: ", ()) for tag in TAGGED),
    ("[" * 5000, "FILE is not YAML that can be used: ", ()),
    ("task: stage1\ntask: stage2\n", "FILE is not YAML that can be used: line 2: the key 'task' is given twice. Correct it.", ()),
    (MINIMAL + "schedule:\n  lr: 1.0\n  lr: 2.0\n", "line 10: the key 'lr' is given twice", ()),
    (MINIMAL.replace("task: stage1\n", ""), "FILE: task is missing. Give it in the file or with --set.", ()),
    ("task: stage1\nmodel: {name: blip2-demo}\n", "FILE: data is missing", ()),
    (MINIMAL.replace("train:", "validation:"), "FILE: data.validation is a list of 1; expected keys with values: kind", ()),
    ("task: stage1\ndata: {flip: 0}\n", "FILE: data.train is missing", ()),
    (MINIMAL.replace("stage1", "stage3"), "FILE: task is 'stage3'; expected one of pretrain, stage1, ", ()),
    (MINIMAL + "schedule: {lr: high}\n", "FILE: schedule.lr is 'high'; expected a number.", ()),
    (MINIMAL + "schedule: {lr: .inf}\n", "FILE: schedule.lr is inf; expected a number.", ()),
    (MINIMAL + "schedule: {lr: true}\n", "FILE: schedule.lr is true; expected a number.", ()),
    (MINIMAL + "schedule: 1e-4\n", "FILE: schedule is '1e-4'; expected keys with values: kind, lr", ()),
    (MINIMAL + "schedule: null\n", "FILE: schedule is null; expected keys with values", ()),
    (MINIMAL + "schedule: {kind: lavi}\n", "schedule.kind is 'lavi'; expected one of lavis, lavis-step", ()),
    (MINIMAL + "schedule: {warmup_steps: 2.5}\n", "FILE: schedule.warmup_steps is 2.5; expected a whole number.", ()),
    (MINIMAL + "schedule: {lr: 0}\n", "FILE: schedule.lr is 0.0; expected a number above 0.", ()),
    (MINIMAL + "optimizer: {betas: [0.9]}\n", "FILE: optimizer.betas is a list of 1; expected a list of 2.", ()),
    (MINIMAL + "optimizer: {betas: [0.9, two]}\n", "FILE: optimizer.betas.1 is 'two'; expected a number.", ()),
    (MINIMAL + "parallel: {mode: 3}\n", "FILE: parallel.mode is 3; expected one of none, ddp", ()),
    (MINIMAL + "parallel: {mode: off}\n", "FILE: parallel.mode is false; expected one of none, ddp", ()),
    (MINIMAL.replace("false", "no way"), "FILE: model.freeze_vit is 'no way'; expected true or false.", ()),
    (MINIMAL.replace("blip2-demo", "2"), "FILE: model.name is 2; expected a text (in quotes", ()),
    (MINIMAL.replace("pictures", "2014"), "FILE: data.train.0.images is 2014; expected a path (in quotes", ()),
    (MINIMAL.replace("pictures", '""'), "FILE: data.train.0.images is ''; expected a path", ()),
    (MINIMAL.replace("    - {", "    {"), "FILE: data.train is a mapping; expected a list (data.train.0 is its first item).", ()),
    (MINIMAL.replace("blip2-demo", "blip2-dem"), "FILE: No model is called 'blip2-dem'. Did you mean 'blip2-demo'?", ()),
    ("preset: lavis-stage3\n", "FILE: there is no preset 'lavis-stage3'. Did you mean lavis-stage1? Presets: blip-", ()),
    ("preset: null\n", "FILE: there is no preset null.", ()),
    ("preset: [lavis-stage1]\n", "FILE: there is no preset a list of 1. Did you mean lavis-stage1?", ()),
    ("preset: lavis-stage1\nrun: {batchsize: 0}\n", "FILE: run.batchsize is 0; expected 1 or more.", ()),
    (MINIMAL, "--set is 'schedule.lr'; expected KEY=VALUE, such as schedule.lr=1e-4.", ("schedule.lr",)),
    (MINIMAL, "--set is '=3'; expected KEY=VALUE", ("=3",)),
    (MINIMAL, "--set is 'run..seed=3'; expected KEY=VALUE", ("run..seed=3",)),
    (MINIMAL, "--set run.seed=x: run.seed is 'x'; expected a whole number.", ("run.seed=x",)),
    (MINIMAL, "--set run.seed=: run.seed is null; expected a whole number.", ("run.seed=",)),
    (MINIMAL, "--set run.seed=[1 is not YAML that can be used: line 1: ", ("run.seed=[1",)),
    (MINIMAL, "--set run=3: run is 3; expected keys with values", ("run=3",)),
    (MINIMAL, "--set run.seed.low=3: run.seed is a mapping; expected a whole number.", ("run.seed.low=3",)),
    (MINIMAL, "--set data.train.1.split=x: there is no data.train.1; data.train has 1 items", ("data.train.1.split=x",)),
    (MINIMAL, "--set data.train.first.split=x: data.train is a mapping; expected a list (", ("data.train.first.split=x",)),
    (MINIMAL, "FILE with --set run.batchsize=0: run.batchsize is 0; expected 1 or more.", ("run.batchsize=0", "run.seed=2")),
    (
        MINIMAL,
        "FILE with --set run.steps=9: run.epochs is 2 and run.steps is 9; expected one of them, and null as",
        ("run.steps=9",),
    ),
    (MINIMAL + "run.batchsize: 3\n", "FILE: run.batchsize is one key; expected run with batchsize below it.", ()),
    (
        MINIMAL.replace("epochs", "generation.num_beams"),
        "generation.num_beams is one key; expected generation with num_beams",
        (),
    ),
    (MINIMAL + "parallel: {mode: fsdp}\n", "FILE: parallel.mode is 'fsdp'; expected one of none, ddp, ", ()),
    (MINIMAL, "run.device is 'gpu'; expected one of auto, cpu, cuda, npu (did you mean cuda?).", ("run.device=gpu",)),
    (MINIMAL, "run.out is '~nobody-here/x'; expected a path; there is no such user", ("run.out=~nobody-here/x",)),
]


@pytest.mark.parametrize(("text", "said", "sets"), BAD, ids=[said[:60] for _, said, _ in BAD])
def test_bad_settings_are_one_sentence(tmp_path: Path, text: str, said: str, sets: tuple[str, ...]) -> None:
    assert said in refused(tmp_path, text, *sets)


def test_the_case_they_spoil_is_good(tmp_path: Path) -> None:
    assert read(tmp_path, MINIMAL, "run.batchsize=2").run.batchsize == 2


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(Misuse, match=r"neither a settings file nor a preset lavis_stage1\. Did you mean lavis-stage1\?"):
        read_settings("lavis_stage1")
    with pytest.raises(Misuse, match=r"neither a settings file nor a preset lavis-stage1\."):
        read_settings(Path("lavis-stage1"))  # a Path is a file
    for path in (tmp_path, tmp_path / "train.yaml" / "train.yaml", tmp_path / ("long" * 100)):
        (tmp_path / "train.yaml").write_text("a file", "utf-8")
        with pytest.raises(Misuse, match=r"cannot be read \(.*\); expected a settings file"):
            read_settings(path)
    assert refused(tmp_path, b"task: \xff\n") == "FILE is no text in UTF-8 (byte 6); expected a settings file."
    assert "bytes; expected a settings file" in refused(tmp_path, "#" * (LARGEST + 1))


UNKNOWN = [
    ("modell: {name: blip2-demo}\n", "modell", "model"),
    ("learning_rate: 3\n", "learning_rate", "schedule.lr"),
    ("run: {batch_size_train: 8}\n", "run.batch_size_train", "run.batchsize"),
    ("lr: 1e-4\n", "lr", "schedule.lr"),
    ("batchsize: 8\n", "batchsize", "run.batchsize"),
    ("presets: lavis-stage1\n", "presets", "preset"),
    ("model: {frezze_vit: true}\n", "model.frezze_vit", "model.freeze_vit"),
    ("model: {batchsize: 3}\n", "model.batchsize", "run.batchsize"),
    ("model: {lora: {ranks: 3}}\n", "model.lora.ranks", "model.lora.rank"),
    ("model: {momentum: {que: 3}}\n", "model.momentum.que", "model.momentum.queue"),
    ("data: {train: [{annotation: a.json}]}\n", "data.train.0.annotation", "data.train.0.annotations"),
    ("data: {validation: {image: a}}\n", "data.validation.image", "data.validation.images"),
    ("data: {rand_augment: {numbers: 2}}\n", "data.rand_augment.numbers", "data.rand_augment.number"),
    ("data: {num_workers: 2}\n", "data.num_workers", "data.workers"),
    ("optimizer: {wieght_decay: 0}\n", "optimizer.wieght_decay", "optimizer.weight_decay"),
    ("schedule: {warmup_step: 2}\n", "schedule.warmup_step", "schedule.warmup_steps"),
    ("run: {epoch: 2}\n", "run.epoch", "run.epochs"),
    ("run: {generation: {max_new_tokens: 20}}\n", "run.generation.max_new_tokens", "run.generation.max_length"),
    ("run: {generation: {beams: 2}}\n", "run.generation.beams", "run.generation.num_beams"),
    ("parallel: {modes: ddp}\n", "parallel.modes", "parallel.mode"),
    ("3: x\n", "3", ""),
]


@pytest.mark.parametrize(("text", "key", "nearest"), UNKNOWN)
def test_unknown_keys(tmp_path: Path, text: str, key: str, nearest: str) -> None:
    said = refused(tmp_path, "preset: lavis-stage1\n" + text)
    assert said.startswith(f"FILE: there is no key {key}. Did you mean {nearest}")
    assert f"Did you mean {nearest}? Known " in said or not nearest


def test_names_of_others_lead_to_keys() -> None:
    assert set(OF_OTHERS.values()) <= set(keys(Settings))
    assert not set(OF_OTHERS) & {key.rpartition(".")[2] for key in keys(Settings)}


def test_unknown_keys_of_set(written: Path) -> None:
    for text, nearest in (("schedule.lrr=1", "schedule.lr"), ("data.train.0.image=x", "data.train.0.images"), ("x=1", "")):
        with pytest.raises(Misuse, match=f"^--set {text}: there is no key .* Did you mean {nearest}"):
            read_settings(written, [text])


def test_known_keys_are_all_documented() -> None:
    """Each key has its line in settings.py or schedule.py, with a comment, unless it is a part with its own docstring."""
    code = "".join(
        (Path(__file__).parent.parent / "training" / name).read_text("utf-8") for name in ("settings.py", "schedule.py")
    )
    names = {key.rpartition(".")[2] for key in keys(Settings)}
    assert {"lr", "batchsize", "rank", "queue", "num_beams"} <= names
    for name in names:
        assert f"    {name}: " in code or name in ("number", "magnitude")  # those are training/transforms.py's
