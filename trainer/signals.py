"""SIGTERM, SIGUSR1, Ctrl-C: the run is asked to stop. The loop agrees on it, saves once, and ends cleanly."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

AT_ONCE = 128 + signal.SIGINT  # the exit code that a shell's user expects of what a second Ctrl-C has ended
STOPPING = "stopping after this step; press again to stop at once"


def interrupt() -> None:
    """What Python does by itself for Ctrl-C."""
    raise KeyboardInterrupt


def show_cursor() -> None:
    """For a process that ends at once: a progress bar has hidden the terminal's cursor, and has no time to give it back."""
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")


class StopRequest:
    """Remembers that a signal came. A context manager: the previous handlers come back afterwards.

    A second Ctrl-C calls `at_once`: the person does not want to wait.
    requested  a signal came to this process
    number     the last one that did
    obeyed     the run ended for it, or for one that came to another of its processes: the same on all of them
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, at_once: Callable[[], None] = interrupt) -> None:
        """at_once: by default raises KeyboardInterrupt, after which the run still closes what it has open."""
        self._at_once = at_once
        self.requested = False
        self.number = signal.SIGTERM
        self.obeyed = False
        self._previous: dict[signal.Signals, Any] = {}

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            self._at_once()
        self.number = signal.Signals(number)
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
