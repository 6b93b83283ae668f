"""run.cache_features: a training that reads what the frozen image encoder made of its pictures learns what the plain one does."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from demo import shapes
from models import manifest
from models.errors import Misuse, UserError
from tests import chain
from tests.tiny import TINY2, random_stage1
from tests.trainings import (
    assert_one_training,
    call,
    described,
    equal,
    logged,
    sizes,
    stage2,
    trained,
    weights,
    written,
)
from tests.two_processes import ROOT, train_two
from training import features
from training.features import FOLDER
from training.parallel import Place
from training.settings_file import read_settings
from training.step import image_feat

SIZES = replace(TINY2, qformer=replace(TINY2.qformer, vocab=84, positions=40))  # with the words of demo/tokenizer
COUNT = 26  # pictures: the last batch of the pass is not full
UNCHANGED: dict[str, Any] = {"crop_scale": None, "flip": 0.0}  # pictures are the same in each epoch


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    shapes.write(folder, "train", COUNT, 1)
    return folder


def stage1(folder: Path, pictures: Path, seed: int = 5, **run: Any) -> dict[str, Any]:
    """A first stage upon the random weights of a seed; each picture comes with each of its captions."""
    file = folder / f"stage1-{seed}.safetensors"
    save_file({n: t.contiguous() for n, t in random_stage1(SIZES, seed, 0.05).state_dict().items()}, file)
    model = {
        "config": sizes(folder, SIZES),
        "checkpoint": str(file),
        "tokenizer": str(ROOT / "demo" / "tokenizer"),
        "freeze_vit": True,
    }
    values = described(folder, pictures, "stage1", model, data=UNCHANGED, run=run)
    values["data"]["train"][0]["per_picture"] = False
    return values


def both(folder: Path, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights of the plain training and of one with features kept, in folder/plain and folder/out."""
    plain = weights(trained(folder, values, f"run.out={folder / 'plain'}"))
    return plain, weights(trained(folder, values, "run.cache_features=true"))


def test_the_first_stage(tmp_path: Path, pictures: Path) -> None:
    """To the bit: batches of the pass are as large as those of the training."""
    values = stage1(tmp_path, pictures, log_every=1)
    plain, kept = both(tmp_path, values)
    assert equal(plain, kept)
    assert not equal(plain, load_file(values["model"]["checkpoint"]))
    shutil.copytree(tmp_path / "plain", tmp_path / "compared" / "out")
    assert logged(tmp_path, "losses") == logged(tmp_path / "compared", "losses")
    found = manifest.read(tmp_path / "out" / FOLDER, "features", verify=True)
    assert set(found.files) == {"features.npy", "pictures.npy"}
    assert np.load(tmp_path / "out" / FOLDER / "features.npy").shape == (COUNT, SIZES.vision.tokens, SIZES.vision.width)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_the_second_stage(tmp_path: Path, pictures: Path, kind: str) -> None:
    values = stage2(tmp_path, pictures, kind, data=UNCHANGED)
    plain, kept = both(tmp_path, values)
    assert equal(plain, kept)
    assert not equal(plain, load_file(tmp_path / "stage2.safetensors"))


def test_features_are_what_is_learnt_from(tmp_path: Path, pictures: Path) -> None:
    """Others give other weights: the comparisons above would see it."""
    values = stage1(tmp_path, pictures)
    plain, _ = both(tmp_path, values)
    forget(tmp_path / "out")
    rows = np.load(tmp_path / "out" / FOLDER / "features.npy", mmap_mode="r+")
    rows[:] *= 1.001 * np.linspace(0.9, 1.1, rows.shape[2], dtype=np.float32)
    rows.flush()
    assert not equal(plain, weights(trained(tmp_path, values, "run.cache_features=true")))


