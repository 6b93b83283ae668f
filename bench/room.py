"""Whether graphs have room for what is asked of them, said before minutes are spent."""

from __future__ import annotations

from bench.forms import Load, Writing, places_of
from models.config import Blip2LlmConfig, BlipVqaConfig, GenerationConfig
from models.errors import Misuse
from models.generation_spec import BEAMS, SLOTS
from runtime.decoders import parts_of
from runtime.graphs import Graphs, all_sizes, fixed_sizes


def refuse_beyond(graphs: Graphs, load: Load, writing: Writing) -> None:
    """Raise Misuse when there are no positions, no slots or no columns for the words and beams asked for, or when graphs with
    fixed axes are asked for what they cannot do."""
    config, before = graphs.config, places_of(graphs, load.length).before
    assert isinstance(config, GenerationConfig)
    positions = (config.llm if isinstance(config, Blip2LlmConfig) else config.decoder).positions
    new = writing.new_tokens
    if before + new > positions:
        raise Misuse(
            f"{new} new words are asked for after {before}, and the model has positions for {positions}. "
            "Give fewer --new-tokens, or fewer --prompt-tokens."
        )
    if isinstance(config, BlipVqaConfig) and load.length > config.text.positions:
        raise Misuse(
            f"--prompt-tokens {load.length} is longer than the {config.text.positions} positions of the question encoder."
        )
    if graphs.is_static:
        _refuse_beyond_fixed(graphs, load, writing, before)


def _refuse_beyond_fixed(graphs: Graphs, load: Load, writing: Writing, before: int) -> None:
    if False in writing.use_past:
        raise Misuse(f"{graphs.source.folder} has graphs with fixed buffers, which need the past. Leave --use-past false out.")
    for name in graphs.written:
        length = fixed_sizes(graphs, name)[1]
        if length is not None and length < load.length:
            raise Misuse(f"{name} was exported for prompts of {length} tokens, asked were {load.length}. Give --prompt-tokens.")
    writer = parts_of(graphs).write[-1]
    sizes = all_sizes(graphs, writer) if writer in graphs.written else {}
    # The last of the new words is read by nobody, and the word that is read needs no slot.
    new, room = writing.new_tokens, sizes.get(SLOTS, before + writing.new_tokens) + 2 - before
    if new > room:
        raise Misuse(
            f"{new} new words are asked for, and {writer} was exported with room for {max(room, 0)} after {before}. "
            "Give fewer --new-tokens, or export it with more --slots."
        )
    most = max(writing.num_beams)
    if most > sizes.get(BEAMS, most):
        raise Misuse(f"{writer} was exported for {sizes[BEAMS]} sequences of a prompt. Give --num-beams that are no more.")
