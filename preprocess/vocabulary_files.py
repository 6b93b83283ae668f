"""The files of a vocabulary: what is damaged, or not what it seems, is said in one sentence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from models.errors import UserError
from preprocess.annotations import is_text

POINTER = b"version https://git-lfs"  # what a clone without the large files has in their place


def read_bytes(file: Path) -> bytes:
    """The content. Raises UserError when there is none, or only a pointer to it."""
    data = file.read_bytes()
    if not data.strip():
        raise UserError(f"{file} is empty. Give the file of the published tokenizer.")
    if data.startswith(POINTER):
        raise UserError(f"{file} is a Git LFS pointer, not the file itself. Fetch it (git lfs pull), or copy the published file.")
    return data


def read_text(file: Path) -> str:
    """The content as UTF-8. Raises UserError."""
    try:
        return read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not UTF-8. Give the file of the published tokenizer.") from error


def read_json(file: Path) -> Any:
    """The content as JSON. Raises UserError."""
    try:
        return json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}.") from error


def read_tokenizer(file: Path) -> Tokenizer:
    """A `tokenizer.json` of the tokenizers library; texts are neither cut nor padded by it. Raises UserError."""
    try:
        tokenizer = Tokenizer.from_str(read_text(file))
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"{file} is not a tokenizer.json: {error}.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def digest(files: Sequence[Path]) -> str:
    """SHA-256 over the files one after the other; of a single file its own."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def require_characters(texts: Sequence[str]) -> None:
    """Raises UserError for a text that no tokenizer reads: one with half a character (a lone surrogate)."""
    for number, text in enumerate(texts):
        if not is_text(text):
            raise UserError(f"Text {number} (from 0), {text[:60]!a}, holds half a character (a lone surrogate). Correct it.")
