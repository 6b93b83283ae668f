"""Text to ids and back for every decoder: which files a vocabulary has, and whose it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from models.errors import UserError
from preprocess.bpe_words import BpeWords
from preprocess.sentencepiece_words import RULES, SentenceRules, SentenceWords
from preprocess.wordpiece_words import WordpieceWords

WORDPIECE, BPE, SENTENCEPIECE = "wordpiece", "bpe", "sentencepiece"


@dataclass(frozen=True)
class Kind:
    """A kind of decoder."""

    model: str  # what to call it
    family: str  # of its vocabulary
    files: tuple[tuple[str, ...], ...]  # what a folder may hold: what its original reads comes first
    suffixes: tuple[str, ...]  # of a file that someone renamed


LLAMA_FILES = (("tokenizer.model",), ("tokenizer.json",))
KINDS = {
    "bert": Kind("BLIP", WORDPIECE, (("tokenizer.json",), ("vocab.txt",)), (".json", ".txt")),
    "opt": Kind("OPT", BPE, (("vocab.json", "merges.txt"), ("tokenizer.json",)), (".json",)),
    "llama": Kind("LLaMA", SENTENCEPIECE, LLAMA_FILES, (".model", ".json")),
    "baichuan": Kind("Baichuan", SENTENCEPIECE, LLAMA_FILES, (".model", ".json")),
    "vicuna": Kind("Vicuna", SENTENCEPIECE, LLAMA_FILES, (".model", ".json")),
    "t5": Kind("T5", SENTENCEPIECE, (("tokenizer.json",), ("spiece.model",)), (".json", ".model")),
}
KNOWN = tuple(dict.fromkeys(name for kind in KINDS.values() for names in kind.files for name in names))
SPARE = 1024  # rows that a language model may have beyond its tokens: some round up, OPT has 7 more and T5 28


class Words(Protocol):
    """The words of one decoder. N texts, the longest has L tokens."""

    @property
    def family(self) -> str:
        """WORDPIECE, BPE or SENTENCEPIECE."""

    @property
    def file(self) -> Path:
        """The first of `files`."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All that the vocabulary is read from, in the order that `sha256` has them."""

    @property
    def sha256(self) -> str:
        """Over the files one after the other."""

    @property
    def size(self) -> int:
        """Tokens, counting those that the model adds: every id is below it."""

    @property
    def pad_id(self) -> int:
        """What stands where the mask is 0."""

    @property
    def start_ids(self) -> tuple[int, ...]:
        """What the ids that the original counts lengths by begin with."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Any of them ends a text."""

    def prompts(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask, both (N, L) int64, left padded (T5's, which an encoder reads, right), with the special tokens that the
        model reads. Raises UserError for a text that is none (half a character)."""

    def text(self, ids: Sequence[int]) -> str:
        """The text of new ids as the original decodes it, without special tokens, stripped."""


def load_words(
    path: Path, kind: str, vocab: int | None = None, max_length: int | None = None, rules: SentenceRules | None = None
) -> Words:
    """The words of a decoder.

    Args:
        path: a folder with the files of a tokenizer, or one of these files.
        kind: "bert" (BLIP's captioner and VQA), "opt", "llama", "baichuan", "vicuna" or "t5".
        vocab: rows of the model's embedding; None takes a vocabulary of any size.
        max_length: tokens that a prompt is cut to, as the original cuts; None cuts none. BLIP's are never cut.
        rules: other rules than the kind's own, for SentencePiece.

    Raises UserError when the files are absent or damaged, or another model's.
    """
    if kind not in KINDS:
        raise UserError(f"No decoder is called {kind!r}; expected {', '.join(KINDS)}.")
    model, family = KINDS[kind].model, KINDS[kind].family
    if rules and family != SENTENCEPIECE:
        raise ValueError(f"{model} is not read by SentencePiece: it takes no such rules")
    files = find_vocabulary(path, kind)
    words: Words
    if family == WORDPIECE:
        words = WordpieceWords.load(files[0])
    elif family == BPE:
        words = BpeWords.load(files, max_length=max_length)
    else:
        words = SentenceWords.load(files[0], rules or RULES[kind], model, max_length)
    if vocab is not None:
        check_size(words, kind, vocab)
    return words


def find_vocabulary(path: Path, kind: str) -> tuple[Path, ...]:
    """The files of `kind`'s vocabulary in a folder, or the file given with those that belong to it. Raises UserError that says
    what is there."""
    model, choices = KINDS[kind].model, KINDS[kind].files
    wanted = ", or ".join(" with ".join(names) for names in choices)
    if not path.exists():
        raise UserError(f"There is no tokenizer at {path}. {model} reads {wanted}: give that, or a folder that holds it.")
    folder = path if path.is_dir() else path.parent
    half = ""
    for names in choices:
        if path.is_dir() or path.name in names:
            there = [name for name in names if (folder / name).is_file()]
            if len(there) == len(names):
                return tuple(folder / name for name in names)
            if there:
                half = f"{there[0]} without {next(name for name in names if name not in there)}"
    if path.is_file() and path.name not in KNOWN and path.suffix in KINDS[kind].suffixes:
        return (path,)
    held = half or ", ".join(name for name in KNOWN if (folder / name).is_file()) or "no vocabulary"
    found = f"{folder} holds {held}, but" if path.is_dir() or half else f"{path} is something else:"
    raise UserError(f"{found} {model} reads {wanted}. Give the tokenizer that belongs to the model (--tokenizer).")


def check_size(words: Words, kind: str, vocab: int) -> None:
    """Raises UserError when a model with an embedding of `vocab` rows cannot be the one that `words` belong to: fewer rows than
    tokens, or far more (any more, for BLIP)."""
    spare = vocab - words.size
    if 0 <= spare <= (0 if KINDS[kind].family == WORDPIECE else SPARE):
        return
    model = KINDS[kind].model
    raise UserError(
        f"{words.file} has {words.size:,} tokens, counting those that {model} adds, but the model has {vocab:,}: it is another "
        "model's. Give the tokenizer that belongs to the model (--tokenizer)."
    )
