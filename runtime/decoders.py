"""Pictures and prompts to a decoder that is ready to say words: which graphs of each kind of model do what.

P pictures, N prompts, L tokens of the longest, Q queries of the Q-Former, S side of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from models.config import Blip2LlmConfig, BlipCaptionConfig, BlipVqaConfig
from models.errors import Misuse, UserError
from models.llm_config import T5Config
from preprocess.sentencepiece_words import RULES
from preprocess.wordpiece_words import WordpieceWords
from runtime.begun import Begun
from runtime.bound import Value, fetched
from runtime.decoding import Steps
from runtime.engines import DynamicEngine, Engine, StaticEngine
from runtime.graphs import Graphs


@dataclass(frozen=True)
class Seen:
    """What a decoder needs of P pictures, by the names of graphs' inputs, kept where the graphs run."""

    values: Mapping[str, Value]  # a row for each picture


class Decoder(Protocol):
    """The graphs of a model that writes words."""

    @property
    def capacity(self) -> int | None:
        """New words that there is room for after the longest prompt that the model takes; None when the graphs are dynamic."""

    def room(self, words: int) -> int | None:
        """The same after a prompt of that many tokens."""

    def look(self, pictures: np.ndarray) -> Seen:
        """Pictures (P, 3, S, S) float32."""

    def begin(self, seen: Seen, picture: np.ndarray, ids: np.ndarray, mask: np.ndarray, attend_padding: bool = False) -> Steps:
        """N prompts, ready to go on.

        Args:
            seen: P pictures.
            picture: (N,) int64, which of them each prompt goes with.
            ids, mask: (N, L) int64. What the decoder goes on from, padded on the left: BLIP's captions, and language models
                but T5. What is read first, padded on the right: BLIP's questions and T5's prompts.
            attend_padding: let the decoder look at the padding of questions, as salesforce/BLIP does (models/blip_vqa.py),
                where an answer depends on the longest question of its batch.

        Raises:
            UserError: a prompt longer than the graphs take, or one without a token where the decoder goes on from the last.
        """


@dataclass(frozen=True)
class Parts:
    """Which graphs of a model do what."""

    look: tuple[str, ...]  # at pictures, one after the other
    read: str | None  # the prompt, before the decoder; None when the decoder goes on from it
    write: tuple[str, ...]  # words: the graph of the prompt and that of each word after it, when they are two
    queries: int = 0  # what is read of the picture before the words
    first: int | None = None  # the word that an answer begins with, where the prompt is read before


def open_decoder(graphs: Graphs, provider: str, threads: int | None, use_past: bool = True) -> Decoder:
    """The decoder of a graphs/ folder.

    Args:
        use_past: keep what words before the last one left; otherwise all are read again at each step, to compare.

    Raises:
        Misuse: graphs with fixed buffers without their past.
        UserError: no model that writes words, or a graph is missing or cannot be used.
    """
    if graphs.is_static and not use_past:
        raise Misuse(f"{graphs.source.folder} has graphs with fixed buffers, which need the past. Leave --use-past false out.")
    parts = parts_of(graphs)
    names = graphs.first_of((*parts.look, *([parts.read] if parts.read else []), *parts.write))
    engine: Engine
    if graphs.is_static:
        engine = StaticEngine(graphs, names, parts.write, provider, threads)
    else:
        engine = DynamicEngine(graphs, names, parts.write[0], provider, threads, use_past)
    return GraphDecoder(graphs, parts, engine)


def parts_of(graphs: Graphs) -> Parts:
    """The graphs that a model of this kind is run with. Raises UserError when it writes no words."""
    config = graphs.config
    if isinstance(config, BlipCaptionConfig):
        return Parts(("image_feat", "image_kv"), None, ("text_decoder",))
    if isinstance(config, BlipVqaConfig):
        words = WordpieceWords.load(graphs.tokenizer, config)
        return Parts(("image_feat",), "question_encoder", ("text_decoder",), first=words.decode_id)
    if not isinstance(config, Blip2LlmConfig):
        raise UserError(
            f"{graphs.source.folder} holds {graphs.content['model']}, which writes no words. "
            "Export a captioner, a model that answers questions, or BLIP-2 with a language model."
        )
    look, queries = ("image_feat", "qformer"), config.qformer.queries
    if isinstance(config.llm, T5Config):
        return Parts(look, "t5_encoder", ("t5_decoder",), queries, RULES[config.llm.family].start_ids[0])
    return Parts(look, None, ("llm_prefill", "llm_decode") if graphs.is_static else ("llm",), queries)


class GraphDecoder:
    """A Decoder over the graphs of one folder."""

    def __init__(self, graphs: Graphs, parts: Parts, engine: Engine) -> None:
        self._parts, self._engine = parts, engine
        self._inputs = {name: [tensor.name for tensor in spec.inputs] for name, spec in graphs.symbolic.items()}
        self._longest, self._static = graphs.config.protocol.max_length, graphs.is_static

    @property
    def capacity(self) -> int | None:
        return self.room(self._longest)

    def room(self, words: int) -> int | None:
        slots = self._engine.slots()
        if slots is None:
            return None
        # The last of the new words is read by nobody, and the word that is read needs no slot.
        taken = 1 if self._parts.read else self._parts.queries + words
        return slots + 2 - taken

    def look(self, pictures: np.ndarray) -> Seen:
        found: dict[str, Value] = {"input_image": pictures}
        for name in self._parts.look:
            found = self._engine.read(name, {wanted: found[wanted] for wanted in self._inputs[name]})
        return Seen(found)

    def begin(self, seen: Seen, picture: np.ndarray, ids: np.ndarray, mask: np.ndarray, attend_padding: bool = False) -> Steps:
        parts = self._parts
        if parts.read is None and not mask.any(axis=1).all() and (self._static or mask.shape[1]):
            raise UserError(
                "A prompt has no token, and the decoder goes on from the last one. Give it a word; with graphs of --target ort "
                "prompts without any can also be written on by themselves."
            )
        found = {name: self._engine.rows(value, picture) for name, value in seen.values.items()}
        if parts.read:
            texts: dict[str, Value] = {"text_ids": ids, "text_atten_mask": mask}
            found = self._engine.read(parts.read, {name: (texts | found)[name] for name in self._inputs[parts.read]})
            read = np.ones_like(mask) if attend_padding else mask
            found["cross_mask"] = np.pad(read, ((0, 0), (parts.queries, 0)), constant_values=1)  # (N, Q + L)
            ids = np.full((len(ids), 1), parts.first, np.int64)
            mask = np.ones_like(ids)
        wanted = self._inputs[parts.write[0]]
        prompt = fetched(found["llm_prompt"]) if "llm_prompt" in wanted else None  # (N, Q, E)
        beside = {name: value for name, value in found.items() if name in wanted and name != "llm_prompt"}
        return self._engine.steps(Begun(ids, mask, beside, prompt))
