"""What a finished beam scores, which are kept, and when a prompt is done: the rules of the original and of transformers 5.x.

One object is one prompt. K beams, C candidates of a step, of which the first K count when they end.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from runtime.decoding import NEVER, ORIGINAL_BLIP, TRANSFORMERS, Decoding, Generated

UNLIKELY = -1e9  # less than a log-probability can be: all beams begin as one, and all but the first with this


class Rule(Protocol):
    """The finished texts of one prompt."""

    def take(self, sums: list[float], ended: list[bool], texts: np.ndarray, length: int) -> bool:
        """Look at the candidates of a step, best first, and say whether the prompt is done; it is when `length` is max_length.

        Args:
            sums: C log-probabilities of whole texts, float32.
            ended: C, whether a text's last word is a stop word; K at least are not.
            texts: (C, words) the new ids of each, the last one among them.
            length: of a text with the ids that were there before and its last word.
        """

    def best(self, number: int) -> list[Generated]:
        """The best `number` of at most K, best first."""


def rule_for(options: Decoding, before: int) -> Rule:
    """The rule that `options` name, for a prompt of which `before` ids count."""
    return Transformers(options, before) if options.rule == TRANSFORMERS else Original(options, before)


class Original:
    """What BLIP (transformers 4.15) and LAVIS with BLIP-2 (4.33) ran on: their BeamSearchScorer and BeamHypotheses.

    A text scores its log-probability, stop word and all, over its length to the length penalty; the length has the ids before
    the first new word in it, and not the stop word. At max_length a prompt that is not done adds its open texts.

    With K texts finished, a prompt is done: at once with early_stopping True; else when the best candidate of the step, ended
    or not, would not score above the worst of them at the length reached. That length has the word of this step in it in 4.31
    and later; in 4.28 and before it has not, so a search may be done a step sooner and give another text. With "never" and a
    positive penalty it is max_length. Numbers are float64 from the sums on, and the later of two equal texts goes first.
    """

    def __init__(self, options: Decoding, before: int) -> None:
        self.options, self.before = options, before
        self.found: list[Generated] = []  # best first

    def take(self, sums: list[float], ended: list[bool], texts: np.ndarray, length: int) -> bool:
        number = self.options.num_beams
        for place in range(number):
            if ended[place]:
                self._add(sums[place], texts[place, :-1], stopped=True)
        if len(self.found) == number and self._hopeless(sums[0], length):
            return True
        if length < self.options.max_length:
            return False
        for place in [place for place, stopped in enumerate(ended) if not stopped][:number]:
            self._add(sums[place], texts[place], stopped=False)
        return True

    def best(self, number: int) -> list[Generated]:
        return self.found[:number]

    def _add(self, total: float, text: np.ndarray, stopped: bool) -> None:
        score = total / (self.before + len(text)) ** self.options.length_penalty
        if len(self.found) < self.options.num_beams or score > self.found[-1].score:
            new = Generated(tuple(text.tolist()), score, stopped)
            self.found = sorted([new, *self.found], key=lambda text: -text.score)[: self.options.num_beams]

    def _hopeless(self, total: float, length: int) -> bool:
        if self.options.early_stopping is True:
            return True
        if self.options.early_stopping == NEVER and self.options.length_penalty > 0:
            length = self.options.max_length
        elif self.options.rule == ORIGINAL_BLIP:
            length -= 1
        reachable: float = total / length**self.options.length_penalty
        return self.found[-1].score >= reachable


class Transformers:
    """`_beam_search` of transformers 5.23 (generation/utils.py).

    A text scores its log-probability over the number of its new words, the stop word among them, to the length penalty: ids
    that were there before do not count. At max_length the first K candidates are finished, whatever they end with.

    A prompt is done when K texts are finished and either early_stopping is True, or the best text that runs on would not score
    above the worst of them at the length reached ("never" with a positive penalty: at max_length). What was finished stays as
    it was from then on, also while other prompts of the batch go on. Numbers stay float32, and the earlier of equals goes first.
    """

    def __init__(self, options: Decoding, before: int) -> None:
        self.options, self.before = options, before
        self.found = [Generated((), UNLIKELY, False)] * options.num_beams  # best first; what comes in must beat these
        self.finished = 0

    def take(self, sums: list[float], ended: list[bool], texts: np.ndarray, length: int) -> bool:
        number, last = self.options.num_beams, length == self.options.max_length
        for place in range(number):
            if ended[place] or last:
                text = texts[place, :-1] if ended[place] else texts[place]
                new = Generated(tuple(text.tolist()), self._score(sums[place], length), ended[place])
                self.found = sorted([*self.found, new], key=lambda text: -text.score)[:number]
                self.finished += new.score > UNLIKELY
        if last or (self.options.early_stopping is True and self.finished >= number):
            return True
        running = next(total for total, stopped in zip(sums, ended, strict=True) if not stopped)
        if self.options.early_stopping == NEVER and self.options.length_penalty > 0:
            length = self.options.max_length
        return self.found[-1].score >= self._score(running, length)

    def best(self, number: int) -> list[Generated]:
        return self.found[:number]

    def _score(self, total: float, length: int) -> float:
        return float(np.float32(total) / np.float32((length - self.before) ** self.options.length_penalty))
