"""What a run leaves behind, whatever its task, and how the report reads it.

N pictures, M captions, P re-ranked pairs ordered by picture. A pair is in the list of its picture (i2t), of its
caption (t2i) or of both, and was scored once.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from models import manifest
from models.errors import UserError
from models.spec import MATCH
from preprocess.dataset import RetrievalData
from preprocess.tensors import Tensor, open_tensor

I2T, T2I = 1, 2  # bits of pair_direction: among the picture's k captions, among the caption's k pictures
LAVIS, MINDFORMERS = "lavis", "mindformers"
PROTOCOLS = (LAVIS, MINDFORMERS)  # of the two original evaluations
WHOLE_BATCH = 100  # pictures, of mindformers
CAPTION, VQA = "caption", "vqa"
CAPTIONS, ANSWERS, GENERATED = "captions.json", "answers.json", "generated.json"


@dataclass(frozen=True)
class RetrievalOutputs:
    """The outputs/ folder of `blip-run retrieval`."""

    source: manifest.Manifest
    image_embed: Tensor  # (N, E) float32, or (N, Q, E) of BLIP-2, unit length
    text_embed: Tensor  # (M, E) float32, unit length
    pair_image: Tensor  # (P,) int32, ascending
    pair_text: Tensor  # (P,) int32
    pair_direction: Tensor  # (P,) uint8, bits I2T and T2I
    pair_sim: Tensor  # (P,) float32, see runtime/similarity.py
    itm_logits: Tensor  # (P, 2) float32, class 1 is a match

    @property
    def run(self) -> dict[str, Any]:
        """Which graphs, data, backend and options made it, and how long each stage took."""
        return self.source.content


@dataclass(frozen=True)
class ClassifyOutputs:
    """The outputs/ folder of `blip-run classify`. N pictures, C labels."""

    source: manifest.Manifest
    labels: list[str]  # C
    image_embed: Tensor  # (N, E) float32, or (N, Q, E) of BLIP-2, unit length
    label_embed: Tensor  # (C, E) float32, unit length
    probability: Tensor  # (N, C) float32, each row adds up to 1

    @property
    def run(self) -> dict[str, Any]:
        """As RetrievalOutputs.run; and the templates, the query, the protocol and the temperature."""
        return self.source.content


@dataclass(frozen=True)
class FeatureOutputs:
    """The outputs/ folder of `blip-run features`: what its modes give, None for the rest. N pictures, M captions, L tokens."""

    source: manifest.Manifest
    image_embeds: Tensor | None  # (N, Q, D) float32
    image_embeds_proj: Tensor | None  # (N, Q, E) float32, unit length
    text_embeds: Tensor | None  # (M, L, D) float32, zero where a caption has ended
    text_embeds_proj: Tensor | None  # (M, L, E) float32, unit length, or zero
    multimodal_embeds: Tensor | None  # (M, Q, D) float32, of each caption with its picture


@dataclass(frozen=True)
class CaptionOutputs:
    """The outputs/ folder of `blip-run caption`. N pictures with a prompt each."""

    source: manifest.Manifest
    captions: list[dict[str, Any]]  # N of {"image_id", "caption"}: COCO's result form, the best text of each
    # N of {"image": its number, "prompt", "texts": best first, "scores": a number for each, "tokens": new words of each}
    generated: list[dict[str, Any]]

    @property
    def run(self) -> dict[str, Any]:
        """As RetrievalOutputs.run; and the decoding options."""
        return self.source.content


@dataclass(frozen=True)
class VqaOutputs:
    """The outputs/ folder of `blip-run vqa`. Q questions."""

    source: manifest.Manifest
    answers: list[dict[str, Any]]  # Q of {"question_id", "answer"}: VQA's result form, the best answer to each
    generated: list[dict[str, Any]]  # Q, as CaptionOutputs', but "question" in place of "image"

    @property
    def run(self) -> dict[str, Any]:
        """As CaptionOutputs.run."""
        return self.source.content


def counted(data: RetrievalData, protocol: str) -> RetrievalData:
    """The pictures and captions of `data` that the evaluation `protocol` counts; `img` stays whole.

    mindformers evaluates in batches of 100 pictures and drops what does not fill one, with its captions: `drop_remainder`
    and `runner_config.batch_size` in its run_blip2_stage1_vit_g_retrieval_flickr30k.yaml, the second of which
    dataset/utils.py puts in the place of the data set's own. Beside this the two rank alike: mindformers' half precision is
    not imitated, and a k_test beyond the set, with which both stop, takes the whole set here.

    Raises UserError when no picture is left.
    """
    kept = len(data.images)
    if protocol == MINDFORMERS:
        kept -= kept % WHOLE_BATCH
    if kept == len(data.images):
        return data
    if not kept:
        raise UserError(
            f"mindformers evaluates whole batches of {WHOLE_BATCH} pictures and drops the rest, and {data.source.folder} has "
            f"{len(data.images)}: none is left. Use --protocol {LAVIS}."
        )
    texts = np.flatnonzero(data.image_of_text < kept)
    return replace(
        data,
        images=data.images[:kept],
        captions=[data.captions[text] for text in texts],
        image_of_text=data.image_of_text[texts],
        ids=data.ids[texts],
        mask=data.mask[texts],
    )


def read_retrieval(folder: Path, verify: bool = False) -> RetrievalOutputs:
    """Open a complete outputs/ folder. Raises UserError when it is damaged, unfinished or of another task."""
    found = _read(folder, "retrieval", verify)
    names = ("image_embed", "text_embed", "pair_image", "pair_text", "pair_direction", "pair_sim", "itm_logits")
    outputs = RetrievalOutputs(found, *(open_tensor(found, name) for name in names))
    by_pair = (outputs.pair_image, outputs.pair_text, outputs.pair_direction, outputs.pair_sim, outputs.itm_logits)
    pairs = {len(tensor) for tensor in by_pair}
    if len(pairs) > 1:
        raise UserError(f"{folder} contradicts itself: its pair tensors have {sorted(pairs)} rows.")
    return outputs


def read_classify(folder: Path, verify: bool = False) -> ClassifyOutputs:
    """Open a complete outputs/ folder. Raises UserError when it is damaged, unfinished or of another task."""
    found = _read(folder, "classify", verify)
    labels = found.content.get("labels")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{folder / manifest.NAME} lacks or garbles 'labels'. Write the folder again with blip-run classify.")
    names = ("image_embed", "label_embed", "probability")
    outputs = ClassifyOutputs(found, labels, *(open_tensor(found, name) for name in names))
    if outputs.probability.shape != (len(outputs.image_embed), len(labels)) or len(outputs.label_embed) != len(labels):
        sizes = {name: list(getattr(outputs, name).shape) for name in names}
        raise UserError(f"{folder} contradicts itself: it has {len(labels)} labels and the tensors {sizes}.")
    return outputs


def read_features(folder: Path, verify: bool = False) -> FeatureOutputs:
    """Open a complete outputs/ folder. Raises UserError when it is damaged, unfinished or of another task."""
    found = _read(folder, "features", verify)
    names = ("image_embeds", "image_embeds_proj", "text_embeds", "text_embeds_proj", "multimodal_embeds")
    held = found.content.get("tensors", {})
    return FeatureOutputs(found, *(open_tensor(found, name) if name in held else None for name in names))


def read_caption(folder: Path, verify: bool = False) -> CaptionOutputs:
    """Open a complete outputs/ folder. Raises UserError when it is damaged, unfinished or of another task."""
    found = _read(folder, CAPTION, verify)
    return CaptionOutputs(found, *_texts(found, CAPTIONS, ("image_id", "caption"), "image"))


def read_vqa(folder: Path, verify: bool = False) -> VqaOutputs:
    """Open a complete outputs/ folder. Raises UserError when it is damaged, unfinished or of another task."""
    found = _read(folder, VQA, verify)
    return VqaOutputs(found, *_texts(found, ANSWERS, ("question_id", "answer"), "question"))


def scores(outputs: RetrievalOutputs) -> np.ndarray:
    """(P,) float32: the ITM logit of "match" plus the similarity, as salesforce/BLIP train_retrieval.py adds them."""
    total: np.ndarray = outputs.itm_logits[:][:, MATCH] + outputs.pair_sim[:]
    return total


def _read(folder: Path, task: str, verify: bool) -> manifest.Manifest:
    found = manifest.read(folder, "outputs", verify)
    if found.content.get("task") != task:
        raise UserError(f"{folder} holds outputs of the task {found.content.get('task')!r}, expected {task!r}.")
    return found


def _texts(
    found: manifest.Manifest, name: str, keys: tuple[str, str], number: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The results of the file `name`, each an id and a text by these keys, and what was generated, checked against them."""
    results, generated = (_entries(found, file) for file in (name, GENERATED))
    best = [row["texts"][0] if _is_generated(row, number, n) else None for n, row in enumerate(generated)]
    good = [result.keys() == set(keys) and _is_id(result[keys[0]]) for result in results]
    if None in best or not all(good) or [result[keys[1]] for result in results] != best:
        raise UserError(
            f"{found.folder} contradicts itself: {name} and {GENERATED} are not the results of one run. "
            f"Write the folder again with {manifest.MADE_WITH['outputs']}."
        )
    return results, generated


def _entries(found: manifest.Manifest, name: str) -> list[dict[str, Any]]:
    path, mend = found.folder / name, f"Write the folder again with {manifest.MADE_WITH['outputs']}."
    if name not in found.files:
        raise UserError(f"{found.folder / manifest.NAME} does not list {name}. {mend}")
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}). {mend}") from error
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise UserError(f"{path} is not a list of results. {mend}")
    return values


def _is_generated(row: dict[str, Any], number: str, wanted: int) -> bool:
    texts, totals, tokens = (row.get(key) for key in ("texts", "scores", "tokens"))
    if not (isinstance(texts, list) and isinstance(totals, list) and isinstance(tokens, list) and texts):
        return False
    return (
        row.get(number) == wanted
        and isinstance(row.get("prompt"), str)
        and len(texts) == len(totals) == len(tokens)
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(total, float) and math.isfinite(total) for total in totals)
        and all(isinstance(count, int) and count >= 0 for count in tokens)
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