def test_stopped_and_gone_on_without_pictures(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once features are kept no picture is opened, and the weights are those of an undisturbed plain training."""
    values = stage1(tmp_path, pictures)
    plain = weights(trained(tmp_path, values, f"run.out={tmp_path / 'plain'}"))
    trained(tmp_path, values, "run.cache_features=true", max_steps=2)
    files = sorted((pictures / "train").iterdir())
    assert len(files) == COUNT
    for file in files[1:]:  # a folder without any picture of the annotations is taken for the wrong one
        file.unlink()
    before = (tmp_path / "out" / FOLDER / "features.npy").stat().st_mtime_ns
    found = weights(trained(tmp_path, values, "run.cache_features=true", resume=True))
    assert equal(plain, found)
    assert (tmp_path / "out" / FOLDER / "features.npy").stat().st_mtime_ns == before
    assert "made anew" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"\.png"):
        trained(tmp_path, values, f"run.out={tmp_path / 'other'}")


def test_kept_once_and_used_again(tmp_path: Path, pictures: Path) -> None:
    """By another training of the same encoder, also with the cache switched on in the middle."""
    values = stage1(tmp_path, pictures)
    plain = weights(trained(tmp_path, values, f"run.out={tmp_path / 'plain'}"))
    trained(tmp_path, values, max_steps=3)
    assert equal(plain, weights(trained(tmp_path, values, "run.cache_features=true", resume=True)))
    shutil.copytree(tmp_path / "out" / FOLDER, tmp_path / "again" / FOLDER)
    before = (tmp_path / "again" / FOLDER / "features.npy").stat().st_ino
    sets = ("run.cache_features=true", f"run.out={tmp_path / 'again'}")
    assert equal(plain, weights(trained(tmp_path, values, *sets)))
    assert (tmp_path / "again" / FOLDER / "features.npy").stat().st_ino == before


@pytest.mark.parametrize("what", ["image_encoder", "precision", "picture"])
def test_stale_features_are_made_anew(tmp_path: Path, pictures: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, stage1(tmp_path, pictures), "run.cache_features=true", "run.steps=1")
    forget(tmp_path / "out")
    if what == "picture":
        files = sorted((pictures / "train").iterdir())
        shutil.copy(files[0], files[7])
    values = stage1(tmp_path, pictures, 6 if what == "image_encoder" else 5, steps=3)
    sets = ["run.precision=bf16"] if what == "precision" else []
    capsys.readouterr()
    kept = weights(trained(tmp_path, values, "run.cache_features=true", *sets))
    differing = "1 pictures that have changed since" if what == "picture" else f"other values of {what}"
    assert f"holds features of {differing}. They are made anew." in capsys.readouterr().err
    assert equal(kept, weights(trained(tmp_path, values, f"run.out={tmp_path / 'plain'}", *sets)))


def test_damaged_features_are_made_anew(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out" / FOLDER
    values = stage1(tmp_path, pictures, steps=1)
    plain, _ = both(tmp_path, values)
    for spoil, said in (
        (lambda: os.truncate(folder / features.ROWS, 5000), "has 5,000 bytes, its manifest says"),
        (lambda: os.truncate(folder / features.PICTURES, 0), "has 0 bytes, its manifest says"),
        (lambda: (folder / manifest.NAME).write_text("{"), "is damaged"),
        (lambda: (folder / manifest.NAME).unlink(), "holds no manifest.json"),
    ):
        forget(tmp_path / "out")
        spoil()
        capsys.readouterr()
        assert equal(plain, weights(trained(tmp_path, values, "run.cache_features=true")))
        complaint = capsys.readouterr().err
        assert said in complaint
        assert "The features are made anew." in complaint


def forget(out: Path) -> None:
    """Remove the training, not its features."""
    for step in out.glob("step-*"):
        shutil.rmtree(step)
    (out / "weights.safetensors").unlink()


def test_a_pass_that_was_stopped_goes_on(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken picture is named; once it is mended, the others are not decoded again."""
    values = stage1(tmp_path, pictures)
    files = [pictures / entry["image"] for entry in json.loads((pictures / "train.json").read_text("utf-8"))]
    broken, whole = files[17], files[17].read_bytes()
    broken.write_bytes(whole[:100])
    with pytest.raises(UserError, match=broken.name):
        trained(tmp_path, values, "run.cache_features=true")
    assert not (tmp_path / "out" / FOLDER).exists()
    broken.write_bytes(whole)
    opened: list[Path] = []
    read = features.read_image
    monkeypatch.setattr(features, "read_image", lambda path, **options: opened.append(path) or read(path, **options))
    kept = weights(trained(tmp_path, values, "run.cache_features=true"))
    assert opened == files[16:]  # four of a batch are kept together
    assert equal(kept, weights(trained(tmp_path, values, f"run.out={tmp_path / 'plain'}")))


def test_a_half_made_folder_of_other_weights_is_begun_anew(tmp_path: Path, pictures: Path) -> None:
    """So is one in which a file was cut when the machine stopped."""
    broken = sorted((pictures / "train").iterdir())[20]
    whole = broken.read_bytes()
    for seed, name in ((5, features.ROWS), (6, features.DONE)):
        broken.write_bytes(b"")
        with pytest.raises(UserError, match=broken.name):
            trained(tmp_path, stage1(tmp_path, pictures, seed), "run.cache_features=true")
        os.truncate(tmp_path / "out" / f".{FOLDER}.part" / name, 0)
    broken.write_bytes(whole)
    values = stage1(tmp_path, pictures, 7)
    plain, kept = both(tmp_path, values)
    assert equal(plain, kept)


def test_no_room(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is computed, with what is needed; so is what the file system says."""
    values = stage1(tmp_path, pictures)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(features.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**4))
        with pytest.raises(
            UserError, match=r"The features of 26 pictures take 0\.00 GB, and .* has 0\.00 GB free \(no space left"
        ):
            trained(tmp_path, values, "run.cache_features=true")
    with monkeypatch.context() as patch:
        patch.setattr(features.os, "posix_fallocate", lambda *given: (_ for _ in ()).throw(OSError(122, "Disk quota exceeded")))
        with pytest.raises(UserError, match="disk quota exceeded"):
            trained(tmp_path, values, "run.cache_features=true")
    left = tmp_path / "out" / f".{FOLDER}.part"
    assert not list(left.iterdir())
    assert trained(tmp_path, values, "run.cache_features=true").step == 6


def test_a_folder_that_is_not_shared(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another machine finds it."""
    begun = features._begun

    def elsewhere(part: Path, *given: Any) -> np.ndarray:
        left = begun(part, *given)
        (part / features.ROWS).unlink()
        return left

    monkeypatch.setattr(features, "_begun", elsewhere)
    with pytest.raises(
        UserError, match=r"Process 0 finds no .*features\.npy, which the first process has made\. Set run\.out to"
    ):
        trained(tmp_path, stage1(tmp_path, pictures), "run.cache_features=true")


def test_a_folder_of_somebody_else(tmp_path: Path, pictures: Path) -> None:
    values = stage1(tmp_path, pictures)
    (tmp_path / "out" / FOLDER).mkdir(parents=True)
    (tmp_path / "out" / FOLDER / "mine.txt").write_text("kept")
    with pytest.raises(Misuse, match="is not empty and is not a features folder"):
        trained(tmp_path, values, "run.cache_features=true")
    assert (tmp_path / "out" / FOLDER / "mine.txt").read_text() == "kept"


def test_two_processes(tmp_path: Path, pictures: Path) -> None:
    """Each computes its share; they learn what one process learns from pictures."""
    values = stage1(tmp_path, pictures, steps=3)
    plain = weights(trained(tmp_path, values, f"run.out={tmp_path / 'plain'}"))
    file, modes = written(tmp_path, values), ("ddp", "full_shard")
    sets = {mode: (f"parallel.mode={mode}", "run.batchsize=2", f"run.out={tmp_path / mode}") for mode in modes}
    train_two(*(["stage1", "--config", file, "--cache-features", *(f"--set={said}" for said in sets[mode])] for mode in modes))
    trained(tmp_path, values, "run.cache_features=true")
    own = np.load(tmp_path / "out" / FOLDER / "features.npy")
    for mode in modes:
        assert_one_training(plain, load_file(tmp_path / mode / "weights.safetensors"))
        # Rows of batches of 2 and of 4: measured equal, but libraries may round otherwise.
        np.testing.assert_allclose(np.load(tmp_path / mode / FOLDER / "features.npy"), own, atol=1e-5)


def test_the_first_machine_makes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two machines with two processes each."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    shares = [features._share(np.arange(7), Place(rank, 4, torch.device("cpu"))).tolist() for rank in range(4)]
    assert shares == [[0, 2, 4, 6], [1, 3, 5], [], []]


def test_image_feat() -> None:
    model = random_stage1()
    image = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        rows = model.visual_encoder(image)
        assert torch.equal(image_feat(model, rows), image_feat(model, image))
        assert not torch.equal(rows, image_feat(model, image))  # the norm that learns is behind what is kept
    assert rows.shape == (3, TINY2.vision.tokens, TINY2.vision.width)


# The command


def test_the_flag(tmp_path: Path, pictures: Path) -> None:
    file = written(tmp_path, stage1(tmp_path, pictures))
    said = chain.done(call("stage1", "--config", file, "--cache-features"))
    assert f"features of {COUNT} pictures in {tmp_path / 'out' / FOLDER}" in said
    assert (tmp_path / "out" / FOLDER / "manifest.json").is_file()


def test_lora_as_an_option(tmp_path: Path, pictures: Path) -> None:
    """It is what --set does, and LoRA is trained."""
    values = stage2(tmp_path, pictures, data=UNCHANGED)
    file = written(tmp_path, values)
    chain.done(call("stage2", "--config", file, "--lora", "rank=2, alpha=4", "--cache-features"))
    found = load_file(tmp_path / "out" / "weights.safetensors")
    same = weights(trained(tmp_path, values, "model.lora.rank=2", "model.lora.alpha=4", f"run.out={tmp_path / 'same'}"))
    assert equal(found, same)
    assert any(name.startswith("llm_model.") for name in found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--lora", "rank=2,alfa=4"), "--lora has 'alfa'; expected rank, alpha, dropout. Did you mean alpha?"),
        (("--lora", "rank"), "--lora has 'rank'; expected a number behind rank, such as rank=16,alpha=32."),
        (("--lora", ""), "--lora has ''; expected rank, alpha, dropout."),
        (("--lora", "rank=two"), "model.lora.rank is 'two'; expected a whole number."),
        (("--lora", "rank=0"), "model.lora.rank is 0; expected 1 or more."),
        (("--cache-features", "--set", "data.flip=0.5"), "run.cache_features is true, but pictures are changed at random"),
        (("--cache-features", "--set", "model.freeze_vit=false"), "model.freeze_vit is false; expected true"),
        (
            ("--cache-features", "--set", 'data.train=[{kind: shards, shards: "a-{0..1}.tar", samples: 9}]'),
            "data.train.0.kind is shards; expected pictures in files, with run.cache_features.",
        ),
    ],
)
def test_misuse(tmp_path: Path, pictures: Path, arguments: tuple[str, ...], said: str) -> None:
    file = written(tmp_path, stage2(tmp_path, pictures, data=UNCHANGED))
    assert said in chain.refusal(call("stage2", "--config", file, *arguments), 2)


def test_only_the_first_two_stages(tmp_path: Path, pictures: Path) -> None:
    values = described(tmp_path, pictures, "pretrain", {"name": "blip-demo"}, data=UNCHANGED)
    file = written(tmp_path, values)
    with pytest.raises(Misuse, match="task is pretrain; expected stage1 or stage2"):
        read_settings(file, ["run.cache_features=true"])
