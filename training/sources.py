"""Where training samples come from: captions or questions of pictures, from one file or from several that are joined.

These forms are read:
    karpathy   the lists {"image", "caption"} of salesforce/BLIP (COCO, Flickr30k), LAVIS and mindformers (also Visual
               Genome's vg_caption.json, and any list of one's own), and Karpathy's dataset_*.json: one split of it
    flickr8k   lines `name.jpg#0<TAB>caption`, with Flickr_8k.<split>Images.txt beside them
    vqa        BLIP's lists {"image", "question", "answer"} (vqa_train.json, vg_qa.json), or VQA v2's questions and annotations

N samples, P pictures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.errors import Misuse, UserError
from preprocess.annotations import load_json, read_annotations
from preprocess.lines import SUFFIXES, read_flickr
from preprocess.pictures import check_folder
from preprocess.questioned import Question, read_questioned

KARPATHY, FLICKR8K, VQA = "karpathy", "flickr8k", "vqa"
KINDS = (KARPATHY, FLICKR8K, VQA)
GENOME = "vg"  # the "dataset" of Visual Genome's questions in BLIP's lists
GENOME_WEIGHT = 0.2  # of their only answer, salesforce/BLIP data/vqa_dataset.py

Answers = tuple[tuple[str, float], ...]  # answers, each once, with the weight of its loss


@dataclass(frozen=True)
class Source:
    """One file of samples."""

    kind: str  # one of KINDS
    annotations: Path  # of VQA v2 its annotations, with its `questions` apart
    images: Path  # the folder that the paths of the pictures start from
    questions: Path | None = None  # VQA v2's; None where questions and answers are in one file
    split: str = "train"  # chooses from Karpathy's own file and from Flickr8k's
    weight: float = 1.0  # how often each of its samples is seen in an epoch: see training/order.py
    per_picture: bool = False  # a sample is a picture with one of its captions, instead of a caption with its picture


@dataclass(frozen=True)
class Part:
    """The samples of one source, which follow one another."""

    name: str  # its file
    count: int
    weight: float = 1.0


@dataclass(frozen=True)
class Samples:
    """What a training sees. Pictures are known by their path, so that two captions of one picture have the same number."""

    pictures: tuple[Path, ...]  # P, each once
    picture: np.ndarray  # (N,) int64: number of the picture; equal numbers share the target of a soft-target loss
    texts: tuple[tuple[str, ...], ...]  # N: the captions to draw one from, or the question; as annotated
    parts: tuple[Part, ...]  # in the order of the samples
    answers: tuple[Answers, ...] | None = None  # N, None where texts are captions

    def __post_init__(self) -> None:
        name = " and ".join(part.name for part in self.parts) or "The set"
        counts = {"pictures": len(self.picture), "texts": len(self.texts), "samples in parts": sum(p.count for p in self.parts)}
        if self.answers is not None:
            counts["lists of answers"] = len(self.answers)
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{count:,} {what}" for what, count in counts.items())
            raise UserError(f"{name}: {found}; expected as many of each.")
        if not len(self.picture):
            raise UserError(f"{name} holds no sample; there is nothing to train on.")
        if not 0 <= self.picture.min() <= self.picture.max() < len(self.pictures):
            raise UserError(f"{name}: a sample is of a picture beyond the {len(self.pictures):,} that there are.")

    def __len__(self) -> int:
        return len(self.picture)


def read_sources(sources: Sequence[Source]) -> Samples:
    """The samples of all sources, one after the other.

    Raises UserError that names the file, the entry (from 0) and what was found there; Misuse when a source has no such kind or
    weight, or when some hold captions and others questions.
    """
    return join([read_source(source) for source in sources])


def read_source(source: Source) -> Samples:
    """The samples of one source, in the order of its file. Raises as `read_sources`."""
    if source.kind not in KINDS:
        raise Misuse(f"No source of samples is of the kind {source.kind!r}; expected {', '.join(KINDS)}.")
    if not (math.isfinite(source.weight) and source.weight > 0):
        raise Misuse(f"The weight of {source.annotations} is {source.weight:g}; expected a number above 0.")
    if source.questions and source.kind != VQA:
        raise Misuse(f"{source.questions}: only a source of the kind {VQA} has a file of questions beside its annotations.")
    if source.kind == VQA:
        return _questions(source)
    names, captions = _karpathy(source) if source.kind == KARPATHY else _flickr8k(source)
    check_folder(source.images, list(dict.fromkeys(names)), source.annotations)
    if not source.per_picture:
        names = [name for name, texts in zip(names, captions, strict=True) for _ in texts]
        captions = [(text,) for texts in captions for text in texts]
    return _samples(source, names, captions)


def join(sets: Sequence[Samples]) -> Samples:
    """The samples of several sets, one after the other; a picture that two of them name is one picture. Raises Misuse when
    there is no set, or when some hold captions and others questions."""
    if not sets:
        raise Misuse("No source of samples is named; expected one at least.")
    if len({found.answers is None for found in sets}) > 1:
        names = [next(found.parts[0].name for found in sets if (found.answers is None) == captions) for captions in (True, False)]
        raise Misuse(f"{names[0]} holds captions and {names[1]} questions; a training takes one or the other.")
    numbers: dict[Path, int] = {}
    picture = []
    for found in sets:
        new = np.array([numbers.setdefault(path, len(numbers)) for path in found.pictures], np.int64)  # (P,)
        picture.append(new[found.picture])
    texts = tuple(text for found in sets for text in found.texts)
    parts = tuple(part for found in sets for part in found.parts)
    answers = None if sets[0].answers is None else tuple(each for found in sets for each in found.answers or ())
    return Samples(tuple(numbers), np.concatenate(picture), texts, parts, answers)


def weighted(answers: Sequence[str]) -> Answers:
    """What people answered, each answer once with the share of those who gave it, in the order of the first of them.

    Source: salesforce/BLIP data/vqa_dataset.py.
    """
    return tuple((answer, count / len(answers)) for answer, count in Counter(answers).items())


def _karpathy(source: Source) -> tuple[list[str], list[tuple[str, ...]]]:
    """The pictures of the list, and the captions of each. A caption stands where its picture was named first."""
    if source.annotations.suffix.lower() in SUFFIXES:
        raise Misuse(
            f"{source.annotations} is a text by its name; {KARPATHY} reads JSON. Flickr8k's text is of the kind {FLICKR8K}."
        )
    found = read_annotations(source.annotations, source.split)
    captions: list[list[str]] = [[] for _ in found.images]
    for image, caption in zip(found.image_of_text, found.captions, strict=True):
        captions[image].append(caption)
    return found.images, [tuple(texts) for texts in captions]


def _flickr8k(source: Source) -> tuple[list[str], list[tuple[str, ...]]]:
    found = read_flickr(source.annotations, source.split)
    return [name for name, _ in found], [tuple(captions) for _, captions in found]


def _questions(source: Source) -> Samples:
    if source.questions:
        found = read_questioned(source.images, source.questions, source.annotations)
        genome = set[int]()
    else:
        found = read_questioned(source.images, source.annotations)
        genome = _genome(source.annotations)
    if not found.questions[0].answers:  # all have some, or none has
        raise UserError(f"{source.questions or source.annotations} holds questions without answers; training needs both.")
    names = [found.pictures.names[question.image] for question in found.questions]
    answers = tuple(_answers(question, number in genome) for number, question in enumerate(found.questions))
    return _samples(source, names, [(question.question,) for question in found.questions], answers)


def _genome(path: Path) -> set[int]:
    """Numbers of the entries that say of themselves that they are Visual Genome's."""
    values = load_json(path)
    return {number for number, entry in enumerate(values) if isinstance(entry, dict) and entry.get("dataset") == GENOME}


def _answers(question: Question, genome: bool) -> Answers:
    return ((question.answers[0], GENOME_WEIGHT),) if genome else weighted(question.answers)


def _samples(
    source: Source, names: Iterable[str], texts: Sequence[tuple[str, ...]], answers: tuple[Answers, ...] | None = None
) -> Samples:
    numbers: dict[str, int] = {}
    picture = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)  # (N,)
    part = Part(str(source.questions or source.annotations), len(picture), source.weight)
    return Samples(tuple(source.images / name for name in numbers), picture, tuple(texts), (part,), answers)
