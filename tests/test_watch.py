"""What is said, logged and drawn while a model is trained."""

from __future__ import annotations

import json
import math
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from PIL import Image

from tests.one_training import SETTINGS
from training import curves, watch
from training.settings_check import BEST
from training.watch import Watch

EVERY_2 = replace(SETTINGS, run=replace(SETTINGS.run, log_every=2))


@pytest.fixture(autouse=True)
def without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A second passes when it is added."""
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    return now


def train(watched: Watch, clock: list[float], first: int, last: int, seconds: float = 0.5) -> None:
    for step in range(first, last + 1):
        clock[0] += seconds
        watched.step(step, {"itc": 8.0 / step, "lm": 2.0}, 1e-4, 16, 0.25)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / watch.LOG).read_text().splitlines()]


def test_lines_and_log(tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    watched = Watch(tmp_path, EVERY_2, 6)
    train(watched, clock, 1, 4)
    watched.measured(4, {"txt_r1": 91.25})
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert said[0].startswith(
        "step 2/6  itc 6.0000  lm 2.0000  lr 1.0000e-04  grad norm 0.25  fps: 32.0000  ips: 32.00000 sample/sec"
    )
    assert re.search(r"memory \d+\.\d GB  ETA 00:02$", said[0])
    assert said[2] == "step 4/6  txt_r1 91.25"
    head, two, four, metrics = rows(tmp_path)
    assert head["step"] == 0
    assert head["command"]
    assert two["losses"] == {"itc": 6.0, "lm": 2.0}
    assert four["losses"]["itc"] == pytest.approx((8 / 3 + 2) / 2)
    assert (two["lr"], two["grad_norm"], two["samples_per_second"]) == (1e-4, 0.25, 32.0)
    assert two["memory_bytes"] > 1e7
    assert metrics == {"step": 4, "metrics": {"txt_r1": 91.25}}
    watched.close()
    watched.close()
    assert capsys.readouterr().out.startswith("4 of 6 steps done  fps: 32.0000  ips: 32.00000 sample/sec\n")


def test_the_first_steps_and_pauses_are_no_part_of_the_speed(tmp_path: Path, clock: list[float]) -> None:
    watched = Watch(tmp_path, EVERY_2, 20)
    train(watched, clock, 1, watch.SKIPPED, seconds=10.0)
    train(watched, clock, watch.SKIPPED + 1, 10)
    clock[0] += 60
    watched.pause(60)
    train(watched, clock, 11, 12)
    assert watched.samples_per_second == pytest.approx(32.0)
    assert rows(tmp_path)[-1]["samples_per_second"] == pytest.approx(32.0)
    watched.close()


def test_a_log_goes_on_where_the_training_does(tmp_path: Path, clock: list[float]) -> None:
    watched = Watch(tmp_path, EVERY_2, 8)
    train(watched, clock, 1, 6)
    watched.measured(6, {"txt_r1": 1.0})
    with (tmp_path / watch.LOG).open("a") as log:
        log.write('{"step": 8, "lo')  # killed here
    again = Watch(tmp_path, EVERY_2, 8, resumed=4)
    train(again, clock, 5, 8)
    again.close()
    watched.close()
    assert [row["step"] for row in rows(tmp_path)] == [0, 2, 4, 4, 6, 8]
    assert "command" in rows(tmp_path)[3]
    Watch(tmp_path, EVERY_2, 8).close()  # from the start: another training
    assert len(rows(tmp_path)) == 1


def test_the_best_step_is_said(tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Also when the training was stopped in between: the log knows the earlier figures."""
    settings = replace(
        EVERY_2, run=replace(EVERY_2.run, best="r_mean"), data=replace(EVERY_2.data, validation=EVERY_2.data.train[0])
    )
    watched = Watch(tmp_path, settings, 8)
    for step, value in ((2, 50.0), (4, 60.0), (6, 60.0), (8, 70.0)):
        train(watched, clock, step - 1, step)
        watched.measured(step, {"r_mean": value, "txt_r1": 1.0})
    watched.close()
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said if line.endswith("  (best r_mean so far)")] == ["2/8", "4/8", "8/8"]
    assert "best r_mean 70, after step 8" in said
    again = Watch(tmp_path, settings, 8, resumed=6)
    train(again, clock, 7, 8)
    again.measured(8, {"r_mean": 55.0})
    again.close()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "going on after step 6"
    assert "best r_mean 60, after step 4" in said
    assert not [line for line in said if line.endswith("so far)")]


