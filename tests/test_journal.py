"""A run that was stopped, however and wherever, goes on where it was and ends with identical files."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from models import manifest
from models.errors import UserError
from preprocess.tensors import Writer
from runtime import journal as journals
from runtime import retrieval
from runtime.journal import Journal
from tests import chain

K = 11
SHARDS = {"PICTURES_PER_SHARD": 4, "CAPTIONS_PER_SHARD": 10, "PAIRS_PER_SHARD": 60}  # 4, 4 and some 5 shards
OPTIONS = ("--k-test", K, "--batchsize", 3, "--itm-batchsize", 4)

# The command in a process of its own, with small shards, which kills itself without a chance to clean up.
KILLED = """
import os, signal, sys
from runtime import journal, retrieval
from runtime.__main__ import main
from preprocess.tensors import Writer

how, count, sizes = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
for name, size in sizes.items():
    setattr(retrieval, name, size)
left = [count]

def stop():
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def after(owner, name):
    real = getattr(owner, name)
    def wrapped(*args, **others):
        real(*args, **others)
        stop()
    setattr(owner, name, wrapped)

if how == "note":                      # a shard is complete and noted
    after(journal.Journal, "note")
elif how == "flush":                   # a tensor is on the disk, its shard is not noted
    after(Writer, "flush")
