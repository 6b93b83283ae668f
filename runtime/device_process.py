"""The process of one NPU: opens and runs graphs as it is told through a pipe (runtime.devices), and ends with it."""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from models.errors import UserError
from runtime.om_session import OmBackend


def serve(pipe: Connection, device: int) -> None:
    """Answer (True, answer) or (False, what is to be said) to each question but "close", until the pipe is closed."""
    opened: dict[int, OmBackend] = {}
    while True:
        try:
            what, number, *more = pipe.recv()
        except EOFError:
            break
        if what == "close":
            if number in opened:
                opened.pop(number).close()
            continue
        try:
            answer: Any
            if what == "open":
                path, spec, dynamic = more
                opened[number] = OmBackend(path, spec, device, dynamic)
                answer = opened[number].notes
            else:
                answer = getattr(opened[number], what)(*more)
            pipe.send((True, answer))
        except UserError as error:
            pipe.send((False, error.message))
        except BrokenPipeError:
            break  # nobody waits for the answer
    for backend in opened.values():
        backend.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks stops, and closes the pipe
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
