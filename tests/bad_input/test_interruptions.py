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
from preprocess.dataset import Writer
from tests import chain
from tests.bad_input.table import Case, Work, refused, the_message

STEPS = {"pre": "preprocess", "export": "export", "run": "runtime", "post": "postprocess"}


def _full(*args: object, **named: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _quota(*args: object, **named: object) -> Any:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.mark.parametrize("older", [False, True], ids=["nothing there", "older result there"])
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
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_full_disk(
    work: Work, older: bool, step: str, owner: Any, name: str, failure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    added = ("--target", "atc") if step == "export" else ()  # the quicker exporter

    def spoil(work: Work) -> tuple[object, ...]:
        monkeypatch.setattr(owner, name, failure)
        return added

    refused(Case("full disk", step, ("The disk is full", "Free some space"), spoil, begun=step == "run"), work, older)
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


@pytest.mark.parametrize("step", STEPS)
def test_a_folder_in_use(work: Work, step: str) -> None:
    with _held(work[".out.part"]):
        refused(Case("in use", step, ("Another run is writing", "out"), begun=True), work, older=True)


def _process(work: Work, step: str, code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `step` in a process of its own, in which `code` has been run before."""
    program = f"{code}\nfrom {STEPS[step]}.__main__ import main\nmain()"
    command = [sys.executable, "-c", program, *map(str, work.usual(step))]
    return subprocess.run(command, text=True, stderr=subprocess.PIPE, timeout=120, check=False, **options)


INTERRUPT = """
import os, signal
from preprocess.dataset import Writer
write = Writer.write
def interrupted(self, start, rows):
    write(self, start, rows)
    if self.name == {name!r}:
        os.kill(os.getpid(), signal.SIGINT)
Writer.write = interrupted
"""


@pytest.mark.parametrize(("step", "name"), [("pre", "img"), ("run", "image_embed"), ("run", "itm_logits")])
def test_ctrl_c(work: Work, step: str, name: str) -> None:
    before = work.state()
    ended = _process(work, step, INTERRUPT.format(name=name), stdout=subprocess.PIPE)
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr
    goes_on = " Run the same command again to go on; what was complete is kept." if step == "run" else ""
    assert ended.stderr.rstrip().endswith(f"Stopped.{goes_on}")
    left = {path for path in work.state().keys() - before.keys() if path.split("/")[0] != ".out.part"}
    assert not left
    assert work[".out.part"].exists() == (step == "run")  # a run goes on from it
    chain.done(work.call(step))
    assert not work[".out.part"].exists()


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
    ended = _process(work, "run", INTERRUPT.format(name="image_embed").replace("SIGINT", "SIGTERM"), stdout=subprocess.PIPE)
    assert ended.returncode == -signal.SIGTERM
    assert not work.out.exists()
    chain.done(work.call("run"))
