"""A training that is killed again and again. Run by tests/test_going_on.py: python -m tests.killed_training SETTINGS

Its processes are forked from one that has all modules already, which saves the seconds that each would need to start.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

DELAYS = (0.0, 0.01, 0.05, 0.03, 0.1, 0.02)  # seconds between the first new state of a process and its end


def newest(out: Path) -> str:
    """The name of the last state in a folder."""
    return max((folder.name for folder in out.glob("step-*")), default="")


def main(file: Path) -> None:
    """Prints the newest state at each kill."""
    import torch

    from training.fit import fit
    from training.settings_file import read_settings

    torch.set_num_threads(1)  # as tests/conftest.py: two threads add up in another order, and the last bits differ
    settings = read_settings(file)
    for delay in DELAYS:
        begun = newest(settings.run.out)
        if (child := os.fork()) == 0:
            fit(settings, resume=True)
            os._exit(0)
        ended = 0
        while not ended and newest(settings.run.out) == begun:  # until it has saved something new
            ended, _ = os.waitpid(child, os.WNOHANG)
            time.sleep(0.002)
        time.sleep(delay)
        if not ended and os.waitpid(child, os.WNOHANG) == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.wait()
            print("killed after", newest(settings.run.out), file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
