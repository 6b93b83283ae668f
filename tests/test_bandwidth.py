"""How fast this machine reads: two ways to do it, and how much they read. No test looks at a speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import bandwidth, table
from bench.bandwidth import Bandwidth, beyond_caches, read_bandwidth


def test_bandwidth() -> None:
    found = read_bandwidth(2, "cpu", 1 << 18)
    assert list(found.gb_per_s) == ["ONNX Runtime ReduceSum", "numpy sum"]
    assert (found.threads, found.bytes) == (2, 1 << 18)
    assert 0 < min(found.gb_per_s.values()) <= found.best == found.gb_per_s[found.best_way]


def test_of_two_measurements_of_reading_the_better_counts() -> None:
    found = Bandwidth(1, 8, {"a": 5.0, "b": 8.0}).merged(Bandwidth(1, 8, {"a": 7.0, "b": 2.0}))
    assert found.gb_per_s == {"a": 7.0, "b": 8.0}
    said = table.bandwidth_lines(Bandwidth(1, 2 * 10**9, {"a": 7.0, "b": 8.04}))
    assert said[0] == "Read: this machine reads float32 at 8.0 GB/s (b)."
    assert said[1].endswith("sums of 2.00 GB: a 7.0, b 8.0.")


def test_what_is_read_is_larger_than_the_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "LEAST", 100 << 20)
    monkeypatch.setattr(bandwidth, "MOST", 1 << 30)
    assert beyond_caches(tmp_path / "none") == 100 << 20
    for n, size in enumerate(("48K\n", "what\n", "60M\n", "")):
        (tmp_path / f"index{n}").mkdir()
        (tmp_path / f"index{n}" / "size").write_text(size)
    assert beyond_caches(tmp_path) == 240 << 20
    (tmp_path / "index1" / "size").write_text("2G\n")
    assert beyond_caches(tmp_path) == 1 << 30
