"""One call of ATC as a process: what it says, how it ends, and that nothing of it is left when we are ended."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from export.atc_command import Job
from export.atc_errors import SHELL_SIGNALLED, failure

GRACE = 5  # seconds that ATC has to end when it is asked to


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, and so what is to be cleared away."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(SHELL_SIGNALLED + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def call(atc: str, job: Job, folder: Path) -> None:
    """Run the converter at `atc` for `job` in `folder`; a signal that ends us ends it too, and the compilers that it started.

    Raises UserError when it fails.
    """
    # A session of its own: ATC starts compilers, and all of them are to end with it.
    child = subprocess.Popen(
        [atc, *job.argv[1:]],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, _ = child.communicate()
    except BaseException:
        _end(child)
        raise
    if child.returncode:
        raise failure(job.stem, child.returncode, said)


def _end(child: subprocess.Popen[str]) -> None:
    """End a process and those that it started: first asked, then killed."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
