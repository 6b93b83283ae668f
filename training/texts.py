"""What a model that writes words learns of a text: its ids, and which of them are foretold.

B texts, L tokens. Prompts are no part of the loss. Sources: salesforce/BLIP models/blip.py (`BLIP_Decoder.forward`),
salesforce/LAVIS models/blip2_models/blip2_opt.py (`forward`), mindformers models/blip2/blip2_llm.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from preprocess.padding import right_padded
from preprocess.text import pre_caption
from preprocess.wordpiece_words import WordpieceWords
from preprocess.words import BPE, WORDPIECE, Words

LINE = "\n"  # with which a text of OPT ends


def told(
    words: Words, captions: Sequence[str], prompt: str, newline: bool, max_words: int, max_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, mask, and 1 where a word is foretold, (B, L) int64 each, padded on the right.

    Args:
        captions: as annotated.
        prompt: stands before each; the empty one leaves all to be foretold.
        newline: end each with a line.
        max_words, max_length: that a caption, and its tokens, are cut to. What ends a text is not cut off BLIP's.
    """
    # Without a prompt all is foretold, what begins a text too, as in the original; but for BLIP's [DEC], before which is nothing.
    before = _ids(words, prompt) if prompt else []
    rows, learnt = [], []
    for caption in captions:
        cleaned = pre_caption(caption, max_words)
        text = f"{prompt} {cleaned}" if prompt else cleaned
        row = _text(words, text + (LINE if newline else ""), max_length)
        rows.append(row)
        learnt.append([int(place >= len(before)) for place in range(len(row))])
    ids, mask = right_padded(rows, words.pad_id)
    return ids, mask, right_padded(learnt, 0)[0]


def answered(
    words: Words, captions: Sequence[str], prompt: str, max_words: int, max_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of T5: ids and mask (B, L) of the prompt that its encoder reads, and (B, A) of what its decoder says."""
    ids, mask = words.prompts([prompt] * len(captions))
    said = [_cut(_ids(words, pre_caption(caption, max_words)), max_length) for caption in captions]
    answer, answer_mask = right_padded(said, words.pad_id)
    return ids, mask, answer, answer_mask


def _text(words: Words, text: str, max_length: int) -> list[int]:
    if words.family == WORDPIECE:
        assert isinstance(words, WordpieceWords)
        return _cut([int(i) for i in words.answers([text])[0][0]], max_length)
    if words.family == BPE:  # OPT's, which a line ends if anything
        return _ids(words, text)[:max_length]
    return [*_ids(words, text)[: max_length - 1], words.stop_ids[0]]


def _cut(row: list[int], max_length: int) -> list[int]:
    """To so many, of which the last is what ends the text."""
    return [*row[:-1][: max_length - 1], row[-1]]


def _ids(words: Words, text: str) -> list[int]:
    """Of one text, as the model reads a prompt."""
    ids, mask = words.prompts([text])
    return [int(i) for i, seen in zip(ids[0], mask[0], strict=True) if seen]