elif how == "write":                   # half of the rows are written, and on the disk
    write = Writer.write
    def half(self, start, rows):
        if left[0] == 1:
            write(self, start, rows[: len(rows) // 2])
            self.file.flush()
        stop()
        write(self, start, rows)
    Writer.write = half
elif how == "line":                    # the line in the journal is cut
    note = journal.Journal.note
    def cut(self, *args):
        note(self, *args)
        if left[0] == 1:
            os.truncate(self._path, self._path.stat().st_size - 9)
        stop()
    journal.Journal.note = cut
elif how == "manifest":                # all is computed
    retrieval.manifest.write = lambda *args: stop()
sys.argv[1:] = sys.argv[4:]
main()
"""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in SHARDS.items():
        monkeypatch.setattr(retrieval, name, size)


def arrays(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


class Run:
    """One set of inputs and the command over it."""

    def __init__(self, graphs: Path, data: Path, out: Path) -> None:
        self.graphs, self.data, self.out = graphs, data, out
        self.part = out.parent / f".{out.name}.part"

    def again(self, *options: object) -> Any:
        return chain.run(self.graphs, self.data, self.out, *OPTIONS, *options)

    def killed(self, how: str, count: int) -> None:
        """Run until the `count`-th moment of kind `how`, then kill -9."""
        named = ("--graphs", self.graphs, "--data", self.data, "--out", self.out, "--threads", 1, *OPTIONS)
        command = [sys.executable, "-c", KILLED, how, count, SHARDS, "retrieval", *named]
        done = subprocess.run([str(part) for part in command], capture_output=True, cwd=Path(__file__).parent.parent)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert not self.out.exists()

    def noted(self) -> set[tuple[str, int]]:
        """The shards that the journal of the half-finished run holds as complete."""
        lines = (self.part / journals.NAME).read_text("utf-8").split("\n")[1:-1]  # what follows the last line end is cut
        return {(line["stage"], line["shard"]) for line in map(json.loads, lines)}


@pytest.fixture
def made(atc_graphs: Path, tiny_data: Path, tmp_path: Path) -> Run:
    return Run(atc_graphs, tiny_data, tmp_path / "outputs")


@pytest.fixture(scope="module")
def undisturbed(atc_graphs: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nobody stopped."""
    out = tmp_path_factory.mktemp("undisturbed") / "outputs"
    with pytest.MonkeyPatch.context() as patch:
        for name, size in SHARDS.items():
            patch.setattr(retrieval, name, size)
        chain.done(chain.run(atc_graphs, tiny_data, out, *OPTIONS))
    assert not out.with_name(".outputs.part").exists()
    return arrays(out)


MOMENTS = [
    ("write", 1),  # nothing is complete
    ("write", 5),  # within the second shard of pictures: two writes a batch, two batches a shard
    ("flush", 3),  # of its two tensors, one is on the disk
    ("note", 1),
    ("note", 6),  # among the captions
    ("note", 8),  # before the plan
    ("note", 9),  # after it
    ("line", 7),
    ("line", 11),  # among the pairs
    ("write", 27),
    ("manifest", 1),
]


@pytest.mark.parametrize(("how", "count"), MOMENTS)
def test_killed_and_run_again(
    made: Run, undisturbed: dict[str, bytes], computed: list[tuple[str, int]], how: str, count: int
) -> None:
    made.killed(how, count)
    before = made.noted()
    chain.done(made.again())
    assert arrays(made.out) == undisturbed
    assert not before & set(computed)  # what was complete is not computed again
    everything = before | set(computed)
    shards = {stage: sum(name == stage for name, _ in everything) for stage in ("pictures", "captions", "plan", "pairs")}
    assert shards == {"pictures": 4, "captions": 4, "plan": 1, "pairs": shards["pairs"]}
    assert shards["pairs"] >= 4
    resumed = {row["stage"]: row["resumed"] for row in manifest.read(made.out, "outputs").content["timings"]}
    assert (resumed["pictures"] > 0) == (("pictures", 0) in before)
    assert not made.part.exists()


def test_moments_are_spread(made: Run) -> None:
    """One of the moments above lies within the pairs: the writes are counted as the comments say."""
    made.killed("write", 27)
    assert ("plan", 0) in made.noted()
    assert ("pairs", 3) not in made.noted()


def test_a_complete_run_has_nothing_to_do(made: Run, computed: list[tuple[str, int]]) -> None:
    chain.done(made.again())
    before, times = arrays(made.out), {path: path.stat().st_mtime_ns for path in made.out.iterdir()}
    computed.clear()
    assert "already holds this run; nothing to do" in chain.done(made.again())
    assert computed == []
    assert {path: path.stat().st_mtime_ns for path in made.out.iterdir()} == times
    chain.done(made.again("--restart"))
    assert len(computed) > 9
    assert arrays(made.out) == before


def test_restart_mends_a_damaged_folder(made: Run, undisturbed: dict[str, bytes]) -> None:
    chain.done(made.again())
    os.truncate(made.out / "itm_logits.npy", 200)
    assert "itm_logits.npy has 200 bytes" in chain.refusal(made.again())
    chain.done(made.again("--restart"))
    assert arrays(made.out) == undisturbed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--k-test", 3), "another k_test (11, now 3)"),
        (("--batchsize", 2), "another batchsize (3, now 2)"),
        (("--itm-batchsize", 9), "another itm_batchsize (4, now 9)"),
        (("--feat-dtype", "float16"), "another feat_dtype (float32, now float16)"),
    ],
)
def test_other_options_over_a_half_finished_run(
    made: Run, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], said: str
) -> None:
    interrupt(monkeypatch, after=6)
    assert made.again().exit_code == 130
    message = chain.refusal(made.again(*options))
    assert said in message
    assert message.endswith("Finish it with its own options, choose another --out, or start anew with --restart.")
    chain.done(made.again())  # it is still there, and can be finished
    assert arrays(made.out) == undisturbed
    assert manifest.read(made.out, "outputs").content["timings"][0]["resumed"] == 14


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Leave a half-finished run in this process, as Ctrl-C does, at its `after`-th shard. The next run is not touched."""
    real, left = Journal.note, [after]

    def note(self: Journal, *args: Any) -> None:
        real(self, *args)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "note", note)


def test_ctrl_c(made: Run, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, after=6)
    stopped = made.again()
    assert stopped.exit_code == 130
    assert "Stopped. Run the same command again to go on; what was complete is kept." in stopped.stderr
    chain.done(made.again())
    assert arrays(made.out) == undisturbed


def test_restart_drops_a_half_finished_run(made: Run, monkeypatch: pytest.MonkeyPatch, computed: list[tuple[str, int]]) -> None:
    interrupt(monkeypatch, after=6)
    assert made.again().exit_code == 130
    computed.clear()
    chain.done(made.again("--restart", "--k-test", 3))
    assert ("pictures", 0) in computed
    assert manifest.read(made.out, "outputs").content["k_test"] == 3


def test_other_options_when_nothing_was_finished(made: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that failed at once does not stand in the way of the next one."""
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", _full)
        assert "The disk is full" in chain.refusal(made.again())
    chain.done(made.again("--feat-dtype", "float16"))
    assert (made.out / "image_feat.npy").stat().st_size < 14 * 17 * 48 * 2 + 200


