"""Graphs with a buffer of fixed size whose batch is open (--target ascend), before a converter has fixed it: any number of rows
goes through them at once, and what they say is what graphs of a fixed batch say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.spec import BATCH
from runtime.decoders import open_decoder
from runtime.graphs import all_sizes, read_graphs
from tests.generators import export_generator
from tests.talkative import batch_for, talkative, vocabulary

CLOSE = 2e-5  # of the largest logit, as in tests/test_decoder_sessions.py
GOING = ([0, 1, 2, 3, 4], [0, 2, 3, 4], [2, 4], [4])  # prompts at each step


@pytest.mark.parametrize("kind", ["caption", "opt"])
def test_word_by_word(generator_graphs: Callable[[str, str], Path], tmp_path: Path, kind: str) -> None:
    model = talkative(kind)
    folder = export_generator(tmp_path, kind, "ascend", "--beams", 3, "--length", 8, model=model)
    ours = read_graphs(folder)
    assert ours.is_static
    assert all(BATCH not in all_sizes(ours, name) for name in ours.written)
    batch, random, before = batch_for(model), np.random.default_rng(2), [0, 1, 2, 3, 4]
    both = []
    for graphs in (ours, read_graphs(generator_graphs(kind, "atc"))):
        decoder = open_decoder(graphs, "cpu", 1)
        both.append(decoder.begin(decoder.look(batch.pictures), batch.picture, batch.ids, batch.mask))
    first, second = (steps.start() for steps in both)
    assert np.abs(first - second).max() <= CLOSE * np.abs(second).max()
    rows = 1
    for going in GOING:
        chosen = random.integers(0, rows, (len(going), 3))
        parents = np.array([[before.index(prompt)] for prompt in going]) * rows + chosen
        words = random.integers(1, vocabulary(model), chosen.shape)
        found, wanted = (steps.step(words, parents, np.array(going)) for steps in both)
        assert found.shape == (len(going), 3, vocabulary(model))
        assert np.abs(found - wanted).max() <= CLOSE * np.abs(wanted).max()
        before, rows = going, 3
