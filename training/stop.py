"""A training that is asked to stop finishes its step and saves first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import distributed

from training.gather import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAID = b"\nStopping after this step, and saving first. Ask once more to stop at once.\n"


@contextmanager
def asked_to_stop(device: torch.device | None = None) -> Iterator[Callable[[], bool]]:
    """Within the block the first SIGINT or SIGTERM only makes the function that is yielded true; the second one stops at once.

    Of several processes all are true as soon as one was asked, so each calls the function after the same steps; `device` is
    where they exchange tensors. Outside of the main thread, where Python takes no signals, it stays false.
    """
    found = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal found
        found = True
        restore()
        os.write(2, SAID)  # print may be in the middle of a line of its own

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def asked() -> bool:
        if processes() == 1:
            return found
        anyone = torch.tensor(float(found), device=device)
        distributed.all_reduce(anyone, distributed.ReduceOp.MAX)
        return bool(anyone > 0)

    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
    main = threading.current_thread() is threading.main_thread()
    for number in SIGNALS if main else ():
        signal.signal(number, note)
    try:
        yield asked
    finally:
        if main:
            restore()
