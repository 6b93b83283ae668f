"""The disk is full, the folder is taken, the user has enough, nobody listens."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest

from models import manifest
from preprocess.tensors import Writer
from runtime import classify, features
from tests import chain
from tests.bad_input.table import Case, Work, refused, the_message
from tests.commands import COMMANDS

STEPS = ("pre", "export", "run", "post")
TASKS = ("pre classify", "run classify", "run features", "post top1")  # of BLIP-2's chain
RUNS = ("run", "run classify", "run features")  # what goes on where it was stopped


@pytest.fixture
def chain_of(request: pytest.FixtureRequest) -> Callable[[str], Work]:
    """A copy of the chain that has the step."""
    return lambda step: request.getfixturevalue("work2" if step in (*TASKS, "convert") else "work")


def _full(*args: object, **named: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _quota(*args: object, **named: object) -> Any:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.mark.parametrize(
    ("step", "owner", "name", "failure"),
    [
        ("pre", os, "posix_fallocate", _full),
        ("pre", Writer, "write", _full),
        ("pre", Path, "write_text", _full),
        ("run", os, "posix_fallocate", _full),
        ("run", Writer, "write", _full),
        ("run", Writer, "flush", _quota),
        ("run", Path, "write_text", _full),
        ("export", onnx, "save_model", _full),
        ("export", Path, "write_text", _full),
        ("post", Path, "write_text", _full),
        ("pre classify", Writer, "write", _full),
        ("run classify", os, "posix_fallocate", _full),
        ("run classify", Writer, "write", _full),
        ("run classify", Path, "write_text", _full),
        ("run features", Writer, "write", _full),
        ("run features", Writer, "flush", _quota),
        ("run features", Path, "write_text", _full),
        ("post top1", Path, "write_text", _full),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_full_disk(
    chain_of: Callable[[str], Work],
    step: str,
    owner: Any,
    name: str,
    failure: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = chain_of(step)
    added = ("--target", "atc") if step == "export" else ()  # the quicker exporter

    def spoil(work: Work) -> tuple[object, ...]:
        monkeypatch.setattr(owner, name, failure)
        return added

    refused(Case("full disk", step, ("The disk is full", "Free some space"), spoil, begun=step in RUNS), work)
    monkeypatch.undo()
    chain.done(work.call(step, *added))  # once there is space


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Another process has locked `folder`."""
    folder.mkdir()
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout
        other.stdout.readline()
        yield
        other.communicate("\n")


@pytest.mark.parametrize("step", [*STEPS, *TASKS, "convert"])
def test_a_folder_in_use(chain_of: Callable[[str], Work], step: str) -> None:
    work = chain_of(step)
    with _held(work[".out.part"]):
        refused(Case("in use", step, ("Another run is writing", "out"), begun=True), work)


def _process(work: Work, step: str, code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `step` in a process of its own, in which `code` has been run before."""
    program = f"{code}\nfrom {COMMANDS[step.split()[0]]} import main\nmain()"
    command = [sys.executable, "-c", program, *map(str, work.usual(step))]
    return subprocess.run(command, text=True, stderr=subprocess.PIPE, timeout=120, check=False, **options)


# The process gets a signal right after `after` rows of a tensor were written. Shards are small, so that some are done.
STOPPED = """
import os, signal
from preprocess.tensors import Writer
import runtime.classify, runtime.features
runtime.classify.PICTURES_PER_SHARD = runtime.features.PICTURES_PER_SHARD = {shard}
write = Writer.write
def stopped(self, start, rows):
    write(self, start, rows)
    if self.name == {name!r} and start >= {after}:
        os.kill(os.getpid(), signal.{signal})
Writer.write = stopped
"""
SHARD = 2  # pictures


def _stopped(work: Work, step: str, name: str, by: str, after: int = 0) -> subprocess.CompletedProcess[str]:
    code = STOPPED.format(name=name, after=after, signal=by, shard=SHARD)
    return _process(work, step, code, stdout=subprocess.PIPE)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in this process: runs of other shards are other runs."""
    for owner in (classify, features):
        monkeypatch.setattr(owner, "PICTURES_PER_SHARD", SHARD)


@pytest.mark.parametrize(
    ("step", "name"),
    [
        ("pre", "img"),
        ("run", "image_embed"),
        ("run", "itm_logits"),
        ("run classify", "probability"),
        ("run features", "multimodal_embeds"),
    ],
)
@pytest.mark.usefixtures("small_shards")
def test_ctrl_c(chain_of: Callable[[str], Work], step: str, name: str) -> None:
    work = chain_of(step)
    before = work.state()
    ended = _stopped(work, step, name, "SIGINT")
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr
    goes_on = " Run the same command again to go on; what was complete is kept." if step in RUNS else ""
    assert ended.stderr.rstrip().endswith(f"Stopped.{goes_on}")
    left = {path for path in work.state().keys() - before.keys() if path.split("/")[0] != ".out.part"}
    assert not left
    assert work[".out.part"].exists() == (step in RUNS)  # a run goes on from it
    chain.done(work.call(step))
    assert not work[".out.part"].exists()


@pytest.mark.parametrize(
    ("step", "name", "after"),
    [("run classify", "image_embed", 9), ("run features", "multimodal_embeds", 4)],
    ids=["classify", "features"],
)
@pytest.mark.usefixtures("small_shards")
def test_killed(work2: Work, step: str, name: str, after: int) -> None:
    """kill -9 leaves no chance to clean up. The next run goes on, and ends with the bytes of one that nobody disturbed."""
    ended = _stopped(work2, step, name, "SIGKILL", after)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not work2.out.exists()
    assert (work2[".out.part"] / "journal.jsonl").read_text("utf-8").count('"pictures"') > 0
    chain.done(work2.call(step))
    assert not work2[".out.part"].exists()
    assert any(row["resumed"] for row in manifest.read(work2.out, "outputs").content["timings"])
    chain.done(work2.call(step, "--out", work2["undisturbed"]))
    for path in work2["undisturbed"].glob("*.npy"):
        assert (work2.out / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("step", ["pre", "run", "post"])
def test_nobody_listens(work: Work, step: str) -> None:
    """As in `blip-pre ... | true`: the result is complete or is not there, and there is no traceback."""
    read, write = os.pipe()
    os.close(read)
    ended = _process(work, step, "", stdout=write)
    os.close(write)
    assert ended.returncode in (0, 1)
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
    assert not work.out.exists() or (work.out / manifest.NAME).is_file()


@pytest.mark.parametrize("step", ["pre", "post"])
def test_the_screen_is_a_full_disk(work: Work, step: str) -> None:
    """As in `blip-pre ... > log`, on a full disk."""
    with Path("/dev/full").open("w") as full:
        ended = _process(work, step, "", stdout=full)
    assert ended.returncode == 1
    assert "The disk is full" in the_message(ended.stderr)


def test_terminated(work: Work) -> None:
    """SIGTERM ends it at once, as a killed run does; the next one clears away or goes on."""
    ended = _stopped(work, "run", "image_embed", "SIGTERM")
    assert ended.returncode == -signal.SIGTERM
    assert not work.out.exists()
    chain.done(work.call("run"))
