"""What a model is measured by while it learns: recall, captions or answers. All processes know the same figures."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule

from models.blip import BlipRetrieval
from models.blip2 import Blip2Retrieval
from models.blip2_llm import Blip2Llm
from models.captioner import BlipCaptioner
from models.config import Config, GenerationConfig
from models.errors import UserError
from models.vqa import BlipVqa
from postprocess import caption_metrics, vqa_accuracy
from postprocess.references import Asked
from preprocess.checked import Id
from preprocess.questioned import read_questioned
from preprocess.text import CaptionTokenizer
from preprocess.workers import workers_of
from training import sources
from training.data import read_pictures
from training.describe import CAPTION, VQA, Speech, check_room, speech_of, texts_of
from training.gather import processes, rank
from training.recall import recall
from training.settings import Settings, Source
from training.settings_check import BEST, RECALLS
from training.whole import by_the_first

Metrics = dict[str, float]
Measure = Callable[[nn.Module], Metrics]
HELD_OUT = "val"  # the split that is measured on when none is named
SCORED = BEST["caption"][1:]  # the figures that postprocess gives; the first is made of two of them


def measure_of(
    settings: Settings, config: Config, words: CaptionTokenizer | None, learner: nn.Module, device: torch.device
) -> Measure | None:
    """What measures the model of `learner` on data.validation; None when nothing is measured.

    Args:
        words: of a model that finds pictures and captions.

    Raises UserError and Misuse for files that cannot be used.
    """
    source = settings.data.validation
    if settings.metric == "none" or source is None:
        return None
    if settings.metric == "recall":
        assert words
        inside = _recall(settings, source, config, words)
    else:
        assert isinstance(config, GenerationConfig)
        inside = {CAPTION: _captions, VQA: _answers}[settings.metric](settings, source, config)

    def measure(model: nn.Module) -> Metrics:
        with _whole(learner, device):
            found = inside(model)
        return by_the_first(lambda: found)  # a tie may fall otherwise on another device, and all must choose the same best

    return measure


def _recall(settings: Settings, source: Source, config: Config, words: CaptionTokenizer) -> Measure:
    data = read_pictures(_pictures(source), words, config, workers_of(settings.data.workers))

    def measure(model: nn.Module) -> Metrics:
        assert isinstance(model, BlipRetrieval | Blip2Retrieval)
        found = recall(model, data, words.encode_id, settings.run.eval_batchsize)
        txt, img = (float(np.mean([found[name] for name in RECALLS if name.startswith(way)])) for way in ("txt", "img"))
        return {**found, "txt_r_mean": txt, "img_r_mean": img, "r_mean": (txt + img) / 2}

    return measure


def _captions(settings: Settings, source: Source, config: GenerationConfig) -> Measure:
    """Those metrics that need no Java, and what LAVIS chooses by: CIDEr and Bleu_4 added (lavis/tasks/captioning.py)."""
    data = _pictures(source)
    speech = speech_of(settings, config, CAPTION)
    files = [data.pictures[n] for n in data.picture]
    prompts = speech.prompts([None] * len(files))
    check_room(speech, prompts)

    def measure(model: nn.Module) -> Metrics:
        texts = _texts_of_all(model, speech, files, prompts)
        found = caption_metrics.judge(dict(enumerate(data.texts)), dict(enumerate(texts)), names=SCORED).corpus
        figures = {name: found[name] or 0.0 for name in SCORED}
        return {"agg": figures["CIDEr"] + figures["Bleu_4"], **figures}

    return measure


def _answers(settings: Settings, source: Source, config: GenerationConfig) -> Measure:
    """VQA accuracy of answers that are written, in percent."""
    annotations, images = _files(source)
    data = read_questioned(images, *((source.questions, annotations) if source.questions else (annotations,)))
    if not data.questions[0].answers:  # all have some, or none has
        raise UserError(f"{annotations} holds questions without answers; data.validation needs both.")
    speech = speech_of(settings, config, VQA)
    files = [images / data.pictures.names[question.image] for question in data.questions]
    prompts = speech.prompts([question.question for question in data.questions])
    check_room(speech, prompts)
    people: dict[Id, Asked] = {number: Asked(tuple(question.answers)) for number, question in enumerate(data.questions)}

    def measure(model: nn.Module) -> Metrics:
        texts = _texts_of_all(model, speech, files, prompts)
        return {"accuracy": vqa_accuracy.judge(people, dict(enumerate(texts))).overall}

    return measure


def _pictures(source: Source) -> sources.Samples:
    """Each picture with all its captions."""
    annotations, images = _files(source)
    return sources.read_source(sources.Source(source.kind, annotations, images, split=source.split or HELD_OUT, per_picture=True))


def _files(source: Source) -> tuple[Path, Path]:
    assert source.annotations  # training/settings_check.py asks for both
    assert source.images
    return source.annotations, source.images


def _texts_of_all(model: nn.Module, speech: Speech, files: Sequence[Path], prompts: Sequence[str]) -> list[str]:
    """Each process writes its part; all get all."""
    assert isinstance(model, BlipCaptioner | BlipVqa | Blip2Llm)
    first, last = (len(files) * number // processes() for number in (rank(), rank() + 1))
    texts = texts_of(model, speech, files[first:last], prompts[first:last])
    if processes() == 1:
        return texts
    parts: list[list[str]] = [[] for _ in range(processes())]
    distributed.all_gather_object(parts, texts)
    return [text for part in parts for text in part]


@contextmanager
def _whole(learner: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it each process holds all weights, and runs the model without telling the others; its random numbers go on after
    it as if nothing had been measured."""
    shares = [module for module in learner.modules() if isinstance(module, FSDPModule)]
    hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in shares]
    for module in shares:
        module.unshard()
        # FSDP's own would let weights go behind each layer, and count on all processes to fetch them again as often.
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        with torch.random.fork_rng([device], device_type=device.type) if device.type != "cpu" else torch.random.fork_rng([]):
            yield
    finally:
        for module, (before, after) in zip(shares, hooks, strict=True):
            module._forward_pre_hooks, module._forward_hooks = before, after
            module.reshard()
