"""Stop requests by SIGTERM, SIGUSR1 or Ctrl-C: the ranks agree on them, save once, and end cleanly."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

DIVERGED = 77  # exit code of a run that ended by its own decision: its loss or its weights are beyond repair
INTERRUPTED = 128 + signal.SIGINT  # exit code after a second Ctrl-C, as a shell gives it
STOPPING = "stopping after this step; press again to stop at once"


def interrupt() -> None:
    """Raise KeyboardInterrupt, as Python itself does for Ctrl-C."""
    raise KeyboardInterrupt


def show_cursor() -> None:
    """Show the terminal's cursor, which a progress bar has hidden, before a process ends at once."""
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")


class StopRequest:
    """Signal handlers that record a stop request. A context manager: it restores the previous handlers.

    A second Ctrl-C calls `at_once`.

    requested  whether this process received a signal
    number     the last signal received
    obeyed     whether the run ended because of a signal to any of its processes; the same on all of them
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, at_once: Callable[[], None] = interrupt) -> None:
        """at_once: called on a second Ctrl-C. The default raises KeyboardInterrupt; the run then still closes its files."""
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

    def hold(self) -> None:
        """Install the handlers, where they are not."""
        for number in self.SIGNALS:
            if number not in self._previous:
                self._previous[number] = signal.signal(number, self._remember)

    def release(self) -> None:
        """Restore the handlers from before `hold`."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def __enter__(self) -> StopRequest:
        self.hold()
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()
