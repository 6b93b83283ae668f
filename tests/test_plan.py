"""The planned pairs equal a plain selection on the full matrix, ties and all."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from runtime import plan as planning
from runtime.outputs import I2T, T2I
from runtime.plan import Plan, plan_pairs, top_k


def unit(count: int, width: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, width))
    scaled: np.ndarray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def tied(count: int, seed: int) -> np.ndarray:
    """Rows of small whole numbers: their products are exact and many are equal."""
    return np.random.default_rng(seed).integers(-1, 2, (count, 4)).astype(np.float32)


def naive(images: np.ndarray, texts: np.ndarray, k: int) -> list[tuple[int, int, int, float]]:
    """(picture, caption, direction, similarity) by sorting every row and column; equals in order of their index."""
    sims = images @ texts.T  # (N, M)
    bits = np.zeros(sims.shape, int)
    for n, row in enumerate(sims):
        bits[n, np.argsort(-row, kind="stable")[:k]] |= I2T
    for m, column in enumerate(sims.T):
        bits[np.argsort(-column, kind="stable")[:k], m] |= T2I
    return [(int(n), int(m), int(bits[n, m]), float(sims[n, m])) for n, m in zip(*np.nonzero(bits), strict=True)]


def assert_equal(found: Plan, wanted: list[tuple[int, int, int, float]]) -> None:
    pairs = zip(found.image.tolist(), found.text.tolist(), found.direction.tolist(), strict=True)
    assert list(pairs) == [row[:3] for row in wanted]  # order, too: by picture, then by caption
    # The same products in other blocks; measured 6e-8.
    np.testing.assert_allclose(found.sim, [row[3] for row in wanted], atol=1e-6)


KS = [1, 4, 11, 12, 23, 40, 41, 1000]  # smaller than, equal to and larger than 12 pictures and 40 captions


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("seed", range(3))
def test_random_embeddings(k: int, seed: int) -> None:
    images, texts = unit(12, 8, seed), unit(40, 8, seed + 100)
    assert_equal(plan_pairs(images, texts, k), naive(images, texts, k))


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("seed", range(3))
def test_ties_at_the_edge_take_the_first(k: int, seed: int) -> None:
    images, texts = tied(12, seed), tied(40, seed + 100)
    sims = images @ texts.T
    if k == 4:  # the case is met: some row has equals on both sides of its edge
        ordered = np.sort(sims, axis=1)[:, ::-1]
        assert (ordered[:, 3] == ordered[:, 4]).any()
    assert_equal(plan_pairs(images, texts, k), naive(images, texts, k))


def test_all_equal() -> None:
    ones = np.ones((6, 2), np.float32)
    found, sims = top_k(ones, ones, 4)
    np.testing.assert_array_equal(found, np.tile(np.arange(4), (6, 1)))
    np.testing.assert_array_equal(sims, np.full((6, 4), 2, np.float32))


@pytest.mark.parametrize(("pictures", "captions"), [(1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_one_picture_or_one_caption(pictures: int, captions: int, k: int) -> None:
    images, texts = unit(pictures, 8, 1), unit(captions, 8, 2)
    assert_equal(plan_pairs(images, texts, k), naive(images, texts, k))


def test_form() -> None:
    found = plan_pairs(unit(12, 8, 0), unit(40, 8, 1), 3)
    assert [a.dtype.name for a in (found.image, found.text, found.direction, found.sim)] == ["int32", "int32", "uint8", "float32"]
    assert {len(a) for a in (found.image, found.text, found.direction, found.sim)} == {len(found.image)}
    assert set(found.direction.tolist()) == {I2T, T2I, I2T | T2I}
    assert ((found.direction & I2T) > 0).sum() == 12 * 3
    assert ((found.direction & T2I) > 0).sum() == 40 * 3
    assert len(set(zip(found.image.tolist(), found.text.tolist(), strict=True))) == len(found.image)  # each pair once


@pytest.mark.parametrize("block", [1, 200, 1000])
def test_small_blocks_give_the_same(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts = unit(30, 8, 5), unit(70, 8, 6)
    monkeypatch.setattr(planning, "BLOCK_BYTES", block)
    assert_equal(plan_pairs(images, texts, 7), naive(images, texts, 7))


class Counted:
    """A tensor that remembers the largest slice asked of it."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.shape, self.dtype, self.largest = rows, rows.shape, rows.dtype, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice) -> np.ndarray:
        found: np.ndarray = self.rows[index]
        self.largest = max(self.largest, len(found))
        return found


def test_queries_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "BLOCK_BYTES", 4 * 70 * 6)
    queries = Counted(unit(30, 8, 5))
    top_k(queries, unit(70, 8, 6), 7)
    assert queries.largest == 6


SCALE = """
import json, resource, time
import numpy as np
from runtime.plan import plan_pairs

def unit(count, seed):
    rows = np.random.default_rng(seed).normal(size=(count, 256)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

images, texts = unit(5000, 0), unit(25010, 1)
began = time.perf_counter()
plan = plan_pairs(images, texts, 256)
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "bytes": peak, "pairs": len(plan.image)}))
"""


@pytest.mark.slow
def test_scale_of_coco() -> None:
    """5,000 pictures and 25,010 captions at k_test 256: under a minute and under 2 GB, the interpreter included."""
    done = subprocess.run([sys.executable, "-c", SCALE], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(found)
    assert found["pairs"] > 5000 * 256
    assert found["seconds"] < 60
    assert found["bytes"] < 2e9
