"""Values of JSON files, checked: each function returns what it was given, or raises UserError that says what was found there
instead. `where` names the place: a file, an entry of it."""

from __future__ import annotations

import json
from typing import Any

from models.errors import UserError
from preprocess.annotations import in_words, is_text

Id = int | str


def checked_list(values: Any, where: str, of: str) -> list[Any]:
    """A list with something in it. `where` ends in a verb: "a.json holds"."""
    if isinstance(values, list) and values:
        return values
    raise UserError(f"{where} {'an empty list' if values == [] else in_words(values)}; expected a list of {of}.")


def checked_text(value: Any, where: str, what: str) -> str:
    """A text that is not blank and that UTF-8 can write. `what` names it: "its caption"."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {what} is {in_words(value)}; expected a text.")
    if not is_text(value):
        raise UserError(f"{where}: {what}, {value[:60]!a}, holds half a character (a lone surrogate). Correct it.")
    return value


def checked_id(value: Any, where: str, key: str) -> Id:
    """A whole number from 0 that 64 bits hold, or a text. `key` is its name in the file."""
    if isinstance(value, str):
        return checked_text(value, where, f"its {key}")
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63:
        return value
    found = json.dumps(value)[:40] if isinstance(value, bool | int | float) else in_words(value)
    raise UserError(f"{where}: its {key} is {found}; expected a whole number from 0, or a text.")
