"""SIGTERM, SIGUSR1, Ctrl-C: the run is asked to stop. The loop agrees on it, saves once, and ends cleanly."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import Any

STOPPING = "stopping after this step; press again to stop at once"


class StopRequest:
    """Remembers that a signal came. A context manager: the previous handlers come back afterwards.

    A second Ctrl-C raises KeyboardInterrupt: the person does not want to wait.
    requested  a signal came to this process
    obeyed     the run ended for it, or for one that came to another of its processes: the same on all of them
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self.obeyed = False
        self._previous: dict[signal.Signals, Any] = {}

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of one
                os.write(2, f"\n{STOPPING}\n".encode())
        self.requested = True

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
