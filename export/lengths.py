"""The text lengths that a graph is to be converted for, an .om for each. Imports no torch.

A caption that is padded to the model's longest costs what the longest one does. A static .om has one length, so several lengths
are several files, of which the runtime takes the shortest that holds a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from export.targets import ASCEND, OPEN
from models.errors import Misuse
from models.spec import LENGTH, GraphSpec

BUCKETS = "buckets"
# Multiples of 8, so that the rows of an even batch fill a matrix unit of 16; each at most twice the one before.
LADDER = (8, 16, 24, 48, 96, 192, 384)
LEAST_GAIN = 8  # tokens that a step is shorter than the longest: every file holds the weights once more
SHORTEST = 3  # a word between the tokens that begin and end a text


def buckets(longest: int) -> list[int]:
    """The usual lengths for texts of up to `longest` tokens, growing: 8, 16, 24, 35 for 35."""
    return [*(length for length in LADDER if length <= longest - LEAST_GAIN), longest]


def lengths_asked(text: str | None, longest: int) -> list[int]:
    """The lengths of --length `text`, growing; None asks for `longest` alone.

    Raises Misuse for what is no list of lengths, and for lengths beyond `longest`, or without it: some texts are that long.
    """
    if text is None:
        return [longest]
    if text == BUCKETS:
        return buckets(longest)
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise Misuse(f"--length {text} is neither '{BUCKETS}' nor a list of numbers such as 8,16,{longest}.") from error
    if wrong := [length for length in lengths if length < min(SHORTEST, longest)]:
        raise Misuse(f"--length {text} holds {wrong[0]}; a text has at least {SHORTEST} tokens, its first and last among them.")
    if twice := [length for length in lengths if lengths.count(length) > 1]:
        raise Misuse(f"--length {text} holds {twice[0]} twice.")
    if wrong := [length for length in lengths if length > longest]:
        raise Misuse(f"--length {text} holds {wrong[0]}, these graphs were exported for texts of {longest} tokens at most.")
    if longest not in lengths:
        raise Misuse(
            f"--length {text} leaves out {longest}, the tokens of the longest texts of these graphs. Add it, or export them with "
            "blip-export --length, which has longer texts cut."
        )
    return sorted(lengths)


def lengths_of(specs: Sequence[GraphSpec], text: str | None, longest: int) -> dict[str, list[int]]:
    """By the names of `specs`, as they were exported, the lengths that each is to be converted for: of a graph whose texts have
    one length, or that reads none, `longest` alone. Raises Misuse as `lengths_asked` does, and for several lengths of a graph
    whose texts have one, or of no graph with a text."""
    asked, reading = lengths_asked(text, longest), [spec for spec in specs if reads_lengths(spec)]
    several = text == BUCKETS or asked != [longest]
    if fixed := [spec.name for spec in reading if several and not is_open(spec)]:
        raise Misuse(
            f"--length {text} needs graphs whose text axis is open; {fixed[0]} was exported for {longest} tokens. Export it "
            f"again: graphs of retrieval with --target {ASCEND} --length {OPEN}; others in a folder for each --length."
        )
    if several and not reading:
        raise Misuse(f"--length {text} is of texts, and {', '.join(spec.name for spec in specs)} read none. Leave it out.")
    return {spec.name: asked if is_open(spec) else [longest] for spec in specs}


def is_open(spec: GraphSpec) -> bool:
    """Whether the length of its texts is left to the converter."""
    return any(LENGTH in tensor.shape for tensor in spec.inputs)


def reads_lengths(spec: GraphSpec) -> bool:
    """Whether it reads texts, and not single words."""
    return any(tensor.name == "text_atten_mask" for tensor in spec.inputs)
