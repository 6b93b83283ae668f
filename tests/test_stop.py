"""The first signal asks, the second one stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.test_parallel import ROOT
from training.stop import SIGNALS, asked_to_stop

TRAINING = """
import sys, time
from training.stop import asked_to_stop
with asked_to_stop() as asked:
    print("training", flush=True)
    while not asked():
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(float(sys.argv[1]))
print("saved", flush=True)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_asked(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with asked_to_stop() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
        assert asked()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert "Ask once more to stop at once." in capfd.readouterr().err
    with asked_to_stop() as asked:
        assert not asked()


def test_the_second_one_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), asked_to_stop() as asked:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="broken"), asked_to_stop():
        raise ValueError("broken")
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_it_stays_false() -> None:
    found = []

    def work() -> None:
        with asked_to_stop() as asked:
            found.append(asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


@pytest.mark.parametrize(("number", "again", "code"), [("TERM", False, 0), ("INT", False, 0), ("TERM", True, -signal.SIGTERM)])
def test_a_process(number: str, again: bool, code: int) -> None:
    arguments = [sys.executable, "-c", TRAINING, "60" if again else "0"]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "training\n"
        process.send_signal(getattr(signal, f"SIG{number}"))
        assert process.stdout.readline() == "saving\n"
        if again:
            process.send_signal(getattr(signal, f"SIG{number}"))
        said = process.stdout.read()  # communicate would miss what was read ahead
        process.wait(30)
    assert said == ("" if again else "saved\n")
    assert process.returncode == code
