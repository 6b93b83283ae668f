"""One call of ATC as a process: what it says, how it ends, and that nothing of it is left when it has, or when we are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from export.atc_command import Job
from export.atc_errors import SHELL_SIGNALLED, failure

GRACE = 5  # seconds that ATC has to end when it is asked to
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # what a terminal, or who stops us, sends


@contextmanager
def ended_once() -> Iterator[None]:
    """SIGTERM, SIGHUP and SIGQUIT end the block as Ctrl-C does; what comes after the first of them is not heard until the block
    has cleared away. One that is ignored already, as nohup has it, stays so."""
    before = {number: signal.getsignal(number) for number in ENDING}
    heard = [number for number, handler in before.items() if handler != signal.SIG_IGN]

    def end(number: int, frame: FrameType | None) -> None:
        for each in heard:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(SHELL_SIGNALLED + number)

    for number in heard:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])


def call(atc: str, job: Job, folder: Path) -> None:
    """Run the converter at `atc` for `job` in `folder`. However it ends, or we do by a signal (`ended_once`), the compilers that
    it started end with it: what they still wrote would be taken for a later call's.

    Raises UserError when it fails.
    """
    with tempfile.TemporaryFile() as said:  # no pipe: that is at its end only when the last compiler has closed it
        # A session of its own: all that it starts is one group.
        child = subprocess.Popen([atc, *job.argv[1:]], cwd=folder, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            child.wait()
        except BaseException:
            _send(child.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
            raise
        finally:
            _send(child.pid, signal.SIGKILL)
            child.wait()
        if child.returncode:
            said.seek(0)
            raise failure(job.stem, child.returncode, said.read().decode("utf-8", "replace"))


def _send(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)
