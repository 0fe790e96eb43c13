"""A thread that prints and keeps the messages of an agent: a slow disk or terminal delays no answer."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable

CLOSE_SECONDS = 5.0
"""Time for what was told to be written at the end. A disk that hangs is not waited for."""


class Announcer:
    """Does one thing after another in the order in which they were told, without ever letting the caller wait."""

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._tell, daemon=True, name="announcer")
        self._thread.start()

    def tell(self, action: Callable[[], None]) -> None:
        """Print or write something, soon. A fault of the disk or the terminal must not end the run."""
        self._told.put(action)

    def close(self) -> None:
        """Wait until all of it is written, for a while."""
        self._told.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _tell(self) -> None:
        while (action := self._told.get()) is not None:
            with contextlib.suppress(Exception):
                action()
