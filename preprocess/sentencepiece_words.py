"""The words of LLaMA, Baichuan, Vicuna and T5: SentencePiece, with what each model puts around a text. N texts, L tokens.

Files: tokenizer.model (LLaMA and its like) or spiece.model (T5), read with the sentencepiece library as transformers' slow
tokenizers do, or a tokenizer.json made from one for the fast ones. The two may disagree in runs of blanks: what the original
of each model read comes first in preprocess/words.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from models.errors import UserError
from preprocess.padding import left_padded, right_padded
from preprocess.spaces import clean_up
from preprocess.vocabulary_files import digest, read_bytes, read_tokenizer, require_characters

PAD = "[PAD]"


@dataclass(frozen=True)
class SentenceRules:
    """What a model puts around a text, and how it ends one. Ids as in its published vocabulary."""

    begins: tuple[str, ...]  # the first tokens of the vocabulary, all special
    first: tuple[int, ...]  # before every text
    last: tuple[int, ...]  # after every text
    pad_id: int | None  # None: [PAD], added after the vocabulary
    start_ids: tuple[int, ...]  # what a sequence of new words begins with where the prompt is given as embeddings
    stop_ids: tuple[int, ...]
    added: tuple[str, ...] = ()  # special tokens after the vocabulary
    cut_left: bool = False  # too long a text loses its beginning
    trimmed: bool = False  # the blanks beside a special token that is written out in a text are dropped
    cleaned: bool = False  # decoding removes the blanks before punctuation
    pads_right: bool = False  # an encoder reads it, and counts distances over padding too


# mindformers configs/blip2/*_image_to_text_generation.yaml: add_special_tokens False, pad_token_id 0.
LLAMA = SentenceRules(("<unk>", "<s>", "</s>"), first=(), last=(), pad_id=0, start_ids=(1,), stop_ids=(2,))
# salesforce/LAVIS models/blip2_models/blip2_vicuna_instruct.py makes </s> the first token too and adds [PAD].
VICUNA = SentenceRules(
    ("<unk>", "<s>", "</s>"),
    first=(2,),
    last=(),
    pad_id=None,
    start_ids=(1,),
    stop_ids=(2,),
    added=(PAD,),
    cut_left=True,
    trimmed=True,
)
# transformers' T5TokenizerFast: extra_id_99 comes first after the vocabulary, extra_id_0 last. LAVIS reads tokenizer.json with
# it, in which a blank at the end of a text may be a token of its own (huggingface/tokenizers issue 1250); in spiece.model not.
T5 = SentenceRules(
    ("<pad>", "</s>", "<unk>"),
    first=(),
    last=(1,),
    pad_id=0,
    start_ids=(0,),
    stop_ids=(1,),
    added=tuple(f"<extra_id_{number}>" for number in reversed(range(100))),
    cleaned=True,
    pads_right=True,
)
RULES = {"llama": LLAMA, "baichuan": LLAMA, "vicuna": VICUNA, "t5": T5}


class SentenceWords:
    """A SentencePiece vocabulary under the rules of one model."""

    family = "sentencepiece"

    def __init__(self, pieces: Pieces, file: Path, rules: SentenceRules, max_length: int | None) -> None:
        self._pieces, self._rules, self._max_length = pieces, rules, max_length
        self.file, self.files, self.sha256 = file, (file,), digest((file,))
        self.size: int = pieces.size
        self._special = {token: number for number, token in enumerate(rules.begins)}
        for token in rules.added:
            number = pieces.number(token)
            self._special[token] = self.size if number is None else number
            self.size += number is None
        self._special_ids = set(self._special.values())
        self._split = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")
        self.pad_id: int = self._special[PAD] if rules.pad_id is None else rules.pad_id
        self.start_ids, self.stop_ids = rules.start_ids, rules.stop_ids

    @classmethod
    def load(cls, file: Path, rules: SentenceRules, model: str, max_length: int | None = None) -> SentenceWords:
        """Read a model of the sentencepiece library or, when its name ends in .json, a tokenizer.json.

        Args:
            model: whose vocabulary it is to be, for the error.
            max_length: tokens that a prompt is cut to, with what the rules put around it; None cuts none. ValueError when
                that leaves no token for the text.

        Raises UserError when the file is damaged or does not begin with the tokens of that model.
        """
        if max_length is not None and max_length <= len(rules.first + rules.last):
            raise ValueError(f"max_length is {max_length}; {len(rules.first + rules.last)} are taken before any text")
        pieces: Pieces = FromJson(file) if file.suffix == ".json" else FromModel(file)
        found = tuple(pieces.token(number) for number in range(min(len(rules.begins), pieces.size)))
        if found != rules.begins:
            raise UserError(
                f"{file} is not the vocabulary of {model}: it begins with {' '.join(map(repr, found)) or 'nothing'}, expected "
                f"{' '.join(map(repr, rules.begins))}. Give the tokenizer that belongs to the language model (--tokenizer)."
            )
        return cls(pieces, file, rules, max_length)

    def prompts(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask, (N, L) int64, left padded, T5's right padded. A row may have no token at all where the rules put none
        around a text.

        A special token written out in a text is that token, and what follows it begins a text of its own, with the blank that
        SentencePiece puts before each: what transformers calls LLaMA's legacy behaviour, and 4.33 knows no other default.
        """
        require_characters(texts)
        rows = [self._row(text) for text in texts]
        return (right_padded if self._rules.pads_right else left_padded)(rows, self.pad_id)

    def text(self, ids: Sequence[int]) -> str:
        """The text of `ids`, stripped: special tokens and ids without a token left out, bytes joined to characters."""
        text = self._pieces.text([int(i) for i in ids if 0 <= int(i) < self._pieces.size and int(i) not in self._special_ids])
        return (clean_up(text) if self._rules.cleaned else text).strip()

    def _row(self, text: str) -> list[int]:
        ids: list[int] = []
        parts = self._split.split(text)  # by turns text and special token
        for n, part in enumerate(parts):
            if self._rules.trimmed:
                part = part.lstrip() if n > 0 else part
                part = part.rstrip() if n < len(parts) - 1 else part
            ids += [self._special[part]] if n % 2 else self._pieces.ids(part)
        if self._max_length is not None:
            room = self._max_length - len(self._rules.first + self._rules.last)
            ids = ids[-room:] if self._rules.cut_left else ids[:room]
        return [*self._rules.first, *ids, *self._rules.last]


