"""Texts that are read line by line: prompts, and Flickr's captions."""

from __future__ import annotations

import re
from pathlib import Path

from models.errors import UserError
from preprocess.annotations import LARGEST, picture_path
from preprocess.checked import checked_text

SUFFIXES = (".txt", ".token")  # of Flickr's captions
ALL = "all"  # the split of every picture that has captions
LINE = re.compile(r"(.+?)#[0-9]+\t(.*)")


def read_lines(path: Path, expected: str) -> list[str]:
    """The lines of a UTF-8 text; a last one that is empty is none. Raises UserError, which says what was `expected`, when it
    cannot be read or is blank."""
    if not path.is_file():
        raise UserError(f"There is no file {path}; expected {expected}.")
    if (size := path.stat().st_size) > LARGEST:
        raise UserError(f"{path} has {size:,} bytes; texts of more than {LARGEST:,} bytes are not read. Split the file.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); expected {expected}.") from error
    if not text.strip():
        raise UserError(f"{path} is empty; expected {expected}.")
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")  # not splitlines: U+2028 may stand in a caption


def read_prompts(path: Path) -> list[str]:
    """One prompt in each line, as it stands there; a blank line is an empty prompt. Raises UserError as `read_lines`."""
    return read_lines(path, "one prompt in each line")


def read_flickr(path: Path, split: str) -> list[tuple[str, list[str]]]:
    """Pictures and their captions from Flickr8k.token.txt: those that Flickr_8k.<split>Images.txt beside it lists, in its
    order, or with the split "all" those of the file itself, as for results_20130124.token of Flickr30k.

    The forms are the data set's: lines `name.jpg#0<TAB>caption`, and lists of names for train, dev (or val) and test. Raises
    UserError that names the file and the line (from 1).
    """
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(read_lines(path, "lines 'name.jpg#0<TAB>caption'"), 1):
        if line.strip():
            if not (match := LINE.fullmatch(line)):
                raise UserError(f"{path}, line {number}: found {line[:60]!a}, expected 'name.jpg#0<TAB>caption'.")
            captions.setdefault(match[1], []).append(match[2])
    if split == ALL:
        return [_checked(name, texts, f"{path}, {name}") for name, texts in captions.items()]
    listed = path.parent / f"Flickr_8k.{'dev' if split == 'val' else split}Images.txt"
    if not listed.is_file():
        raise UserError(f"{listed} is missing: it lists the pictures of {split!r}. Put it there, or take all with --split {ALL}.")
    found = []
    for number, line in enumerate(read_lines(listed, "a picture in each line"), 1):
        if name := line.strip():
            if name not in captions:
                raise UserError(f"{listed}, line {number}: {path} has no caption of {name[:60]!a}.")
            found.append(_checked(name, captions[name], f"{listed}, line {number}"))
    return found


def _checked(name: str, captions: list[str], where: str) -> tuple[str, list[str]]:
    return picture_path(name, where), [checked_text(text, where, "a caption") for text in captions]
