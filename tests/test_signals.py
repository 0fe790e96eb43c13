"""A stop request: which signals make one, and that handlers come back."""

from __future__ import annotations

import os
import signal

import pytest

from meshloom.trainer.signals import STOPPING, StopRequest


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_signal_is_remembered_and_the_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
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
