"""Names of classes to vectors: each name in its prompts, the prompts through the text encoder, averaged over the templates.

C labels, K templates, L tokens, E embedding. What the two protocols do, and how that is known:

    mindformers  "a picture of {}", pictures by the Q-Former's first query. Read in mindformers: Blip2Classifier
                 (models/blip2/blip2_qformer.py) and the template of its classification configuration, which Trainer.predict
                 passes on. Its pipeline, called by itself, has a full stop behind the {}.
    lavis        "{}", the bare name. Read in LAVIS' examples/blip_zero_shot_classification.ipynb, which builds prompts and
                 then feeds the names. It is of BLIP; that BLIP-2 is used alike, by its first query, is inferred.

Both hand the prompt to the tokenizer as it is, and do not clean it as a caption is cleaned: punctuation stays, and only the
tokenizer makes it lower case. mindformers cuts a prompt at 77 tokens, LAVIS nowhere; here a prompt that the graph cannot take
whole is refused. Of several templates the vectors of a label are averaged and made unit length again, as OpenAI's CLIP does
(notebooks/Prompt_Engineering_for_ImageNet.ipynb).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import Misuse, UserError
from preprocess.annotations import is_text
from preprocess.text import CaptionTokenizer
from runtime.embed import embed_captions, refuse_nan
from runtime.graphs import MEND, Graphs
from runtime.outputs import LAVIS, MINDFORMERS
from runtime.session import Session

TEMPLATES = {MINDFORMERS: "a picture of {}", LAVIS: "{}"}
PLACE = "{}"  # where a template takes the label
TEMPERATURE = 0.07  # where training starts from, in BLIP and in BLIP-2
NO_TEMPERATURE = (
    f"These graphs hold no temperature: their checkpoint had none. {TEMPERATURE} is used; "
    "another would change the scores, not their order."
)


def embed_labels(
    session: Session, tokenizer: CaptionTokenizer, labels: Sequence[str], templates: Sequence[str], positions: int, batchsize: int
) -> np.ndarray:
    """(C, E) float32, unit length: one vector for each label.

    Args:
        session: `text_embed`.
        positions: tokens that the text encoder has positions for.

    Raises:
        UserError: the vocabulary knows nothing of a label, a prompt has more tokens than the graph takes, two labels are the
            same tokens, or the graph gave NaN.
    """
    longest = session.length or positions
    _refuse_unknown(tokenizer, labels, longest)
    vectors = []
    for template in templates:
        prompts = [template.replace(PLACE, label) for label in labels]
        ids, mask = tokenizer.encode(prompts, longest + 1)  # (C, longest + 1)
        lengths = mask.sum(axis=1)
        if lengths.max() > longest:
            prompt = _short(prompts[int(lengths.argmax())])
            raise UserError(
                f"The prompt {prompt} is longer than {longest} tokens, which the graph takes. Give a shorter label or template."
            )
        _refuse_equal(ids, labels)
        vectors.append(embed_captions(session, ids[:, :longest], mask[:, :longest], batchsize))
    total: np.ndarray = np.sum(vectors, axis=0)  # (C, E)
    found: np.ndarray = total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)
    refuse_nan("label_embed", found)
    return found


def checked_labels(labels: Sequence[Any], file: Path | None = None) -> list[str]:
    """`labels` without the white space around them. Raises when there is none, when one is no text, blank, or there twice:
    UserError that names the line when they are the lines of `file`, otherwise Misuse."""
    refusal, each = (UserError, f"{file}, line") if file else (Misuse, "Label")
    if not labels:
        raise refusal(f"{file or 'The list of labels'} is empty; give one label at least.")
    found: list[str] = []
    first: dict[str, int] = {}
    for number, label in enumerate(labels, 1):
        if not isinstance(label, str) or not is_text(label):
            raise refusal(f"{each} {number} is {_short(label)}; expected a text.")
        name = label.strip()
        if not name:
            raise refusal(f"{each} {number} is blank; remove it, or fill it in.")
        if (before := first.setdefault(name, number)) != number:
            raise refusal(f"{each} {number} is {_short(name)}, as {before} is; each label is there once.")
        found.append(name)
    return found


def read_labels(file: Path) -> list[str]:
    """One label a line, UTF-8. Raises UserError, with the number of the line, for one that is blank or there twice."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: byte {error.start}. Save it as UTF-8, one label a line.") from error
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []  # not splitlines: U+2028 ends no line
    if text.lstrip()[:1] in ("[", "{"):
        raise UserError(f"{file} begins with {text.lstrip()[:1]!r}, as JSON does; expected plain text, one label a line.")
    return checked_labels(lines, file)


def checked_templates(templates: Sequence[Any]) -> list[str]:
    """`templates`, each of them once. Raises Misuse unless each is a text with one {}."""
    for template in templates:
        if not isinstance(template, str) or template.count(PLACE) != 1 or not is_text(template):
            raise Misuse(f"The template {_short(template)} must hold one {PLACE}, where the label goes: 'a picture of {PLACE}'.")
    if not templates:
        raise Misuse(f"There is no template; give one at least: 'a picture of {PLACE}'.")
    return list(dict.fromkeys(templates))


def temperature_of(graphs: Graphs, asked: float | None) -> tuple[float, str]:
    """What similarities are divided by, and where it is from: "option", "checkpoint" or "default", which is a guess.

    Raises Misuse unless `asked` is a number above 0, UserError when the manifest's is none.
    """
    if asked is not None:
        if not isinstance(asked, Real) or not 0 < asked <= sys.float_info.max:  # not for NaN either
            raise Misuse(f"The temperature is {asked!r:.60}; expected a number above 0.")
        return float(asked), "option"
    held = graphs.content.get("temperature")
    if held is None:
        return TEMPERATURE, "default"
    if not isinstance(held, (int, float)) or not 0 < held <= sys.float_info.max:
        raise UserError(f"{graphs.source.folder} has the temperature {held!r:.60}; expected a number above 0. {MEND}")
    return float(held), "checkpoint"


def _refuse_unknown(tokenizer: CaptionTokenizer, labels: Sequence[str], longest: int) -> None:
    """A label without a token of its own would be scored by its template alone."""
    for ids, mask, label in zip(*tokenizer.encode(list(labels), longest + 1), labels, strict=True):
        if (ids[1 : mask.sum() - 1] == tokenizer.unknown_id).all():  # without [CLS] and [SEP]
            raise UserError(
                f"The vocabulary of these graphs knows nothing of the label {_short(label)}: all of it is [UNK]. "
                "Leave it out, or give the graphs whose vocabulary knows it."
            )


def _refuse_equal(ids: np.ndarray, labels: Sequence[str]) -> None:
    """Labels that become the same tokens would share their scores, and nobody would see why."""
    first: dict[bytes, str] = {}
    for row, label in zip(ids, labels, strict=True):
        if (before := first.setdefault(row.tobytes(), label)) != label:
            raise UserError(
                f"The labels {_short(before)} and {_short(label)} are the same tokens to this model: it cannot tell them apart. "
                "Leave one out, or give the graphs whose vocabulary knows them."
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
