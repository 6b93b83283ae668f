"""Captions to the words that caption metrics count: Penn Treebank tokens, lower-cased, without punctuation.

What PTBTokenizer of pycocoevalcap 1.2 yields, without Java: it runs Stanford CoreNLP 3.4.1's PTBTokenizer over a file with
one caption a line and removes a list of punctuation. The list is compared after lower-casing, so brackets stay: a "(" is the
word "-lrb-". The rules are in postprocess.ptb_rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from postprocess.ptb_rules import ACROSS_BLANKS, CAPITALS, CLITIC, CURLED, LETTER, NOT, OPEN_END, RULES, SYMBOL

# What is no word; of pycocoevalcap's list what can occur.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
BEHIND = 48  # characters of what follows that a rule may look at: the start of a sentence, or a tag
# A line of the file ends at these; here they are blanks, or the words of one caption would count for the next.
BLANKS = str.maketrans(dict.fromkeys("\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029", " ") | {"\xad": None})  # soft hyphens go

# How tokens are written when that is not as they stand in the caption.
SIGNS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "¢": "cents", "£": "#"}
FRACTIONS = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": "", "&mdash;": "--", "&ndash;": "--"}
QUOTES = (
    dict.fromkeys("“«\x93", "``") | dict.fromkeys('”»\x94"', "''") | dict.fromkeys("’›\x92", "'") | dict.fromkeys("‘‛‹\x91", "`")
)
DASHES = dict.fromkeys(["–", "—", "―", "\x96", "\x97", "---"], "--") | dict.fromkeys(["…", "....", "....."], "...")
WRITTEN = SIGNS | FRACTIONS | ENTITIES | QUOTES | DASHES | dict.fromkeys("€¤₠\x80", "$")
STRAIGHT = str.maketrans("’‘‛", "'``")
ENDING = re.compile(f"{CLITIC}|{NOT}")
JOINED = re.compile(CAPITALS)
TAGGED = re.compile("<.+>")
TOKEN = re.compile(f"[!-~]|{LETTER}|{SYMBOL}|\\d")  # of one character: what is none of these is no token


def tokenize(captions: Sequence[str]) -> list[str]:
    """The words of every caption, one blank between them; nothing for a caption without words.

    A caption is read alone, but for one thing: a letter and a period at its end ("the Wii U.") are one word, unless the next
    caption begins a sentence with one of a few words ("A", "The"). The original reads one file, so there as well the words
    depend on the order.
    A fraction or telephone number that is written with blanks is one word; no-break spaces (U+00A0) stand for them.
    """
    lines = [caption.translate(BLANKS) for caption in captions]
    return [
        " ".join(word for word in _words(line, following) if word and word not in PUNCTUATION).rstrip()
        for line, following in zip(lines, [*lines[1:], ""], strict=True)
    ]


def _words(line: str, following: str) -> Iterator[str]:
    """The tokens of a line, `following` the next one. Read piece by piece where that is the same: pieces come again."""
    behind = f"\n{following[:BEHIND]}\n"
    if ACROSS_BLANKS.search(line):
        yield from _read(line, behind)
        return
    for piece in re.finditer("[^ ]+", line):
        seen = (line + behind)[piece.end() :][:BEHIND] if OPEN_END.search(piece[0]) else "\n"
        yield from _piece(piece[0], seen)


@lru_cache(maxsize=1 << 16)
def _piece(piece: str, behind: str) -> tuple[str, ...]:
    return tuple(_read(piece, behind))


def _read(line: str, behind: str) -> Iterator[str]:
    text, place = line + behind, 0
    while place < len(line):
        if text[place] in " \xa0":
            place += 1
            continue
        found = max((match for rule in RULES if (match := rule.match(text, place))), key=re.Match.end)
        yield _written(found[1])
        place = found.end(1)


def _written(token: str) -> str:
    if (written := WRITTEN.get(token.lower())) is not None:
        return written
    if len(token) == 1 and not TOKEN.match(token):
        return ""
    if not token.strip(CURLED):
        return "".join(QUOTES[sign] for sign in token)
    if ENDING.fullmatch(token):
        token = token.replace("&apos;", "'").translate(STRAIGHT)
    elif JOINED.fullmatch(token):
        token = re.sub("&(?i:amp);", "&", token)
    if not TAGGED.fullmatch(token):
        token = token.replace("(", "-lrb-").replace(")", "-rrb-")
    return token.lower().replace(" ", "\xa0")
