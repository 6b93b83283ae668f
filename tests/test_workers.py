"""Work in other processes: in order, bounded, and one sentence when a worker dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from models.errors import UserError
from preprocess import workers
from preprocess.workers import in_order

ROOT = Path(__file__).parent.parent


def double(item: int) -> int:
    return 2 * item


def die(item: int) -> int:
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def complain(item: int) -> int:
    raise UserError(f"item {item} is wrong")


@pytest.mark.parametrize("number", [1, 2])
def test_in_order(number: int) -> None:
    assert list(in_order(double, range(100), number)) == [2 * item for item in range(100)]


def test_a_script_is_not_run_again(tmp_path: Path) -> None:
    """Also without `if __name__ == "__main__"`, by its path and from standard input."""
    script = "from math import sqrt\nfrom preprocess.workers import in_order\nprint(sum(in_order(sqrt, [4] * 50, 2)))\n"
    (tmp_path / "script.py").write_text(script, "utf-8")
    for how, given in (([str(tmp_path / "script.py")], None), (["-"], script)):
        run = [sys.executable, *how]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run(run, input=given, capture_output=True, text=True, env=environment, timeout=120, check=False)
        assert (done.stdout, done.stderr) == ("100.0\n", "")


def test_in_order_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more items are handed out than a few per worker, however slowly the results are taken."""
    submitted = []
    submit = ProcessPoolExecutor.submit

    def counting(self: Any, work: Any, item: int) -> Any:
        submitted.append(item)
        return submit(self, work, item)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", counting)
    results = in_order(double, range(1000), 2)
    assert [next(results) for _ in range(10)] == [2 * item for item in range(10)]
    results.close()
    assert len(submitted) <= 10 + 2 * workers.AHEAD


def test_a_worker_that_dies_is_one_sentence() -> None:
    with pytest.raises(UserError, match="One of the 2 worker processes died, most likely for lack of memory"):
        list(in_order(die, range(100), 2))


def test_an_error_in_a_worker_arrives_as_it_is() -> None:
    with pytest.raises(UserError, match="item 0 is wrong"):
        list(in_order(complain, range(100), 2))


def test_ctrl_c_while_work_is_handed_out_is_heeded_as_the_caller_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training takes note of it, and saves before it stops; Python's own handler stops at once."""
    submit = ProcessPoolExecutor.submit

    def press(self: Any, work: Any, item: int) -> Any:
        if item == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return submit(self, work, item)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", press)
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        assert list(in_order(double, range(40), 2)) == [2 * item for item in range(40)]
    finally:
        signal.signal(signal.SIGINT, before)
    assert noted == [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        list(in_order(double, range(40), 2))


GROUP = """
import os, signal, subprocess
from preprocess.workers import in_order
from tests.test_workers import slow
asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
found = []
for item in in_order(slow, range(40), 2):
    found.append(item)
    if len(found) in (1, 5):
        subprocess.run(["kill", "-TERM", "--", f"-{os.getpgid(0)}"])
        while len(asked) < (1 if len(found) == 1 else 2):
            pass
print(len(asked), found == list(range(40)))
"""
PRESSED = """
import os, signal
from concurrent.futures import ProcessPoolExecutor
from preprocess.workers import in_order
from tests.test_workers import double
submit = ProcessPoolExecutor.submit
def press(self, work, item):
    if item == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return submit(self, work, item)
ProcessPoolExecutor.submit = press
print(len(list(in_order(double, range(40), 2))))
"""


def slow(item: int) -> int:
    time.sleep(0.02)
    return item


def alone(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60, start_new_session=True)


def test_who_asks_the_whole_group_to_stop_asks_the_parent_alone() -> None:
    """As torchrun does. Signals come while the workers work, and the first while one may still start."""
    done = alone(GROUP)
    assert done.stdout == "2 True\n", done.stderr


def test_sigterm_while_work_is_handed_out_ends_the_process() -> None:
    """When nothing was said about it."""
    done = alone(PRESSED)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, ""), done.stderr
