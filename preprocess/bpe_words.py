"""OPT's words: GPT-2's byte-level BPE with `</s>` before every text. N texts, L tokens.

Files: vocab.json with merges.txt (facebook/opt-*), or tokenizer.json. Rules: salesforce/LAVIS
models/blip2_models/blip2_opt.py, on transformers 4.33.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from models.errors import UserError
from preprocess.padding import left_padded
from preprocess.spaces import clean_up
from preprocess.vocabulary_files import digest, read_json, read_text, read_tokenizer, require_characters

BYTES = pre_tokenizers.ByteLevel.alphabet()  # the 256 characters that byte-level vocabularies write bytes with
NEWLINE = "Ċ"  # the one of "\n"


@dataclass(frozen=True)
class BpeRules:
    """The tokens with a meaning of their own."""

    first: str = "</s>"  # before every text
    pad: str = "<pad>"
    stop: str = "\n"  # the text that ends a caption: LAVIS trains on one caption a line


OPT = BpeRules()


class BpeWords:
    """A byte-level BPE. Every text has tokens: none is ever unknown."""

    family = "bpe"

    def __init__(self, tokenizer: Tokenizer, files: tuple[Path, ...], rules: BpeRules, max_length: int | None) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self.files, self.file, self.sha256 = files, files[0], digest(files)
        special = dict.fromkeys((rules.first, rules.pad))
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        numbers = tokenizer.get_vocab(with_added_tokens=True)
        self.size: int = max(numbers.values()) + 1
        self.pad_id: int = numbers[rules.pad]
        self.start_ids: tuple[int, ...] = (numbers[rules.first],)
        self.stop_ids: tuple[int, ...] = (tokenizer.encode(rules.stop, add_special_tokens=False).ids[0],)

    @classmethod
    def load(cls, files: tuple[Path, ...], rules: BpeRules = OPT, max_length: int | None = None) -> BpeWords:
        """Read (vocab.json, merges.txt) or (tokenizer.json,).

        Args:
            max_length: tokens that a prompt is cut to, `</s>` with them; None cuts none. ValueError below 1.

        Raises UserError when a file is damaged, when the two do not belong together, or when it is another model's
        vocabulary: not byte-level, or without the tokens of `rules`.
        """
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}; {rules.first} needs 1")
        tokenizer = read_tokenizer(files[0]) if len(files) == 1 else _from_two(*files)
        if wrong := _what_is_wrong(tokenizer, rules):
            raise UserError(
                f"{files[0]} is not the vocabulary of OPT: {wrong}. "
                "Give the tokenizer that belongs to the language model (--tokenizer)."
            )
        return cls(tokenizer, files, rules, max_length)

    def prompts(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask, (N, L) int64, left padded: `</s>`, then the text, cut at its end. LAVIS pads questions at the left
        (`predict_answers`) and gives all pictures the same prompt otherwise.

        A special token written out in a text is that token, as in transformers.
        """
        require_characters(texts)
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return left_padded([[*self.start_ids, *encoding.ids][: self._max_length] for encoding in encodings], self.pad_id)

    def text(self, ids: Sequence[int]) -> str:
        """The text of `ids`, stripped: special tokens and ids without a token left out, bytes that are no UTF-8 replaced by
        U+FFFD, blanks before punctuation removed (the default of transformers 4.33, which LAVIS runs on; 5.x keeps them)."""
        known = [int(i) for i in ids if 0 <= int(i) < self.size]
        return clean_up(self._tokenizer.decode(known, skip_special_tokens=True)).strip()


def _what_is_wrong(tokenizer: Tokenizer, rules: BpeRules) -> str:
    numbers = tokenizer.get_vocab(with_added_tokens=True)
    if tokenizer.encode("\n", add_special_tokens=False).tokens != [NEWLINE] or any(byte not in numbers for byte in BYTES):
        return "it is no byte-level BPE with a token for each byte"
    missing = [token for token in (rules.first, rules.pad) if token not in numbers]
    return f"it has no {' and no '.join(missing)}" if missing else ""


def _from_two(vocabulary_file: Path, merges_file: Path) -> Tokenizer:
    """GPT2Tokenizer over its two published files."""
    merges = _read_merges(merges_file)
    vocabulary = _read_vocabulary(vocabulary_file)
    try:
        tokenizer = Tokenizer(BPE(vocabulary, merges))
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(
            f"{merges_file} does not belong to {vocabulary_file.name} beside it: {error}. Give both from one published folder."
        ) from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _read_vocabulary(file: Path) -> dict[str, int]:
    values = read_json(file)
    if not isinstance(values, dict) or not values:
        raise UserError(f"{file} is not a vocabulary: expected an object with the number of each token.")
    token_of: dict[int, str] = {}
    for token, number in values.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(values):
            raise UserError(
                f"{file}: the number of {token!r} is {number!r}, expected a whole number from 0 to {len(values) - 1:,}. "
                "Give the published file."
            )
        if token_of.setdefault(number, token) != token:
            raise UserError(f"{file}: {token_of[number]!r} and {token!r} are both number {number}. Give the published file.")
    return values


def _read_merges(file: Path) -> list[tuple[str, str]]:
    """One merge a line: two tokens with a blank between them. A first line may name the version."""
    merges = []
    for number, line in enumerate(read_text(file).replace("\r\n", "\n").removesuffix("\n").split("\n"), 1):
        if number == 1 and line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise UserError(f"{file}: line {number} is {line[:60]!r}, expected two tokens with a blank between them.")
        merges.append((left, right))
    return merges
