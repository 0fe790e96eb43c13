"""SIGTERM and SIGUSR1: the cluster asks the run to stop. The loop agrees on it, saves once, and ends cleanly."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """Remembers that a signal came. A context manager: the previous handlers come back afterwards."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
