"""training/validate.py and training/describe.py: captions and answers are measured while a model learns, as the exported model is
measured afterwards, and the best state stays.

Pictures are of one of four colours, and what is said of each colour is always the same: tiny models learn it in seconds.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import export.__main__
import postprocess.__main__
import preprocess.__main__
import runtime.__main__
from models.config import Blip2LlmConfig
from models.config_file import to_dict
from models.errors import Misuse, UserError
from models.fit import generator_of
from tests import chain
from tests.generators import speaking, write_vocabulary
from tests.make_generator import write_llm
from tests.tiny import fill
from tests.trainings import assert_one_training, equal, logged, sizes, trained, weights, written
from tests.two_processes import train_two
from training.describe import CAPTION, VQA, speech_of, texts_of
from training.fit import fit
from training.settings_file import read_settings

COLOURS = ((250, 20, 20), (20, 250, 20), (20, 20, 250), (230, 230, 230))
SAID = ("a red ball on the dog", "two cats", "the dog is red", "a picture of a cat on a ball")
ANSWERS = ("red", "ball", "dog", "cat")  # which cleaning leaves as they are
COUNT = 24
# Adam's way from random weights to these texts.
SCHEDULE = {"kind": "lavis", "lr": 3e-3, "min_lr": 0.0, "warmup_lr": 1e-5, "warmup_steps": 2}
METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    captions, questions = [], []
    for n in range(COUNT):
        kind = n % 4
        pixels = np.clip(np.array(COLOURS[kind]) + random.integers(-20, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        captions.append({"image": f"{n}.png", "caption": [SAID[kind], f"{SAID[kind]} on the dog"]})
        for m, asked in enumerate(("What color is it?", "what is on the ball")):  # about one picture, not side by side
            answers = [ANSWERS[kind]] * 3 if m else ["red", "red", "two"]
            questions.append({"image": f"{n}.png", "question": asked, "question_id": n + COUNT * m, "answer": answers})
    questions.sort(key=lambda each: each["question_id"])
    (folder / "captions.json").write_text(json.dumps(captions), "utf-8")
    (folder / "odd.json").write_text(json.dumps(captions[:-1]), "utf-8")
    (folder / "questions.json").write_text(json.dumps(questions), "utf-8")
    return folder


def described(folder: Path, pictures: Path, kind: str, **run: Any) -> dict[str, Any]:
    """Settings of a short training of a BLIP of `kind`, measured on what it learns."""
    config = speaking(kind)
    words = write_vocabulary(folder / "words", config)
    source = {"annotations": str(pictures / "captions.json"), "images": str(pictures)}
    if kind == "vqa":
        source = {"kind": "vqa", "annotations": str(pictures / "questions.json"), "images": str(pictures)}
    prompt = {"prompt": "a picture of"} if kind == "caption" else {}
    return {
        "task": kind,
        "model": {"freeze_vit": False, "config": sizes(folder, config), "tokenizer": str(words), **prompt},
        "data": {"train": [source], "validation": source, "workers": 1, "crop_scale": None, "flip": 0.0},
        "schedule": SCHEDULE,
        "run": {
            "steps": 80,
            "batchsize": 8,
            "eval_batchsize": 7,
            "precision": "fp32",
            "validate_every": 20,
            "save_every": 20,
            "keep": 1,
            "generation": {"num_beams": 3, "min_length": 1, "max_length": 16},
            "out": str(folder / "out"),
            **run,
        },
    }


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """A captioner that has learnt: the folder of its training, the settings, the weights."""
    folder = tmp_path_factory.mktemp("captioner")
    values = described(folder, pictures, "caption")
    return folder, values, weights(trained(folder, values))


def test_captions_are_measured_and_the_best_stays(captioner: tuple[Path, dict[str, Any], dict[str, Tensor]]) -> None:
    folder, _, _ = captioner
    found = logged(folder, "metrics")
    assert list(found) == [20, 40, 60, 80]
    assert all(set(metrics) == {"agg", *METRICS} for metrics in found.values())
    assert all(metrics["agg"] == pytest.approx(metrics["CIDEr"] + metrics["Bleu_4"]) for metrics in found.values())
    assert max(metrics["CIDEr"] for metrics in found.values()) > 2
    best = max(found, key=lambda step: (found[step]["agg"], -step))
    assert {path.name for path in (folder / "out").glob("step-*")} == {"step-0000080", f"step-{best:07d}"}


def test_measuring_changes_nothing(captioner: tuple[Path, dict[str, Any], dict[str, Tensor]], tmp_path: Path) -> None:
    _, values, found = captioner
    assert equal(found, weights(trained(tmp_path, values, "data.validation=null", f"run.out={tmp_path / 'out'}")))


def test_it_is_what_the_exported_model_is_measured_to_be(
    captioner: tuple[Path, dict[str, Any], dict[str, Tensor]], pictures: Path, tmp_path: Path
) -> None:
    """blip-export, blip-pre, blip-run and blip-post after the last step give the figures that were logged there."""
    folder, values, _ = captioner
    named = ["--config", values["model"]["config"], "--checkpoint", folder / "out" / "weights.safetensors"]
    graphs, data, out, report = (tmp_path / name for name in ("graphs", "data", "outputs", "report"))
    chain.done(
        chain.call(export.__main__.main, *named, "--tokenizer", values["model"]["tokenizer"], "--out", graphs, "--target", "ort")
    )
    source = ["--annotations", pictures / "captions.json", "--images", pictures]
    chain.done(chain.call(preprocess.__main__.main, "caption", *source, "--graphs", graphs, "--out", data))
    asked = ["--prompt", "a picture of", "--num-beams", 3, "--min-length", 1, "--max-length", 16]
    chain.done(chain.call(runtime.__main__.main, "caption", "--graphs", graphs, "--data", data, "--out", out, *asked))
    chain.done(chain.call(postprocess.__main__.main, "--captions", "--outputs", out, "--out", report))
    wanted = json.loads((report / "report.json").read_text("utf-8"))["metrics"]
    found = logged(folder, "metrics")[80]
    assert {name: found[name] for name in METRICS} == pytest.approx({name: wanted[name] for name in METRICS})
    assert found["agg"] == pytest.approx(wanted["agg_metrics"])
    written = json.loads((out / "captions.json").read_text("utf-8"))
    assert len({each["caption"] for each in written}) > 1  # otherwise equal figures would mean little


def test_another_figure_may_choose(captioner: tuple[Path, dict[str, Any], dict[str, Tensor]], tmp_path: Path) -> None:
    _, values, _ = captioner
    sets = ["run.best=ROUGE_L", "run.steps=4", "run.validate_every=1", "run.save_every=1", f"run.out={tmp_path / 'out'}"]
    trained(tmp_path, values, *sets)
    found = {step: metrics["ROUGE_L"] for step, metrics in logged(tmp_path, "metrics").items()}
    best = max(found, key=lambda step: (found[step], -step))
    assert {path.name for path in (tmp_path / "out").glob("step-*")} == {"step-0000004", f"step-{best:07d}"}


def test_answers_are_measured(tmp_path: Path, pictures: Path) -> None:
    values = described(tmp_path, pictures, "vqa", generation={"num_beams": 2, "max_length": 6}, steps=100, validate_every=50)
    fitted = trained(tmp_path, values)
    found = {step: metrics["accuracy"] for step, metrics in logged(tmp_path, "metrics").items()}
    assert found[100] > 50
    # The rule by hand: all of three agree for one question, and two of three for the other.
    settings = read_settings(tmp_path / "settings.yaml")
    model = generator_of(speaking("vqa"))
    model.load_state_dict(weights(fitted), strict=False)
    speech = speech_of(settings, model.cfg, VQA)
    files = [pictures / f"{n}.png" for n in range(COUNT)]
    score = 0.0
    for asked, right in (("What color is it?", None), ("what is on the ball", ANSWERS)):
        texts = texts_of(model, speech, files, speech.prompts([asked] * COUNT))
        for n, text in enumerate(texts):
            words = text.removeprefix("a ")
            score += float(words == right[n % 4].removeprefix("a ")) if right else {"red": 2 / 3, "two": 1 / 3}.get(words, 0.0)
    assert found[100] == pytest.approx(100 * score / (2 * COUNT), abs=0.01)


@pytest.mark.parametrize("kind", ["opt", "llama", "t5"])
def test_the_second_stage_is_measured(tmp_path: Path, pictures: Path, kind: str) -> None:
    """In bf16, with activations that are computed again, with LoRA; captions, and answers with the template of LAVIS."""
    values = stage2(tmp_path, pictures, kind)
    trained(tmp_path, values)
    assert all(np.isfinite(list(metrics.values())).all() for metrics in logged(tmp_path, "metrics").values())
    questions = {"kind": "vqa", "annotations": str(pictures / "questions.json"), "images": str(pictures)}
    sets = [f"data.validation={json.dumps(questions)}", "run.validate=vqa", f"run.out={tmp_path / 'other'}"]
    fitted = fit(read_settings(tmp_path / "settings.yaml", sets))
    lines = [json.loads(line) for line in (tmp_path / "other" / "log.jsonl").read_text("utf-8").splitlines()]
    assert [set(line["metrics"]) for line in lines if "metrics" in line] == [{"accuracy"}] * 2
    assert fitted.weights
    settings = read_settings(tmp_path / "settings.yaml", sets)
    config = speaking(kind)
    assert speech_of(settings, config, VQA).prompts(["What is it?"]) == ["Question: what is it? Short answer:"]
    told = replace(settings, model=replace(settings.model, prompt="Q: {} A:"))
    assert speech_of(told, config, VQA).prompts(["What is it?"]) == ["Q: what is it? A:"]


def stage2(folder: Path, pictures: Path, kind: str) -> dict[str, Any]:
    values = described(folder, pictures, "caption", steps=2, validate_every=1, precision="bf16", checkpointing=kind != "t5")
    config = speaking(kind)
    assert isinstance(config, Blip2LlmConfig)
    model = generator_of(config)
    fill(model, 3, 0.05)
    state = {name.removeprefix("llm_model."): t for name, t in model.llm_model.state_dict().items()}
    write_llm(folder / "llm", config.llm, {name: tensor.half() for name, tensor in state.items()})
    torch.save({"model": {n: t for n, t in model.state_dict().items() if not n.startswith("llm_model.")}}, folder / "stage2.pth")
    (folder / "sizes.json").write_text(json.dumps(to_dict(config)), "utf-8")
    values["task"] = "stage2"
    values["model"] |= {
        "freeze_vit": True,
        "checkpoint": str(folder / "stage2.pth"),
        "llm_checkpoint": str(folder / "llm"),
        "tokenizer": str(write_vocabulary(folder / kind, config)),
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.3},
    }
    return values


def test_texts_of_pictures(captioner: tuple[Path, dict[str, Any], dict[str, Tensor]], pictures: Path) -> None:
    """In any order, some pictures twice, with prompts of several lengths: each as by itself; the model stays as it was."""
    folder, _, state = captioner
    settings = read_settings(folder / "settings.yaml")
    model = generator_of(speaking("caption"))
    model.load_state_dict(state, strict=False)
    speech = speech_of(settings, model.cfg, CAPTION)
    files = [pictures / f"{n}.png" for n in (3, 1, 2, 3, 0, 1, 5, 6, 7, 8)]
    prompts = ["a picture of", "two", "", "the", "a", "a picture of", "", "the dog", "a", "two"]
    model.train()
    texts = texts_of(model, speech, files, prompts)
    assert model.training
    assert texts == [texts_of(model, speech, [file], [prompt])[0] for file, prompt in zip(files, prompts, strict=True)]
    assert len(set(texts)) > 3
    assert texts_of(model, speech, [], []) == []
    with pytest.raises(UserError, match=r"none\.png does not exist"):
        texts_of(model, speech, [pictures / "none.png"], [""])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            "run.generation.max_length=45",
            "run.generation.max_length allows 41 new words after 4 places that are taken, but the model",
        ),
        ("run.generation.max_length=3", "max_length 3 leaves no room for a new word after the 4 that count already"),
        (
            "run.generation={num_beams: 1, length_penalty: 2}",
            "length_penalty is 2.0, but it is read with num_beams above 1 alone",
        ),
        ("run.best=cider", "run.best is cider; did you mean CIDEr?"),
    ],
)
def test_misuse(tmp_path: Path, pictures: Path, changed: str, said: str) -> None:
    """Before the first step."""
    values = described(tmp_path, pictures, "caption")
    with pytest.raises(Misuse, match=said.replace("?", r"\?")):
        trained(tmp_path, values, changed)
    assert not list((tmp_path / "out").glob("step-*"))


def test_questions_without_answers(tmp_path: Path, pictures: Path) -> None:
    bare = [
        {key: each[key] for key in ("image", "question", "question_id")}
        for each in yaml.safe_load((pictures / "questions.json").read_text())
    ]
    (tmp_path / "bare.json").write_text(json.dumps(bare), "utf-8")
    values = described(tmp_path, pictures, "vqa")
    with pytest.raises(UserError, match=r"bare\.json holds questions without answers"):
        trained(tmp_path, values, f"data.validation.annotations={tmp_path / 'bare.json'}")


def test_two_processes_give_one_figure(tmp_path: Path, pictures: Path) -> None:
    """That of one process, and the training goes on as its. The two write different numbers of texts: a process that counted
    on the other to run the model as often would wait for ever."""
    values = stage2(tmp_path, pictures, "opt")
    values["model"].pop("lora")
    values["run"] |= {"precision": "fp32", "checkpointing": False, "steps": 3, "eval_batchsize": 5, "batchsize": 4}
    values["data"]["validation"]["annotations"] = str(pictures / "odd.json")
    one = weights(trained(tmp_path, values))
    figures = logged(tmp_path, "metrics")
    assert max(metrics["Bleu_1"] for metrics in figures.values()) > 0
    file, modes = written(tmp_path, values), ("ddp", "full_shard")
    sets = {mode: (f"parallel.mode={mode}", "run.batchsize=2", f"run.out={tmp_path / mode / 'out'}") for mode in modes}
    train_two(*(["stage2", "--config", file, *(f"--set={said}" for said in sets[mode])] for mode in modes))
    for mode in modes:
        assert list(logged(tmp_path / mode, "metrics")) == list(figures) == [1, 2, 3]
        for step, metrics in logged(tmp_path / mode, "metrics").items():
            assert metrics == pytest.approx(figures[step], abs=1e-9)
        assert_one_training(one, load_file(tmp_path / mode / "out" / "weights.safetensors"))
