"""blip-train pretrain and stage1 from nothing, on drawn pictures; what the demo's weights were trained with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from models.checkpoint import load_model
from models.config import BlipConfig
from models.presets import PRESETS
from preprocess.text import CaptionTokenizer
from tests.tiny import DEMO, demo_blip
from tests.trainings import SMALL, call, equal, logged, short, trained, weights, written
from tests.two_processes import ROOT
from training import data, sources
from training.initial import sines
from training.loader import Loaded
from training.task import Task

TASKS = tuple(SMALL)


def total(folder: Path, step: int) -> float:
    return sum(logged(folder, "losses")[step].values())


@pytest.mark.parametrize("task", TASKS)
def test_training_learns_and_is_repeatable(tmp_path: Path, pictures: Path, task: str) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    a, b = (weights(trained(folder, short(folder, pictures, task))) for folder in (first, again))
    assert equal(a, b)
    assert logged(first, "losses") == logged(again, "losses")
    assert total(first, 20) < total(first, 10) - 0.2  # 0.4 to 1.2 less, by seed and task
    assert {"txt_r1", "img_r10", "itc_txt_r1", "r_mean"} <= logged(first, "metrics")[20].keys()
    other = weights(trained(tmp_path / "other", short(tmp_path / "other", pictures, task, seed=2)))
    assert not equal(a, other)


@pytest.mark.parametrize("task", TASKS)
def test_itm_starts_late_and_easy_pictures_come_first(
    tmp_path: Path, pictures: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    plain = Task.__init__

    def spied(self: Task, config: Any, model: Any, said: Any, batch_of: Any, *more: Any, **named: Any) -> None:
        def watched(loaded: Loaded) -> Any:
            seen.append(int(loaded.picture.max()))
            return batch_of(loaded)

        plain(self, config, model, said, watched, *more, **named)

    monkeypatch.setattr(Task, "__init__", spied)
    values = short(tmp_path, pictures, task, itm_after=10)
    values["data"] |= {"easy": 10, "easy_steps": 8}
    trained(tmp_path, values)
    losses = logged(tmp_path, "losses")
    assert losses[10]["itm"] == 0
    assert losses[20]["itm"] > 0.1
    assert max(seen[:8]) < 10 <= max(seen[8:])


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_of_one_trains(tmp_path: Path, pictures: Path, task: str) -> None:
    values = short(tmp_path, pictures, task, steps=2, batchsize=1, validate_every=2, log_every=1)
    values["data"]["together"] = 1
    trained(tmp_path, values)
    assert logged(tmp_path, "losses")[2]["itc"] == 0  # nothing to contrast with
    assert logged(tmp_path, "losses")[2]["lm"] > 0


def test_retrieval_reads_what_was_pretrained(tmp_path: Path, pictures: Path) -> None:
    config = SMALL["pretrain"]
    assert isinstance(config, BlipConfig)
    fitted = trained(tmp_path, short(tmp_path, pictures, "pretrain", steps=1, validate_every=1))
    assert fitted.weights
    with safe_open(fitted.weights, "pt") as file:
        about = file.metadata()
    assert (about["task"], about["seed"]) == ("pretrain", "42")
    assert about["command"]
    model, report = load_model(config, fitted.weights)
    assert not report.unexpected
    assert torch.equal(model.itm_head.weight, weights(fitted)["itm_head.weight"])


def test_of_karpathys_own_file_train_is_learnt_and_test_held_out(tmp_path: Path, pictures: Path) -> None:
    entries = []
    for split in ("train", "test"):
        for entry in json.loads((pictures / f"{split}.json").read_text("utf-8")):
            folder, name = entry["image"].split("/")
            sentences = [{"raw": caption} for caption in entry["caption"]]
            entries.append({"filepath": folder, "filename": name, "split": split, "sentences": sentences})
    dataset = tmp_path / "dataset_demo.json"
    dataset.write_text(json.dumps({"images": entries}), "utf-8")
    values = short(tmp_path / "of_one", pictures, "pretrain", steps=4, validate_every=4)
    apart = trained(tmp_path / "apart", short(tmp_path / "apart", pictures, "pretrain", steps=4, validate_every=4))
    values["data"]["train"][0]["annotations"] = values["data"]["validation"]["annotations"] = str(dataset)
    assert equal(weights(trained(tmp_path / "of_one", values)), weights(apart))
    assert logged(tmp_path / "of_one", "metrics") == logged(tmp_path / "apart", "metrics")


def test_of_flickr8ks_files_train_is_learnt_and_dev_held_out(tmp_path: Path, pictures: Path) -> None:
    """Though nothing names a split."""
    lines = []
    for split, listed in (("train", "train"), ("test", "dev")):
        entries = json.loads((pictures / f"{split}.json").read_text("utf-8"))
        names = "".join(f"{entry['image']}\n" for entry in entries)
        (tmp_path / f"Flickr_8k.{listed}Images.txt").write_text(names, "utf-8")
        lines += [f"{entry['image']}#{n}\t{caption}" for entry in entries for n, caption in enumerate(entry["caption"])]
    tokens = tmp_path / "Flickr8k.token.txt"
    tokens.write_text("\n".join(lines), "utf-8")
    values = short(tmp_path / "flickr", pictures, "stage1", steps=4, validate_every=4)
    apart = trained(tmp_path / "apart", short(tmp_path / "apart", pictures, "stage1", steps=4, validate_every=4))
    values["data"]["validation"] = {"kind": "flickr8k", "annotations": str(tokens), "images": str(pictures)}
    values["data"]["train"] = [values["data"]["validation"] | {"per_picture": True}]
    assert equal(weights(trained(tmp_path / "flickr", values)), weights(apart))
    assert logged(tmp_path / "flickr", "metrics") == logged(tmp_path / "apart", "metrics")


def test_captions_stand_by_their_pictures(pictures: Path) -> None:
    words = CaptionTokenizer.load(DEMO / "tokenizer", SMALL["pretrain"])
    source = sources.Source("karpathy", pictures / "train.json", pictures, per_picture=True)
    captioned = data.read_pictures(sources.read_source(source), words, SMALL["pretrain"], workers=1)
    assert captioned.pixels.shape == (20, 3, 16, 16)
    assert captioned.first.tolist() == list(range(0, 101, 5))
    assert captioned.image_of_text.tolist() == [n // 5 for n in range(100)]
    ids, mask = captioned.captions(np.array([0, 7]))
    assert ids.shape == mask.shape == (2, int(mask.sum(1).max()))


def test_positions_start_as_sines() -> None:
    table = sines(3, 16)
    assert table.shape == (9, 16)
    assert table[0].tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 4 + [1.0] * 4  # row 0, column 0
    torch.testing.assert_close(table[5, :4], torch.sin(2 * table[1, :4].asin()))  # column 2 of row 1
    assert len({tuple(row.tolist()) for row in table}) == 9
    assert sines(2, 6).shape == (4, 6)


@pytest.mark.parametrize("command", [["stage1", "--config", "demo-stage1"], ["probe", "--image", "a", "--text", "b"]])
def test_missing_torch_is_one_sentence(command: list[str]) -> None:
    code = f"import sys; sys.modules['torch'] = None; from training.__main__ import main; main({command!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[1:]) == (1, [])
    assert done.stderr.startswith("Error: This needs torch, which is not installed.")


@pytest.mark.parametrize(
    ("task", "sets", "code", "said"),
    [
        ("pretrain", ["run.batchsize=12"], 2, "run.batchsize is 12; expected a multiple of data.together, 5"),
        ("pretrain", ["run.batchsize=50"], 2, "only 20 samples in whole rows of 5"),
        ("pretrain", ["data.easy=5", "data.easy_steps=1"], 2, "only 5 samples"),
        ("pretrain", ["data.easy=40", "data.easy_steps=1"], 2, "data.easy is 40"),
        ("pretrain", ["data.train.0.annotations=none.json"], 1, "no annotation file"),
        ("pretrain", ["data.train.0.images=nowhere"], 1, "There is no folder nowhere"),
        ("pretrain", ["model.config=null", "model.name=blip-dmo"], 2, "blip-demo"),
        ("pretrain", ["model.config=null", "model.name=blip2-demo"], 2, "blip2-demo, which pretrain does not train; expected"),
        ("stage1", ["model.config=null", "model.name=blip-demo"], 2, "blip-demo, which stage1 does not train; expected one of"),
        ("stage1", ["model.freeze_vit=true"], 2, "nothing gives the image encoder its weights"),
        ("stage1", ["model.vit_checkpoint=none.pth"], 1, "no checkpoint none.pth"),
        ("pretrain", ["schedule.lr=1e30", "schedule.warmup_steps=0"], 1, "not a number at step"),
        ("stage1", ["schedule.lr=1e30", "schedule.warmup_steps=0"], 1, "not a number at step"),
    ],
)
def test_misuse_is_said_in_a_sentence(tmp_path: Path, pictures: Path, task: str, sets: list[str], code: int, said: str) -> None:
    file = written(tmp_path, short(tmp_path, pictures, task))
    result = call(task, "--config", file, *(word for each in sets for word in ("--set", each)))
    assert result.exit_code == code, result.output
    assert said in result.output
    assert "Traceback" not in result.output
    assert not list((tmp_path / "out").glob("*.safetensors"))


# --- the demo's weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "log"), [("weights", "training.log"), ("blip2", "training-blip2.log")])
def test_the_demos_weights_are_of_their_log(name: str, log: str) -> None:
    file = DEMO / f"{name}.safetensors"
    assert file.stat().st_size <= 12_000_000
    rows = [json.loads(line) for line in (DEMO / log).read_text("utf-8").splitlines()]
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    assert about["command"] == rows[0]["command"]
    assert about["seed"] == "1"
    found = {**rows[-1], **rows[-1].get("metrics", {})}
    assert found["txt_r1"] >= 90
    assert found["img_r1"] >= 80


def test_re_ranking_leads_the_embeddings_of_the_demo() -> None:
    found = json.loads((DEMO / "training.log").read_text("utf-8").splitlines()[-1])
    assert found["txt_r1"] > found["itc_txt_r1"]
    assert found["img_r1"] > found["itc_img_r1"]


def test_the_demos_weights_are_of_its_preset() -> None:
    assert demo_blip().cfg == PRESETS["blip-demo"]
    with safe_open(DEMO / "weights.safetensors", "pt") as file:
        assert set(file.keys()) <= {name for name, _ in demo_blip().named_parameters()}
