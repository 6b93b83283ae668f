"""A graphs/ folder ready to be called from Python: its sessions, opened when first needed and then kept, and its tokenizer.

B pictures, M texts, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import Misuse
from models.spec import LENGTH
from preprocess.annotations import is_text
from preprocess.pictures import open_graphs
from preprocess.text import pre_caption
from runtime.batches import by_length, slices, trimmed
from runtime.embed import look_at, picture_batch, refuse_nan
from runtime.graphs import read_graphs
from runtime.onnx_session import available_provider
from runtime.picture_input import as_list, read_pictures
from runtime.session import PROVIDERS, Session, open_session


class Model:
    """The graphs of one folder on one provider."""

    def __init__(self, graphs: str | Path, provider: str, threads: int | None, batchsize: int) -> None:
        """Raises Misuse for options that cannot be, UserError when the folder or the provider cannot be used."""
        if provider not in PROVIDERS:
            raise Misuse(f"There is no provider {provider!r}; known providers: {', '.join(PROVIDERS)}.")
        if batchsize < 1 or (threads is not None and threads < 1):
            raise Misuse(f"batchsize is {batchsize} and threads is {threads}; expected whole numbers above 0.")
        available_provider(provider)
        self.graphs = read_graphs(Path(graphs))
        self.config, self.tokenizer = open_graphs(Path(graphs))
        self.batchsize = batchsize
        self._provider, self._threads = provider, threads
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
        of_tokens = {spec.name for spec in session.spec.outputs if LENGTH in spec.shape}
        for chosen in by_length(mask.sum(axis=1), session.batch or self.batchsize):
            short_ids, short_mask = trimmed(ids[chosen], mask[chosen])
            more = {key: rows[chosen] for key, rows in beside.items()}
            for output, rows in session.run(text_ids=short_ids, text_atten_mask=short_mask, **more).items():
                refuse_nan(output, rows)
                kept = np.where(short_mask[:, :, None] > 0, rows, 0) if output in of_tokens else rows
                found[output][chosen, : rows.shape[1]] = kept
        return found


def as_texts(given: Any) -> list[str]:
    """One text or several, as a list. Raises Misuse for what is no text."""
    texts, _ = as_list(given)
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not is_text(text):
            raise Misuse(f"Text {number} is {text!r:.60}, of type {type(text).__name__}; expected a str.")
    return texts
