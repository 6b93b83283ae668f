"""The whole chain on a tiny random model: export, preprocess, run, as a user would call them. Shared by several test files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from click import Command
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

import export.__main__
import postprocess.__main__
import preprocess.__main__
import runtime.__main__
from models import manifest
from models.blip2 import Retrieval
from models.config import Config
from models.config_file import to_dict
from tests.tiny import random_model

# 58 tokens; 60 with [DEC] and [ENC], as TINY has, 59 with [DEC], as TINY2 has. A "long" word is two tokens, so 30 of them do
# not fit in 35.
WORDS = [f"word{n}" for n in range(43)]
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(f"long{n}" for n in range(5)), *(f"##er{n}" for n in range(5))]
OWN = (1, 3, 2, 5, 1, 4, 2, 1, 3, 2, 5, 1, 2, 3)  # captions of each picture: 14 pictures, 35 captions
STATIC = 3  # batch of the graphs for ATC: no divisor of anything here, so every stage ends in a padded batch


def call(command: Command, *args: object) -> Result:
    """Run a console command in this process. What it did not foresee is raised here."""
    result = CliRunner().invoke(command, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refusal(result: Result, code: int = 1) -> str:
    """The message of a command that must have failed with `code`."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    line = result.stderr.splitlines()[-1]
    return line.removeprefix("Error: ")


def done(result: Result) -> str:
    """What a command that must have succeeded printed."""
    assert result.exit_code == 0, result.output
    return result.stdout


def write_model(folder: Path, model: Retrieval) -> list[object]:
    """Write what blip-export reads; returns the options that name it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_dict(model.cfg)), "utf-8")
    (folder / "vocab.txt").write_text("\n".join(_tokens(model.cfg)) + "\n", "utf-8")
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    return [
        *("--config", folder / "config.json"),
        *("--checkpoint", folder / "model.safetensors"),
        *("--tokenizer", folder / "vocab.txt"),
    ]


def export_graphs(folder: Path, *options: object, model: Retrieval | None = None) -> Path:
    """blip-export of `model` (TINY, seed 0 when None) to folder/graphs."""
    named = write_model(folder / "model", model or random_model())
    done(call(export.__main__.main, *named, "--out", folder / "graphs", *options))
    return folder / "graphs"


def write_pictures(folder: Path, own: tuple[int, ...] = OWN, seed: int = 0) -> Path:
    """PNGs of several sizes with `own[n]` captions each, and their annotations; returns the annotation file."""
    random = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    entries = []
    for n, captions in enumerate(own):
        height, width = random.integers(20, 70, 2)
        # Smooth blobs: white noise would be averaged to the same grey in every picture.
        coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((int(width), int(height))).save(folder / "images" / f"{n}.png")
        entries.append({"image": f"{n}.png", "caption": [_caption(random) for _ in range(captions)]})
    path = folder / "annotations.json"
    path.write_text(json.dumps(entries), "utf-8")
    return path


def prepare(folder: Path, graphs: Path, *options: object, seed: int = 0, own: tuple[int, ...] = OWN) -> Path:
    """blip-pre of new random pictures to folder/data."""
    annotations = write_pictures(folder, own, seed)
    named = ("--annotations", annotations, "--images", folder / "images", "--graphs", graphs, "--out", folder / "data")
    done(call(preprocess.__main__.main, "retrieval", *named, "--workers", 1, *options))
    return folder / "data"


def run(graphs: Path, data: Path, out: Path, *options: object, task: str = "retrieval") -> Result:
    """blip-run on one thread."""
    named = ("--graphs", graphs, "--data", data, "--out", out, "--threads", 1)
    return call(runtime.__main__.main, task, *named, *options)


def recall(outputs: Path, out: Path) -> dict[str, Any]:
    """blip-post; returns the metrics after re-ranking."""
    done(call(postprocess.__main__.main, "--recall", "--outputs", outputs, "--out", out))
    report = json.loads((out / "report.json").read_text("utf-8"))
    metrics: dict[str, Any] = report["metrics"]["reranked"]
    return metrics


def with_only(graphs: Path, out: Path, *names: str) -> Path:
    """A copy of a graphs/ folder with some of its graphs, as --graphs would have written it."""
    found = manifest.read(graphs, "graphs")
    shutil.copytree(graphs, out)
    for name in found.content["graphs"].keys() - set(names):
        (out / f"{name}.onnx").unlink()
    rewritten = {**found.content, "graphs": {name: found.content["graphs"][name] for name in names}}
    (out / manifest.NAME).unlink()
    manifest.write(out, "graphs", rewritten)
    return out


def _tokens(config: Config) -> list[str]:
    """TOKENS, filled up to the vocabulary of `config` without what the tokenizer adds to it."""
    added = {config.protocol.decode_token, config.protocol.encode_token} - set(TOKENS)
    return [*TOKENS, *(f"[unused{n}]" for n in range(config.text.vocab - len(added) - len(TOKENS)))]


def _caption(random: np.random.Generator) -> str:
    """One word up to more than a caption can hold."""
    words = [*WORDS, *(f"long{n}er{n}" for n in range(5))]
    return " ".join(random.choice(words, random.choice([1, 2, 4, 7, 12, 20, 30, 40])))
