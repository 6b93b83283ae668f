"""Whether prompts and what is to be written after them fit the graphs: said before the work begins, not in the middle of it."""

from __future__ import annotations

from models.config import Blip2LlmConfig, BlipVqaConfig
from models.errors import Misuse, UserError
from models.generation_spec import BEAMS
from models.spec import LENGTH
from runtime.decoders import Decoder
from runtime.graphs import Graphs, all_sizes

PROMPT_GRAPHS = ("llm_prefill", "t5_encoder", "question_encoder")  # which read a prompt at once
COLUMN_GRAPHS = ("text_decoder", "t5_decoder")  # which have an axis for the texts of a prompt


def check_room(graphs: Graphs, decoder: Decoder, prompt: int, new: int, mend: str) -> None:
    """Raise unless a prompt of `prompt` tokens and `new` words after it fit: UserError when the prompt is too long for a graph
    of fixed length, Misuse, which says how to `mend` it, when there is no room for the words."""
    for name in PROMPT_GRAPHS:
        fixed = all_sizes(graphs, name).get(LENGTH) if name in graphs.written else None
        if fixed is not None and prompt > fixed:
            raise UserError(
                f"A prompt has {prompt} tokens, {name} was exported for {fixed}. "
                f"Shorten it, or export the graphs with --length {prompt}."
            )
    if (room := decoder.room(prompt)) is not None and new > room:
        raise Misuse(
            f"{new} new words are asked for, and after a prompt of {prompt} tokens the graphs have room for {max(room, 0)}. "
            f"{mend}, or export them with more --slots."
        )
    config = graphs.config
    if isinstance(config, BlipVqaConfig):
        taken, positions = 1, config.decoder.positions  # [DEC]
    else:
        queries = config.qformer.queries if isinstance(config, Blip2LlmConfig) else 0
        taken, positions = queries + prompt, config.text.positions
    if taken + new - 1 > positions:  # the last word is read by nobody
        raise Misuse(f"{new} new words are asked for after {taken}, and the model has positions for {positions}. {mend}.")


def check_columns(graphs: Graphs, rows: int) -> None:
    """Raise Misuse when the graphs were exported for fewer than `rows` texts of a prompt."""
    columns = columns_of(graphs)
    if columns is not None and rows > columns:
        raise Misuse(
            f"{rows} texts at a time are asked for, and the graphs were exported for {columns} of a prompt. "
            f"Ask for fewer (--num-beams, --num-return), or export them with --beams {rows}."
        )


def columns_of(graphs: Graphs) -> int | None:
    """How many texts of a prompt the decoder takes at a time; None when any number."""
    sizes = [all_sizes(graphs, name) for name in COLUMN_GRAPHS if name in graphs.written]
    return sizes[0].get(BEAMS) if sizes else None
