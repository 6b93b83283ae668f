"""Captions to be reported, of a run or of any file of results, and what there is to compare them with. N captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import Misuse, UserError
from postprocess import facts, written
from postprocess.gallery import Pictures
from postprocess.picture_files import PictureFiles, in_folder
from postprocess.references import read_caption_results, read_captions
from preprocess import dataset
from preprocess.checked import Id
from preprocess.image_ids import image_id
from runtime import outputs as runs

SPLIT = "test"  # of Karpathy's own file when none is named


@dataclass(frozen=True)
class Captions:
    """N captions and what is known beside them."""

    ids: list[Id]  # N, of their pictures
    texts: list[str]  # N
    more: list[list[str]]  # N: what else was written for the same picture, best first
    prompts: list[str] | None  # N; None where nothing is known of them
    references: Mapping[Id, Sequence[str]] | None  # captions that people wrote, one or more for each picture
    names: list[str]  # N, of the pictures
    picture: Pictures | PictureFiles
    facts: dict[str, Any]


def of_run(
    outputs: Path, data: Path | None, references: Path | None = None, split: str = SPLIT, verify: bool = False
) -> Captions:
    """The captions of an outputs/ folder. They are compared with `references`, or else with what the data/ folder holds.

    Raises UserError when a folder or file is damaged, when they do not belong together, and when two captions are of the same
    picture and are to be compared.
    """
    run = runs.read_caption(outputs, verify)
    origin = written.of_run(run.source, data, lambda folder: dataset.read_caption(folder, verify))
    with facts.complete(run.source, origin.data.source if origin.data else None):
        ids = [image_id(each["image_id"], f"{outputs}, caption {n}") for n, each in enumerate(run.captions)]
        own = [image_id(image["image_id"], f"{outputs}, picture {n}") for n, image in enumerate(origin.images)]
        names = [str(image["image"]) for image in origin.images]
    written.refuse_others(run.source, ids, own, "pictures")
    compared: Mapping[Id, Sequence[str]] | None = None
    if references:
        compared = read_captions(references, split)
    elif origin.data and any(origin.data.references):
        compared = dict(zip(ids, origin.data.references, strict=True))
        if bare := [name for name, texts in zip(names, origin.data.references, strict=True) if not texts]:
            raise UserError(f"{origin.data.source.folder}: {bare[0]} has no captions to compare with, and others have.")
    if compared is not None and len(set(ids)) < len(ids):
        raise UserError(f"{outputs} has two captions of the same picture, so they cannot be compared. Caption each picture once.")
    return Captions(
        ids=ids,
        texts=[str(each["caption"]) for each in run.captions],
        more=[row["texts"][1:] for row in run.generated],
        prompts=[row["prompt"] for row in run.generated],
        references=compared,
        names=names,
        picture=origin.picture,
        facts={**origin.facts, "files": written.listed({"References": references} if references else {})},
    )


def of_file(results: Path, references: Path | None, images: Path | None = None, split: str = SPLIT) -> Captions:
    """The captions of a file of results, shown with the pictures of the folder `images`.

    Raises Misuse when there are no `references`, UserError when a file cannot be read or has not the form that it should.
    """
    if references is None:
        raise Misuse(f"{results} is compared with what people wrote: name a file of it with --references.")
    found = read_caption_results(results)
    compared = read_captions(references, split)
    picture = in_folder(images, list(found))
    return Captions(
        ids=list(found),
        texts=list(found.values()),
        more=[[] for _ in found],
        prompts=None,
        references=compared,
        names=list(picture.names),
        picture=picture,
        facts=written.of_files({"Results": results, "References": references}),
    )