def test_a_folder_in_use(made: Run) -> None:
    made.part.mkdir()
    with manifest.locked(made.part, "not reached"):
        message = chain.refusal(made.again())
    assert message == f"Another run is writing {made.out}; wait for it, or choose another --out."
    chain.done(made.again())


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_after(calls: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """`real` for so many calls, then a full disk."""
    left = [calls]

    def limited(*args: Any, **others: Any) -> Any:
        left[0] -= 1
        return real(*args, **others) if left[0] >= 0 else _full()

    return limited


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (os, "posix_fallocate", 0),
        (os, "posix_fallocate", 2),  # there is room for the pictures and not for the captions
        (os, "posix_fallocate", 7),  # for everything but the logits
        (Writer, "write", 5),
        (Writer, "flush", 3),
        (Writer, "write", 27),
        (os, "fsync", 0),  # the journal's first line
        (journals, "_append", 4),
        (journals, "_append", 11),
        (manifest, "write_text", 0),
    ],
)
def test_a_full_disk(
    made: Run, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full_after(calls, getattr(owner, name)))
        message = chain.refusal(made.again())
    assert message.startswith("The disk is full")
    assert message.endswith("Free some space and run the same command again; nothing that was complete is lost.")
    assert not made.out.exists()
    chain.done(made.again())
    assert arrays(made.out) == undisturbed


def test_a_full_disk_does_not_cost_the_journal(
    made: Run, monkeypatch: pytest.MonkeyPatch, computed: list[tuple[str, int]]
) -> None:
    """The journal is written again when a run goes on; a disk that is full then must leave the old one."""
    with monkeypatch.context() as patch:
        interrupt(patch, after=6)
        assert made.again().exit_code == 130
    before = made.noted()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _full)
        chain.refusal(made.again())
    assert made.noted() == before
    assert len(before) == 6
    computed.clear()
    chain.done(made.again())
    assert not before & set(computed)


def test_lines_that_were_cut(tmp_path: Path) -> None:
    """Whatever is left of the last line, it does not count, and the next one starts on a line of its own."""
    first = Journal(tmp_path, {"k": 1})
    first.note("pictures", 0, 4, 0.5)
    first.note("pictures", 1, 4, 0.5)
    whole = (tmp_path / journals.NAME).read_bytes()
    second_line = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for end in range(second_line, len(whole)):
        (tmp_path / journals.NAME).write_bytes(whole[:end])
        found = Journal(tmp_path, {"k": 1})
        assert found.has("pictures", 0)
        assert not found.has("pictures", 1)
        found.note("pictures", 1, 4, 0.5)
        assert (tmp_path / journals.NAME).read_bytes() == whole


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    Journal(tmp_path, {"k": 1}).note("pictures", 0, 4, 0.5)
    with (tmp_path / journals.NAME).open("ab") as file:
        file.write(bytes(512) + b"\xff\xfe\n")  # what a crash of the machine may leave
    assert Journal(tmp_path, {"k": 1}).has("pictures", 0)


def test_another_identity(tmp_path: Path) -> None:
    Journal(tmp_path, {"k": 1, "graphs": "a"}).note("pictures", 0, 4, 0.5)
    for other in ({"k": 2, "graphs": "a"}, {"k": 1}, {"k": 1, "graphs": "a", "more": 1}):
        with pytest.raises(UserError, match="half-finished run with another"):
            Journal(tmp_path, other)


def test_timings(tmp_path: Path) -> None:
    Journal(tmp_path, {}).note("pictures", 0, 4, 0.5)
    second = Journal(tmp_path, {})
    second.run_shards("pictures", [(0, 4), (4, 6)], lambda: lambda *_: None, [])
    (row,) = second.timings()
    assert (row["stage"], row["items"], row["resumed"]) == ("pictures", 6, 4)
    assert row["seconds"] >= 0.5


def test_progress_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[tuple[int, int]] = []

    def work(start: int, stop: int, bar: tqdm[Any]) -> None:
        done.append((start, stop))
        bar.update(stop - start)

    Journal(tmp_path, {}).run_shards("captions", [(0, 4), (4, 6)], lambda: work, [])
    assert done == [(0, 4), (4, 6)]
    assert "6/6" in capsys.readouterr().err


def test_nothing_is_opened_when_nothing_is_missing(tmp_path: Path) -> None:
    """A run resumed in its last stage need not load the graphs of the first."""
    Journal(tmp_path, {}).note("pictures", 0, 4, 0.5)

    def begin() -> Any:
        raise AssertionError("opened")

    Journal(tmp_path, {}).run_shards("pictures", [(0, 4)], begin, [])