class Pieces(Protocol):
    """The tokens themselves, without any model's rules."""

    size: int

    def token(self, number: int) -> str: ...
    def number(self, token: str) -> int | None: ...
    def ids(self, text: str) -> list[int]: ...
    def text(self, ids: list[int]) -> str: ...


class FromModel:
    """Read by the sentencepiece library."""

    def __init__(self, file: Path) -> None:
        try:
            self._model = SentencePieceProcessor(model_proto=read_bytes(file))
        except RuntimeError as error:
            raise UserError(f"{file} is damaged, or not a SentencePiece model. Give the published {file.name}.") from error
        self.size: int = self._model.get_piece_size()

    def token(self, number: int) -> str:
        return self._model.id_to_piece(number)

    def number(self, token: str) -> int | None:
        number = self._model.piece_to_id(token)  # of the unknown token when there is none
        return number if self._model.id_to_piece(number) == token else None

    def ids(self, text: str) -> list[int]:
        return list(self._model.encode(text))

    def text(self, ids: list[int]) -> str:
        return str(self._model.decode(ids))


class FromJson:
    """Read by the tokenizers library."""

    def __init__(self, file: Path) -> None:
        self._tokenizer: Tokenizer = read_tokenizer(file)
        self.size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        # Not `id_to_token`: it gives a special token that the file marks as normalised with a blank before it.
        self._token_of = {number: token for token, number in self._tokenizer.get_vocab(with_added_tokens=False).items()}

    def token(self, number: int) -> str:
        return self._token_of.get(number, "")

    def number(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))