def test_only_the_first_process_writes(tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "rank", lambda: 1)
    watched = Watch(tmp_path / "out", EVERY_2, 6)
    train(watched, clock, 1, 6)
    watched.measured(6, {"txt_r1": 1.0})
    watched.close()
    assert not (tmp_path / "out").exists()


def test_samples_of_all_processes_count(tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "processes", lambda: 4)
    watched = Watch(tmp_path, EVERY_2, 6)
    train(watched, clock, 1, 2)
    assert rows(tmp_path)[1]["samples_per_second"] == 128.0
    watched.close()


def test_tensorboard(tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, *what: Any) -> None:
            written.append(what)

        def close(self) -> None:
            written.append(("closed",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    watched = Watch(tmp_path, EVERY_2, 6, resumed=2)
    train(watched, clock, 3, 4)
    watched.measured(4, {"txt_r1": 91.25})
    watched.close()
    assert written[0] == (str(tmp_path / "tensorboard"), 3)
    assert ("loss/lm", 2.0, 4) in written
    assert ("metric/txt_r1", 91.25, 4) in written
    assert written[-1] == ("closed",)


def test_steps_that_fp16_leaves_out(tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Their gradient has no norm, and JSON no infinity."""
    watched = Watch(tmp_path, EVERY_2, 4)
    for step, norm in enumerate((math.inf, 0.5, math.inf, math.nan), 1):
        clock[0] += 1
        watched.step(step, {"lm": 1.0}, 1e-4, 16, norm)
    watched.stopped(5, "the gradient is not a number: norm nan", "epoch 0, batch 4")
    watched.close()
    _, two, four, last = rows(tmp_path)
    assert (two["grad_norm"], four["grad_norm"]) == (0.5, None)
    assert "Infinity" not in (tmp_path / watch.LOG).read_text()
    assert "  every step left out  " in capsys.readouterr().out
    assert last == {"step": 5, "stopped": "the gradient is not a number: norm nan", "at": "epoch 0, batch 4"}


def test_curves(tmp_path: Path, clock: list[float]) -> None:
    watched = Watch(tmp_path, EVERY_2, 60)
    train(watched, clock, 1, 60)
    watched.measured(60, {"txt_r1": 91.25, "cider": 0.9, "broken": float("nan")})
    watched.close()
    with Image.open(tmp_path / watch.CURVES) as picture:
        assert picture.format == "PNG"
        assert picture.size[0] == 960
        with_metrics = picture.size[1]
    assert curves.draw([row for row in rows(tmp_path) if "metrics" not in row], tmp_path / "less.png")
    with Image.open(tmp_path / "less.png") as picture:
        assert picture.size[1] < with_metrics
    assert not curves.draw([{"step": 0}], tmp_path / "none.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "less.png", "log.jsonl"]


def test_all_curves_can_be_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 15 figures of a retrieval are more than there are colours."""
    looks: dict[str, tuple[str, str]] = {}
    plot = Axes.plot

    def noting(self: Any, *what: Any, **how: Any) -> Any:
        (line,) = plot(self, *what, **how)
        looks[how["label"]] = (line.get_color(), line.get_linestyle())
        return [line]

    monkeypatch.setattr(Axes, "plot", noting)
    names = BEST["recall"]
    assert curves.draw([{"step": step, "metrics": dict.fromkeys(names, 50.0 + step)} for step in (1, 2)], tmp_path / "c.png")
    assert set(looks) == set(names)
    assert len(set(looks.values())) == len(names)
    assert looks["itc_txt_r1"][0] == looks["txt_r1"][0]
