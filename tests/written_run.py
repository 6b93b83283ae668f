"""Tiny data/ folders of pictures, with captions or questions, and the outputs/ of runs that write texts about them: what
blip-post --captions and --vqa read, without a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models import manifest
from models.config_file import to_dict
from preprocess.tensors import PACKED
from tests.classify_run import write
from tests.tiny import TINY_CAPTION, TINY_VQA

SIZE = 24
# One reference is what a model might say; the last picture's is of nothing that it says.
PEOPLE = (
    ("A woman cutting a large white sheet cake.", "there is a woman that is cutting a white cake"),
    ("Loads of old motorbikes, parked on the street!", "A motorcycle parked in a parking space next to another motorcycle."),
    ("A picture of a dog laying on the ground.", "The white dog lays next to the bicycle on the sidewalk."),
    ("Two birds on a wire.", "A pair of birds sit together."),
)
CAPTIONS = (
    "a woman cutting a cake with a knife",
    "a motorcycle parked on the street",
    "a white dog laying next to a bike",
    "soup",
)
# 100, 0 and 60 percent: the three questions of VQAEval's example.
QUESTIONS: tuple[dict[str, Any], ...] = (
    {
        "question": "How many birds?",
        "answers": ["2"] * 7 + ["two"] * 2 + ["3"],
        "answer_type": "number",
        "question_type": "how many",
    },
    {"question": "Is it a dog?", "answers": ["yes"] * 10, "answer_type": "yes/no", "question_type": "is it"},
    {
        "question": "What color is it?",
        "answers": ["light blue"] * 2 + ["blue"] * 6 + ["grey"] * 2,
        "answer_type": "other",
        "question_type": "what color",
    },
)
ANSWERS = ("Two.", "no", "light blue")


@dataclass(frozen=True)
class WrittenRun:
    """The two folders."""

    data: Path
    outputs: Path


def make_caption_run(
    root: Path,
    captions: Sequence[str] = CAPTIONS,
    references: Sequence[Sequence[str]] = PEOPLE,
    data: dict[str, Any] | None = None,
    outputs: dict[str, Any] | None = None,
    more: Sequence[str] = (),
) -> WrittenRun:
    """`more` is what else was written about each picture; `data` and `outputs` replace parts of the manifests."""
    made = _data(root / "data", TINY_CAPTION, "caption", len(captions), {"references": [list(r) for r in references]}, data or {})
    ids = [image["image_id"] for image in ((outputs or {}).get("data") or made.content)["images"]]
    results = [{"image_id": each, "caption": text} for each, text in zip(ids, captions, strict=True)]
    rows = [_row("image", n, "a picture of ", [text, *more]) for n, text in enumerate(captions)]
    return _outputs(root, made, TINY_CAPTION, {"captions.json": results, "generated.json": rows}, outputs or {})


def make_vqa_run(
    root: Path,
    answers: Sequence[str] = ANSWERS,
    questions: Sequence[dict[str, Any]] = QUESTIONS,
    data: dict[str, Any] | None = None,
    outputs: dict[str, Any] | None = None,
    pictures: int = 2,
) -> WrittenRun:
    """Question n is about picture n modulo `pictures`; `data` and `outputs` replace parts of the manifests."""
    first = 0 if "data" in (outputs or {}) else 100
    asked = [{"question_id": first + n, "image": n % pictures, **each} for n, each in enumerate(questions)]
    made = _data(root / "data", TINY_VQA, "vqa", pictures, {"questions": asked}, data or {})
    results = [{"question_id": each["question_id"], "answer": text} for each, text in zip(asked, answers, strict=True)]
    rows = [_row("question", n, asked[n]["question"].lower().rstrip("?"), [text]) for n, text in enumerate(answers)]
    return _outputs(root, made, TINY_VQA, {"answers.json": results, "generated.json": rows}, outputs or {})


def named_pictures(root: Path, count: int) -> dict[str, Any]:
    """What the outputs' manifest says of `count` pictures that the command line named; they lie below `root`."""
    images = []
    for number in range(count):
        path = root / f"named/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (60 * number, 90, 120)).save(path)
        images.append({"image": f"named/{number}.png", "image_id": number, "sha256": manifest.file_record(path)["sha256"]})
    return {"digest": "3" * 64, "images": images, "folder": str(root)}


def sign(folder: Path, **parts: Any) -> None:
    """Complete a folder again whose files were changed, with `parts` of its manifest replaced."""
    found = json.loads((folder / manifest.NAME).read_text("utf-8"))
    content = {key: found[key] for key in found.keys() - {"format", "kind", "made_by", "files"}}
    (folder / manifest.NAME).unlink()
    manifest.write(folder, found["kind"], content | parts)


def _data(
    folder: Path, config: Any, task: str, pictures: int, texts: dict[str, Any], replaced: dict[str, Any]
) -> manifest.Manifest:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    img = random.normal(size=(pictures, 3, SIZE, SIZE)).astype(np.float32)
    content = {
        "task": task,
        "layout": PACKED,
        "tensors": {"img": write(folder, "img", img)},
        "protocol": {
            **dataclasses.asdict(config.protocol),
            "image_size": SIZE,
            "tokenizer_sha256": "0" * 64,
            "pillow": "13.0.0",
        },
        "images": [
            {"image": f"set/{40 + n:03d}.jpg", "width": 60 + n % 9, "height": 40, "image_id": 40 + n} for n in range(pictures)
        ],
        **texts,
        "broken": [],
    }
    return manifest.write(folder, "data", content | replaced)


def _row(key: str, number: int, prompt: str, texts: list[str]) -> dict[str, Any]:
    scores = [-0.5 - place for place in range(len(texts))]
    return {key: number, "prompt": prompt, "texts": texts, "scores": scores, "tokens": [len(text.split()) for text in texts]}


def _outputs(
    root: Path, data: manifest.Manifest, config: Any, files: dict[str, list[Any]], replaced: dict[str, Any]
) -> WrittenRun:
    folder, task = root / "outputs", data.content["task"]
    folder.mkdir()
    for name, rows in files.items():
        (folder / name).write_text(json.dumps(rows), "utf-8")
    parity = {
        "graph": "text_decoder",
        "output": "logits",
        "cases": "(1,) (3,)",
        "max_abs": 1.5e-6,
        "max_rel": 2e-6,
        "bound": 1e-4,
    }
    content = {
        "task": task,
        "options": {"as": "blip", "prompt": "a picture of ", "num_beams": 3, "max_length": 20, "rule": "original-blip"},
        "graphs": {
            "digest": "1" * 64,
            "folder": "build/graphs",
            "model": f"blip-{task}-demo",
            "config": to_dict(config),
            "opset": 18,
            "target": "ort",
            "precision": "float32",
            "checkpoint": {"file": "weights.safetensors", "sha256": "2" * 64},
            "parity": [parity],
            "used": ["image_kv", "text_decoder"],
        },
        "data": {"digest": data.digest, "folder": str(data.folder)},
        "backend": {"provider": "cpu", "onnxruntime": "1.31.1", "threads": 2, "batchsize": 8, "use_past": True},
        "timings": [{"stage": "captions", "items": len(files["generated.json"]), "seconds": 1.5, "resumed": 0}],
    }
    manifest.write(folder, "outputs", content | replaced)
    return WrittenRun(data.folder, folder)
