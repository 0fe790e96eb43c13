"""A stop request: which signals make one, and that handlers come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from meshloom.launch.train import _leave
from meshloom.trainer.signals import STOPPING, StopRequest


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_signal_is_remembered_and_the_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.number == number
    assert signal.getsignal(number) == before


def test_ctrl_c_is_answered_at_once(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The step may take a while yet. One process of several speaks."""
    for rank, said in (("0", f"\n{STOPPING}\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with StopRequest():
            os.kill(os.getpid(), signal.SIGINT)
        assert capfd.readouterr().err == said


def test_second_interrupt_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


TWICE = """
import signal, threading
from meshloom.launch.train import _leave
from meshloom.trainer.signals import StopRequest

signal.signal(signal.SIGINT, signal.default_int_handler)
busy = threading.Lock()
busy.acquire()
print("so far", end="")
try:
    with StopRequest(_leave):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
finally:
    busy.acquire()  # for a save that may take minutes
"""


def test_second_interrupt_of_a_command_ends_its_process() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stdout) == (130, "so far")
    assert done.stderr == f"\n{STOPPING}\nmeshloom train: interrupted\n"


def test_it_gives_the_terminal_its_cursor_back(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "isatty", lambda _: True)
    monkeypatch.setattr(os, "_exit", codes.append)
    _leave()
    assert codes == [130] and capfd.readouterr().out == "\x1b[?25h"
