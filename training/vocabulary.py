"""The vocabulary of a model that writes words."""

from __future__ import annotations

from pathlib import Path

from models.config import Blip2LlmConfig, GenerationConfig
from models.errors import Misuse
from preprocess.wordpiece_words import WordpieceWords
from preprocess.words import Words, load_words
from training.settings import Settings

TOKENIZER = Path(__file__).parent.parent / "demo" / "tokenizer"  # when none is named


def words_of(settings: Settings, config: GenerationConfig, max_length: int | None = None) -> Words:
    """Args:
        max_length: tokens that a language model's prompts are cut to; None cuts none.

    Raises Misuse where a language model's vocabulary is not named, UserError when it is damaged or another model's.
    """
    if not isinstance(config, Blip2LlmConfig):
        return WordpieceWords.load(settings.model.tokenizer or TOKENIZER, config)
    path = settings.model.tokenizer or settings.model.llm_checkpoint
    if path is None:
        raise Misuse("model.tokenizer is null; expected the tokenizer of the language model, or its folder.")
    return load_words(path, config.llm.family, config.llm.vocab, max_length)
