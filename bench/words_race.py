"""A comparison of models that write words: whole loops on both sides, our decoder and transformers' `generate` taking turns.

What is compared first is what was written, word for word: as many words on both sides, or the times are of unequal work.

tokens    BLIP-2: what stands for a picture before the words, and a prompt, to words. The language model alone.
captions  BLIP's captioner: pictures and a prompt to words, end to end.
answers   BLIP's VQA: pictures and a question to words, end to end.

B pictures with a prompt each, L tokens, Q queries, E width of a word, W new words.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from bench.compare import Measured, Way, take_turns, transformers_wanted
from bench.forms import Load, Writing
from bench.peak import Peak, torch_peak
from bench.race import Against, Say, weights_of
from bench.table import compare_lines, library_lines, quote_line
from bench.words import random_asked, write_words
from models.config import Blip2LlmConfig, BlipCaptionConfig, Config, GenerationConfig
from models.errors import UserError
from models.llm_config import words_width
from runtime.decoders import Decoder, Seen, open_decoder, parts_of
from runtime.graphs import Graphs

TOKENS, CAPTIONS, ANSWERS = "tokens", "captions", "answers"


def words_works(config: Config) -> tuple[str, ...]:
    """The works that there are for a model that writes words."""
    if isinstance(config, Blip2LlmConfig):
        return (TOKENS,)
    return (CAPTIONS,) if isinstance(config, BlipCaptionConfig) else (ANSWERS,)


class WordsRace:
    """The works of a model, each with each number of beams."""

    def __init__(self, graphs: Graphs, load: Load, writing: Writing, against: Against) -> None:
        """Raises UserError when transformers is missing or has no such model, or the checkpoint is not of these graphs."""
        self._graphs, self._load, self._writing, self._against = graphs, load, writing, against
        self._asked = random_asked(graphs, load.batchsize, load.length)
        with transformers_wanted():
            from bench.their_words import load_their_words
        assert isinstance(graphs.config, GenerationConfig)
        files = (against.checkpoint, against.vit_checkpoint, against.llm_checkpoint)
        self._theirs, self._report = load_their_words(graphs.config, files, self._asked, load.threads)

    def run(self, peak: Peak, say: Say) -> dict[str, Any]:
        threads, asked, new = self._load.threads, self._asked, self._writing.new_tokens
        their_peak = torch_peak(threads)
        decoders = {past: open_decoder(self._graphs, self._load.provider, threads, past) for past in self._writing.use_past}
        measured = [self._measure(work, beams, decoders) for work in self._against.works for beams in self._writing.num_beams]
        their_peak = their_peak.merged(torch_peak(threads))
        say("")
        say(f"Taking turns with {self._theirs.describe()}, {self._against.rounds} rounds, same weights.")
        batch, length = asked.ids.shape
        say(f"{batch} pictures at a time, prompts of {length} tokens, {new} new ones: the same words on both sides.")
        say("")
        for line in (*compare_lines(measured), "", quote_line(measured), *library_lines(peak, their_peak)):
            say(line)
        return {
            "compare": {
                "with": self._theirs.describe(),
                **weights_of(self._report),
                "prompt_tokens": length,
                "new_tokens": new,
                "rounds": self._against.rounds,
                "peak": vars(their_peak),
                "works": [work.record() for work in measured],
            }
        }

    def _measure(self, work: str, beams: int, decoders: Mapping[bool, Decoder]) -> Measured:
        """Items are the words of `tokens`, and the pictures of the others."""
        asked, new, parts = self._asked, self._writing.new_tokens, parts_of(self._graphs)
        count = len(asked.ids)
        items = count * new if work == TOKENS else count
        names = parts.write if work == TOKENS else (*parts.look, *([parts.read] if parts.read else []), *parts.write)
        given = self._prompts(count) if work == TOKENS else asked.pictures

        def ours(decoder: Decoder) -> np.ndarray:
            seen = Seen({"llm_prompt": given}) if work == TOKENS else decoder.look(given)
            return write_words(decoder.begin(seen, asked.picture, asked.ids, asked.mask), asked, beams, new)

        ways = [
            Way(f"{', '.join(names)}, {'caches kept' if past else 'no caches'}", items, partial(ours, decoder))
            for past, decoder in decoders.items()
        ]
        theirs = Way(f"transformers: {self._theirs.name}", items, lambda: self._theirs.write(given, asked.ids, beams, new))
        called = f"{work} ({'greedy' if beams == 1 else f'{beams} beams'})"
        return take_turns(called, [*ways, theirs], self._against.rounds, same_words)

    def _prompts(self, count: int) -> np.ndarray:
        """What stands for pictures before the words: (B, Q, E) float32."""
        config = self._graphs.config
        assert isinstance(config, Blip2LlmConfig)
        shape = (count, config.qformer.queries, words_width(config.llm))
        return np.random.default_rng(1).standard_normal(shape, np.float32)


def same_words(work: str, way: Way, ours: np.ndarray) -> float:
    """0, as no word differs. Raises UserError where one does: ours and that of the way are (B, W)."""
    theirs = way.run()
    if ours.shape != theirs.shape or (ours != theirs).any():
        differing = int((ours != theirs).sum()) if ours.shape == theirs.shape else ours.size
        raise UserError(
            f"The {work} come out differently: {way.name} writes {differing} of {ours.size} words that our graphs do not write, "
            "so the speeds are not of equal work. Give --checkpoint the file that the graphs were exported from."
        )
    return 0.0
