"""The blanks that joining tokens leaves before punctuation and contractions."""

from __future__ import annotations

MARKS = (".", "?", "!", ",")
CONTRACTED = ("n't", "'m", "'s", "'ve", "'re")


def clean_up(text: str) -> str:
    """The text with none of them: `a dog , is n't it ?` becomes `a dog, isn't it?`.

    Transformers 4.15 and 4.33, which the originals run on, do so unless told otherwise: for BERT, OPT and T5, not for LLaMA
    (huggingface/transformers tokenization_utils_base.py, clean_up_tokenization).
    """
    for mark in MARKS:
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for ending in CONTRACTED:
        text = text.replace(f" {ending}", ending)
    return text
