"""A training in Python: `Trainer(task="caption", model="blip-caption-base", args="mine.yaml")`, over what blip-train calls.

N pictures, M texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.blip import BlipRetrieval
from models.blip2 import Blip2Retrieval
from models.config import BlipCaptionConfig, GenerationConfig
from models.errors import Misuse, UserError
from preprocess.images import normalise, read_image
from training.describe import CAPTION, VQA, speech_of, texts_of
from training.fit import Fitted, device_of, fit
from training.loader import tokenised
from training.parallel import DDP, joined
from training.recall import similarities
from training.settings import Settings
from training.settings_check import MODELS
from training.settings_file import read_settings
from training.state import MODEL
from training.task import Task, task_of
from training.validate import Metrics, measure_of
from training.whole import tensors_of
from training.written import WEIGHTS


class Trainer:
    """One training: what it is told, what it comes to, and what its model is good for."""

    def __init__(
        self,
        task: str,
        model: str | Mapping[str, Any] | None = None,
        args: Settings | Mapping[str, Any] | str | Path | None = None,
        **changes: Any,
    ) -> None:
        """
        Args:
            task: pretrain, stage1, stage2, caption, retrieval or vqa.
            model: name of a preset of sizes, in place of what `args` say; or settings of the model, `{"lora": {"rank": 16}}`.
            args: a settings file, the name of a preset, the keys of such a file as a mapping, or `Settings`.
            changes: single settings, `run={"out": "build/mine", "epochs": 2}`.

        Raises Misuse as `read_settings`, and when `args` are of another task.
        """
        if task not in MODELS:
            raise Misuse(f"task is {task!r}; expected one of {', '.join(MODELS)}.")
        named = {} if model is None else {"model": {"name": model, "config": None} if isinstance(model, str) else model}
        if not isinstance(args, Settings | Mapping | str | Path | None):
            raise Misuse(f"args is of the type {type(args).__name__}; expected a file, a preset, keys with values, or Settings.")
        settings = read_settings({} if args is None else args, [named, changes], task)
        if settings.task != task:
            raise Misuse(f"args are of the task {settings.task}; expected {task}.")
        self.settings = settings
        self._task: Task | None = None  # with weights to measure and to ask ...
        self._filled: Path | None = None  # ... from this file; None: those that a training would start from

    def train(self, resume: bool = False, max_steps: int | None = None) -> Fitted:
        """As `blip-train TASK`: states, log and, at the end, the weights in `run.out`. Raises as `training.fit.fit`."""
        self._task = None
        return fit(self.settings, resume, max_steps)

    def evaluate(self, weights: str | Path | None = None) -> Metrics:
        """What data.validation says of the weights that the training ended with, of others (a file, or the folder of a state),
        or of those that it would start from. Raises Misuse when there is no data.validation."""
        with joined(device_of(self.settings), DDP, self.settings.parallel.backend) as place:
            task = self._ready(weights, place.device)
            measure = measure_of(self.settings, task.config, task.words, task.model, place.device)
            if measure is None:
                raise Misuse("Nothing says what to measure on; expected data.validation, and run.validate not none.")
            return measure(task.model)

    def predict(
        self,
        images: str | Path | Sequence[str | Path],
        texts: str | Sequence[str] | None = None,
        weights: str | Path | None = None,
    ) -> list[str] | np.ndarray:
        """What the model says of pictures.

        Args:
            images: N files; one may stand by itself.
            texts: the question of each, where the model answers; M captions, where it finds pictures and captions.

        Returns the caption or answer of each picture; of a model that finds, how alike each picture and each caption are,
        (N, M) float32, by their embeddings. Raises UserError for a picture that cannot be read, Misuse for texts that are
        missing, too many or too few.
        """
        with joined(device_of(self.settings), DDP, self.settings.parallel.backend) as place:
            task, texts = self._ready(weights, place.device), [texts] if isinstance(texts, str) else texts
            files = _files(images)
            model, config = task.model, task.config
            if not isinstance(config, GenerationConfig):
                if texts is None:
                    raise Misuse(f"task {self.settings.task} compares pictures with captions; give predict both.")
                return self._alike(task, files, texts, place.device)
            if isinstance(config, BlipCaptionConfig) and texts is not None:
                raise Misuse("BLIP's captioner describes pictures and answers no questions; leave texts out.")
            questions = self.settings.task == "vqa" or texts is not None
            if questions and (texts is None or len(texts) != len(files)):
                raise Misuse(f"There are {len(files)} pictures and {len(texts or ())} questions; expected one for each picture.")
            speech = speech_of(self.settings, config, VQA if questions else CAPTION)
            prompts = speech.prompts(list(texts) if texts is not None else [None] * len(files))
            return texts_of(model, speech, files, prompts)  # type: ignore[arg-type]

    def _ready(self, weights: str | Path | None, device: torch.device) -> Task:
        """The model with these weights, read once."""
        own = self.settings.run.out / WEIGHTS
        path = Path(weights) if weights is not None else own if own.is_file() else None
        if self._task is None or path != self._filled:
            self._task = None
            lora = self.settings.model.lora if path and path.is_dir() else None  # a state has it apart, finished weights merged
            plain = replace(self.settings.model, lora=lora, momentum=None)
            task = task_of(replace(self.settings, model=plain))
            if path:
                _fill(task, path / MODEL if path.is_dir() else path)
            self._task, self._filled = task, path
        self._task.model.to(device).eval().requires_grad_(False)
        return self._task

    @torch.inference_mode()
    def _alike(self, task: Task, files: Sequence[Path], texts: Sequence[str], device: torch.device) -> np.ndarray:
        if not files or not texts:
            return np.zeros((len(files), len(texts)), np.float32)
        model, config, words = task.model, task.config, task.words
        assert isinstance(model, BlipRetrieval | Blip2Retrieval)
        assert words
        protocol, rows = config.protocol, self.settings.run.eval_batchsize
        feats = []
        for start in range(0, len(files), rows):
            pixels = [read_image(file, config.vision.image_size, protocol.interpolation) for file in files[start : start + rows]]
            image = torch.from_numpy(normalise(np.stack(pixels), protocol.mean, protocol.std)).to(device)
            feats.append(model.image_feat(image))
        ids, mask = (torch.from_numpy(x).to(device) for x in tokenised(texts, words, protocol.max_words, protocol.max_length))
        found: Tensor = similarities(model, torch.cat(feats), model.text_embed(ids, mask))  # (N, M)
        return found.float().cpu().numpy()


def _files(images: Any) -> list[Path]:
    given = [images] if isinstance(images, str | Path) or not isinstance(images, Sequence) else images
    for image in given:
        if not isinstance(image, str | Path):
            raise Misuse(f"images holds a value of the type {type(image).__name__}; expected names of picture files.")
    return [Path(image) for image in given]


def _fill(task: Task, path: Path) -> None:
    """Put the weights of a finished training into its model. Raises UserError when they are of another one."""
    try:
        given = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as weights of a training ({str(error).rstrip('.')}).") from error
    ours = tensors_of(task.model)
    frozen = {
        name for name, parameter in task.model.named_parameters() if not parameter.requires_grad
    }  # may be in their own files
    left_out = ours.keys() - given.keys() - frozen
    for name in sorted(left_out | given.keys()):
        their, our = ("nothing" if name not in found else tuple(found[name].shape) for found in (given, ours))
        if their != our:
            raise UserError(f"{path} is of another model: as {name} it has {their}, expected is {our}.")
    for name, parameter in task.model.named_parameters():
        if name in given:  # a matrix that LoRA was merged into is float32 where the language model has half
            parameter.data = parameter.data.to(given[name].dtype)
    task.model.load_state_dict(given, strict=False)
