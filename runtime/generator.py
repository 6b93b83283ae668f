"""Pictures and prompts to texts: a decoder with its words, for blip-run and the Python interface alike.

P pictures that are looked at together, N prompts about them that are written on together, L tokens, Q queries.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from models.config import Blip2LlmConfig, BlipVqaConfig
from models.errors import UserError
from preprocess.wordpiece_words import WordpieceWords
from preprocess.words import Words, load_words
from runtime.batches import slices
from runtime.decoders import Decoder, Seen, open_decoder
from runtime.decoding import Steps
from runtime.generation_presets import Settings
from runtime.graphs import MEND, Graphs
from runtime.rank import questions_at_once, rank
from runtime.room import check_columns, check_room, columns_of
from runtime.writing import Written, lengths, read, write

PREFILL = "llm_prefill"  # the graph of fixed length that pads every prompt


@dataclass(frozen=True)
class Request:
    """One text that is asked for."""

    number: int  # in the whole run: random numbers depend on it
    picture: int
    prompt: str  # as the model reads it


class Generator:
    """A graphs/ folder whose sessions are open."""

    def __init__(self, graphs: Graphs, provider: str, threads: int | None, use_past: bool = True) -> None:
        """Raises UserError when the graphs, their vocabulary or the provider cannot be used."""
        self.graphs, self.config = graphs, graphs.config
        self.words = open_words(graphs)
        self.decoder: Decoder = open_decoder(graphs, provider, threads, use_past)

    def write(
        self,
        seen: Seen,
        requests: Sequence[Request],
        settings: Settings,
        on_step: Callable[[int], None] | None = None,
        attend_padding: bool = False,
    ) -> list[Written]:
        """The texts of N requests about pictures that were seen, `Request.picture` being their numbers among these.

        `attend_padding`: have BLIP's answers look at the padding of the questions, as the original does. `on_step` is told
        after each step how many words it gave. Raises as `runtime.decode.generate`.
        """

        def begin(chosen: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> Steps:
            pictures = np.array([requests[n].picture for n in chosen], np.int64)
            return self.decoder.begin(seen, pictures, ids, mask, attend_padding)

        prompts, numbers = [request.prompt for request in requests], [request.number for request in requests]
        return write(begin, self.words, self.config, settings, prompts, numbers, on_step)

    def rank(
        self,
        seen: Seen,
        requests: Sequence[Request],
        answers: Sequence[str],
        k: int,
        number: int,
        on_step: Callable[[int], None] = lambda words: None,
    ) -> list[Written]:
        """The best `number` of `answers` to each request, of the k that runtime.rank looks at. BLIP's VQA alone."""
        assert isinstance(self.words, WordpieceWords)
        assert isinstance(self.config, BlipVqaConfig)
        ids, mask = read(self.words, self.config, [request.prompt for request in requests])
        candidates, kept = self.words.answers(answers)  # (A, 1 + W), [DEC] first
        lengths, k = kept.sum(axis=1) - 1, min(k, len(answers))
        pictures = np.array([request.picture for request in requests], np.int64)
        found = []
        for part in slices(0, len(requests), questions_at_once(k, self.config.decoder.vocab)):
            begin = partial(self.decoder.begin, seen, pictures[part], ids[part], mask[part])
            best, scores = rank(begin, candidates[:, 1:], lengths, k, columns_of(self.graphs), on_step)
            for row, values in zip(best[:, :number], scores, strict=True):
                texts, tokens = [answers[a] for a in row], [int(lengths[a]) - 1 for a in row]
                found.append(Written(texts, [float(value) for value in values[: len(row)]], tokens))
        return found

    def check(self, prompts: Sequence[str], settings: Settings) -> list[str]:
        """Raise unless these prompts can be read and written on, and return what is to be said of them: that some are cut.

        Raises Misuse when the lengths asked for leave no room for a new word, or contradict each other, or when a graph has
        not the room for them, UserError when a graph of fixed length cannot take a prompt.
        """
        check_columns(self.graphs, max(settings.decoding.num_beams, settings.decoding.num_return))
        prompts = list(dict.fromkeys(prompts))
        for chosen, length, new in lengths(self.words, self.config, settings, prompts):
            if not length and PREFILL in self.graphs.written:
                raise UserError(
                    f"The prompt {prompts[chosen[0]][:60]!r} has no token, and {PREFILL} reads one at least. "
                    "Give it a word, or export the graphs with --target ort."
                )
            check_room(self.graphs, self.decoder, length, new, "Give a smaller --max-length")
        return self._cut(prompts)

    def check_ranking(self, prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
        """The same of questions that are answered with one of a list."""
        assert isinstance(self.words, WordpieceWords)
        prompts = list(dict.fromkeys(prompts))
        longest, answer = read(self.words, self.config, prompts)[0].shape[1], self.words.answers(answers)[0].shape[1] - 1
        check_room(self.graphs, self.decoder, longest, answer, "Leave out long answers")
        return self._cut(prompts)

    def _cut(self, prompts: Sequence[str]) -> list[str]:
        """What is to be said of prompts that are cut, as the original cuts them. Raises UserError where graphs of a shorter
        length would cut them to less than the original does."""
        longest, original = self.config.protocol.max_length, type(self.config).protocol.max_length
        if isinstance(self.config, BlipVqaConfig):
            assert isinstance(self.words, WordpieceWords)
            lengths = self.words.questions(prompts, sys.maxsize)[1].sum(axis=1)
        elif isinstance(self.config, Blip2LlmConfig):
            lengths = open_words(self.graphs, cut=False).prompts(prompts)[1].sum(axis=1)
        else:
            return []  # a captioner's are not
        cut = int((lengths > longest).sum())
        if cut and longest < original:
            raise UserError(
                f"A prompt has {lengths.max()} tokens, the graphs were exported for {longest}. Shorten it, or export them with "
                f"--length {min(int(lengths.max()), original)}."
            )
        said = f"Warning: {cut} of {len(prompts)} prompts have more than {longest} tokens; they are cut, as the original does."
        return [said] if cut else []


def open_words(graphs: Graphs, cut: bool = True) -> Words:
    """The vocabulary beside the graphs. `cut`: whether prompts are cut as the original cuts them.

    Raises UserError when it is damaged, or another model's.
    """
    config = graphs.config
    words: Words
    if isinstance(config, Blip2LlmConfig):
        longest = config.protocol.max_length if cut else None
        words = load_words(graphs.tokenizer, config.llm.family, config.llm.vocab, longest)
    else:
        words = WordpieceWords.load(graphs.tokenizer, config)
    if words.sha256 != graphs.content["tokenizer"]["sha256"]:
        raise UserError(f"{graphs.tokenizer} is not the file that was exported: its sha256 differs. {MEND}")
    return words
