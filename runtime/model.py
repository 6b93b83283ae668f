"""A graphs/ or om/ folder ready to be called from Python: its tokenizer, and sessions, opened when first needed and then kept.

B pictures, M texts, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import Misuse
from models.spec import LENGTH
from preprocess.annotations import is_text
from preprocess.pictures import open_graphs
from preprocess.text import pre_caption
from runtime.batches import slices, trimmed
from runtime.embed import look_at, picture_batch, refuse_nan, text_batches
from runtime.graphs import Graphs, read_graphs
from runtime.picture_input import as_list, read_pictures
from runtime.place import Device, placed
from runtime.run import refuse_model
from runtime.session import PROVIDERS, Session, open_session


@dataclass(frozen=True)
class Engine:
    """A graphs/ folder, and what is to run it: nothing is loaded yet."""

    graphs: Graphs
    provider: str
    threads: int | None
    batchsize: int  # of all NPUs together

    @classmethod
    def checked(
        cls, graphs: str | Path, provider: str, threads: int | None, batchsize: int, device: Device | None = None
    ) -> Engine:
        """Raises Misuse for options that cannot be, UserError when the folder or the provider cannot be used."""
        if provider not in PROVIDERS:
            raise Misuse(f"There is no provider {provider!r}; known providers: {', '.join(PROVIDERS)}.")
        if not isinstance(graphs, (str, Path)):
            raise Misuse(f"graphs is {graphs!r:.60}; expected the path of a folder that blip-export wrote.")
        size = count("batchsize", batchsize)
        threads = None if threads is None else count("threads", threads)
        found = placed(read_graphs(Path(graphs)), provider, device, size)
        return cls(found, provider, threads, size * max(1, len(found.devices)))


class Model:
    """The graphs of one folder on one provider."""

    def __init__(
        self, graphs: str | Path, provider: str, threads: int | None, batchsize: int, device: Device | None = None
    ) -> None:
        """Raises Misuse for options that cannot be, UserError when the folder, the provider or an NPU cannot be used."""
        engine = Engine.checked(graphs, provider, threads, batchsize, device)
        refuse_model(engine.graphs, "retrieval")  # which all but those do that write
        self.graphs, self.batchsize = engine.graphs, engine.batchsize
        self._provider, self._threads = engine.provider, engine.threads
        self.config, self.tokenizer = open_graphs(Path(graphs))
        self._opened: dict[str, Session] = {}

    def sessions(self, names: Sequence[str]) -> list[Session]:
        """The graphs `names`, each loaded once."""
        for name in names:
            if name not in self._opened:
                self._opened[name] = open_session(self.graphs, name, self._provider, self._threads)
        return [self._opened[name] for name in names]

    def look(self, pictures: Sequence[Any], names: Sequence[str]) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
        """Batch by batch: which of the pictures, and all outputs of the graphs `names` for them."""
        sessions = self.sessions(names)
        for part in slices(0, len(pictures), picture_batch(sessions, self.batchsize)):
            found = look_at(sessions, read_pictures(pictures[part], part.start, self.config))
            for name, rows in found.items():
                refuse_nan(name, rows)
            yield part, found

    def tokens(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Captions to ids and mask (M, L), cleaned and cut as blip-pre does it, L being the longest of them."""
        protocol = self.config.protocol
        ids, mask = self.tokenizer.encode([pre_caption(text, protocol.max_words) for text in texts], protocol.max_length)
        return trimmed(ids, mask) if len(ids) else (ids, mask)

    def read(self, names: Sequence[str], ids: np.ndarray, mask: np.ndarray, **beside: np.ndarray) -> dict[str, np.ndarray]:
        """The one graph of `names` over texts ids, mask (M, L), in batches of like length; `beside` is what else it takes, M
        rows of it. An output that has a row for each token is zero where the text has ended."""
        (session,) = self.sessions(names)
        found = {}
        for spec in session.spec.outputs:
            shape = (ids.shape[1] if dim == LENGTH else int(dim) for dim in spec.sample_shape)
            found[spec.name] = np.zeros((len(ids), *shape), spec.dtype)

        def more(chosen: np.ndarray) -> dict[str, np.ndarray]:
            return {name: rows[chosen] for name, rows in beside.items()}

        for chosen, given in text_batches(session, ids, mask, self.batchsize, more):
            for name, rows in given.items():
                found[name][chosen, : rows.shape[1]] = rows
        return found


def as_texts(given: Any) -> list[str]:
    """One text or several, as a list. Raises Misuse for what is no text, or has no words."""
    texts, _ = as_list(given)
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not is_text(text):
            raise Misuse(f"Text {number} is {text!r:.60}, of type {type(text).__name__}; expected a str.")
        if not pre_caption(text, 1).strip():
            raise Misuse(f"Text {number} is {text!r:.60}, which has no words; leave it out.")
    return texts


def count(name: str, value: Any) -> int:
    """`value` of the argument `name`, as an int. Raises Misuse unless it is a whole number above 0."""
    if not isinstance(value, Integral) or value < 1:
        raise Misuse(f"{name} is {value!r:.60}; expected a whole number above 0.")
    return int(value)
