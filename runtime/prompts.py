"""What a model is given to read beside the picture, and what is said of what it wrote.

The original of each model cleans questions (salesforce/BLIP data/utils.py, and LAVIS's processor `blip_question`) and leaves
prompts as they are; mindformers cleans a prompt as a caption. LAVIS can reduce the words of an answer to their stems, with a
spaCy model that nobody has offline; no evaluation of VQA v2 asks for it, and it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from models.config import BlipCaptionConfig, Config
from models.errors import Misuse
from preprocess.questions import pre_question
from preprocess.text import pre_caption
from preprocess.wordpiece_words import WordpieceWords
from preprocess.words import Words
from runtime.generation_presets import PLACE, Settings


def caption_prompt(prompt: str, settings: Settings, max_words: int) -> str:
    """The prompt of one picture as the model reads it."""
    return pre_caption(prompt, max_words) if settings.clean_prompt else prompt


def question_prompt(question: str, settings: Settings, max_words: int) -> str:
    """A question, as annotated, in the template: what the model reads of it."""
    if settings.clean_prompt:
        return pre_caption(settings.prompt.replace(PLACE, question), max_words)
    return settings.prompt.replace(PLACE, pre_question(question, max_words))


def text_of(words: Words, config: Config, settings: Settings, prompt: str, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """The text of the new words `ids` after a prompt (its ids without padding), as the original decodes it."""
    if settings.echo_prompt:
        return words.text([*prompt_ids, *ids])
    if isinstance(config, BlipCaptionConfig):
        assert isinstance(words, WordpieceWords)
        return words.after(prompt, ids)
    return words.text(ids)  # drops 0 and 2 as any special token; LAVIS makes Vicuna's 0 a 2 to that end


def split_at_commas(text: str) -> list[str]:
    """What stands between commas, blanks and all; nothing between two is an empty text."""
    return text.split(",")


def paired(count: int, texts: Sequence[str], what: str, parted: bool = False) -> list[str]:
    """`texts`, one for each of `count` pictures. Raises Misuse when there are not as many; where they were `parted` at commas,
    one of them may hold a comma of its own."""
    if len(texts) != count:
        hint = f" Commas part them: if one holds a comma, give all in --{what}-file, one a line." if parted else ""
        raise Misuse(f"--images names {count}, --{what} {len(texts)}: expected one {what[:-1]} for each picture.{hint}")
    return list(texts)
