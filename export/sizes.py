"""The sizes that a graph is traced with, and those that a graph for Ascend's converter is fixed to."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from models.config import Blip2LlmConfig, BlipCaptionConfig, BlipVqaConfig, Config, GenerationConfig
from models.errors import Misuse
from models.generation_spec import BEAMS, CROSS, PAST, QUERIES, ROWS, SLOTS
from models.llm_config import T5Config
from models.spec import BATCH, LENGTH, GraphSpec

NEW_WORDS = 30  # that there is room for after the longest prompt, unless more is asked for
PER_SEQUENCE = ("llm_decode",)  # its batch is of sequences, several of each prompt


class Sizes(NamedTuple):
    """Of every axis of a graph that is not the model's."""

    batch: int
    length: int  # of the text
    others: Mapping[str, int] = MappingProxyType({})  # of the axes that only some graphs have, by their letters

    def bind(self, spec: GraphSpec) -> GraphSpec:
        """The graph with its axes set to these."""
        return spec.bind(self.batch, self.length, **self.others)

    def opened(self, spec: GraphSpec, texts: bool = False) -> GraphSpec:
        """The same with its batch left open, and with `texts` the length of its texts too."""
        # Bound with a name for a number, which leaves the axes that depend on it as they are written.
        return spec.bind(BATCH, LENGTH if texts else self.length, **self.others)  # type: ignore[arg-type]

    def shown(self, spec: GraphSpec) -> str:
        """The sizes of the axes that the graph has, where these are not numbers: (3, 12) of batch and text, (B3 L1 P4)."""
        if not self.others:
            reads = any(t.name == "text_ids" for t in spec.inputs)
            return f"({self.batch}, {self.length})" if reads else f"({self.batch})"
        return "(" + " ".join(f"{k}{v}" for k, v in {BATCH: self.batch, LENGTH: self.length, **self.others}.items()) + ")"


def traced(config: Config) -> Sizes:
    """Of the example inputs. None is 0 or 1, which the exporter would take for a constant, and no two are equal."""
    return Sizes(2, min(8, config.protocol.max_length), {BEAMS: 3, ROWS: 7, PAST: 9, QUERIES: 5, CROSS: 11})


def fixed(config: Config, batchsize: int, beams: int, slots: int | None) -> Sizes:
    """Of graphs for ATC; the text has the model's longest. Raises Misuse for a buffer that does not hold a prompt, or holds
    more than the model has positions."""
    length = config.protocol.max_length
    if not isinstance(config, GenerationConfig):
        return Sizes(batchsize, length)
    longest = decoder_positions(config) - 1
    prompt = min(prompt_positions(config), longest)
    if slots is None:
        slots = min(prompt + NEW_WORDS, longest)
    if slots < prompt:
        raise Misuse(f"--slots {slots} does not hold a prompt, which takes {prompt} with --length {length}.")
    if slots > longest:
        raise Misuse(f"--slots {slots} is more than the model has positions for: {longest}, and one for the word that is read.")
    return Sizes(batchsize, length, {BEAMS: beams, SLOTS: slots, CROSS: _seen(config)})


def of_graph(sizes: Sizes, name: str) -> Sizes:
    """Of graph `name`: a language model takes the sequences of all prompts as rows of its batch."""
    return sizes._replace(batch=sizes.batch * sizes.others[BEAMS]) if name in PER_SEQUENCE else sizes


def prompt_positions(config: GenerationConfig) -> int:
    """What stands in the decoder before the first new word, at most: the queries and the prompt, the prompt, or one token."""
    if isinstance(config, BlipCaptionConfig):
        return config.protocol.max_length
    if isinstance(config, BlipVqaConfig) or isinstance(config.llm, T5Config):
        return 1
    return config.qformer.queries + config.protocol.max_length


def decoder_positions(config: GenerationConfig) -> int:
    """How many words the decoder can tell apart by their place."""
    return config.llm.positions if isinstance(config, Blip2LlmConfig) else config.decoder.positions


def _seen(config: GenerationConfig) -> int:
    """What a decoder looks at beside the picture: the question, or what T5 has read."""
    queries = config.qformer.queries if isinstance(config, Blip2LlmConfig) else 0
    return queries + config.protocol.max_length
