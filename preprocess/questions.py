"""Questions: the original's cleaning. Source: salesforce/BLIP data/utils.py (`pre_question`)."""

from __future__ import annotations

import re

MAX_WORDS = 50


def pre_question(question: str, max_words: int = MAX_WORDS) -> str:
    """The question as BLIP was trained on it: lower case, `.!"()*#:;~` taken out, the blanks at its end too, the first
    `max_words` words. Unlike `pre_caption` it puts no blank in the place of what it takes out, and leaves runs of blanks as
    they are: an empty word between two blanks counts as a word."""
    question = re.sub(r"([.!\"()*#:;~])", "", question.lower()).rstrip(" ")
    return " ".join(question.split(" ")[:max_words])
