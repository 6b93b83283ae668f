"""From the logits of the next word to whole texts: greedy, beam search and sampling, over any decoder.

The loop sees no text, no picture and no cache: `Steps` is the model with its caches, and all it is told is which row goes on
with which word. A prompt that is finished is left out of the next step, so it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from models.errors import Misuse, UserError
from runtime import beams, sampling
from runtime.decoding import ORIGINAL, ORIGINAL_BLIP, RULES, TRANSFORMERS, Decoding, Generated, Steps, check

__all__ = ["ORIGINAL", "ORIGINAL_BLIP", "RULES", "TRANSFORMERS", "Decoding", "Generated", "Steps", "check", "generate"]


def generate(
    steps: Steps,
    counted: np.ndarray,
    stop_ids: Sequence[int],
    options: Decoding,
    on_step: Callable[[int], None] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[list[Generated]]:
    """For each of the N prompts of `steps`, num_return sequences: the best first, or in the order they were drawn.

    Args:
        counted: (N, L) int64, the ids that the original's `input_ids` hold before the first new word. They count for the
            lengths and for the repetition penalty, nothing else; -1 is padding that counts for the lengths alone. L may be 0.
        stop_ids: what ends a text.
        on_step: told after each step how many words it gave: one for each sequence still going, and one for each prompt of
            a beam search.
        numbers: of the prompts in the whole run, from which their random numbers come; 0 to N - 1 when left out.

    Raises:
        Misuse: options that contradict each other, or no room for a new word.
        UserError: logits with NaN or infinity, or a stop word outside their vocabulary.
    """
    check(options)
    count, before = counted.shape
    if before >= options.max_length:
        raise Misuse(f"max_length {options.max_length} leaves no room for a new word after the {before} that count already.")
    if options.num_beams > 1 and options.rule != TRANSFORMERS and not before:
        raise Misuse(f"The rule {options.rule!r} divides by the length with a first word, such as BOS; here is none.")
    if not count:
        return []
    first = steps.start()  # (N, V)
    stop_ids = tuple(dict.fromkeys(stop_ids))
    _check_words(stop_ids, first.shape[1])
    told = on_step or (lambda words: None)
    if options.num_beams > 1:
        return beams.search(steps, first, counted, stop_ids, options, told)
    return sampling.follow(steps, first, counted, stop_ids, options, range(count) if numbers is None else numbers, told)


def _check_words(stop_ids: tuple[int, ...], vocabulary: int) -> None:
    outside = [word for word in stop_ids if not 0 <= word < vocabulary]
    if outside:
        raise UserError(
            f"The stop word {outside[0]} is not among the {vocabulary} words that the graph knows. "
            "Check that the tokenizer is the model's own."
        )
    if vocabulary < max(2, 1 + len(stop_ids)):
        raise UserError(f"The graph knows {vocabulary} words, {len(stop_ids)} of them stop words: no text can be made of them.")
