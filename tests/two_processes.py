"""Two processes of one training, as torchrun would start them.

They take seconds to start: what several tests look at is done by one pair, one after the other.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_two(*arguments: str, seconds: float = 300, ports: int = 1) -> None:
    """`python -m ARGUMENTS` twice, as rank 0 and 1 of 2; both must end well. Of several free `ports` the first is where they
    meet, and all stand in MASTER_PORTS."""
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(ports)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        free = [str(each.getsockname()[1]) for each in sockets]
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free[0], "MASTER_PORTS": " ".join(free)}
    common = {**os.environ, **here, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env={**common, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=seconds)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said


def train_two(*commands: Sequence[object]) -> None:
    """blip-train with each of the `commands` in turn, in two processes; all must end well."""
    run_two("tests.two_processes", json.dumps([list(map(str, command)) for command in commands]), ports=len(commands))


if __name__ == "__main__":
    from training.__main__ import main

    for port, command in zip(os.environ["MASTER_PORTS"].split(), json.loads(sys.argv[1]), strict=True):
        os.environ["MASTER_PORT"] = port
        main(command, standalone_mode=False)
