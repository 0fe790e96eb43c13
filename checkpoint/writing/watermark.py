"""How far the copy into shared memory has come, for a writer in another process. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..errors import CheckpointError

TRAILER = 4096
ABANDONED = 2**64 - 1
POLL_SECONDS = 0.0005


class Watermark:
    """A number in the last page of a piece of shared memory: its first so many bytes are in place."""

    def __init__(self, memory: memoryview) -> None:
        self._cell = memory[len(memory) - TRAILER : len(memory) - TRAILER + 8].cast("Q")

    def set(self, value: int) -> None:
        """Say how many bytes are in place: one aligned store, seen whole by the other process."""
        self._cell[0] = value

    def abandon(self) -> None:
        """Say that the rest will never come."""
        self._cell[0] = ABANDONED

    def wait(self, value: int, alive: Callable[[], bool]) -> None:
        """Return when so many bytes are in place. Raises CheckpointError if they will never be."""
        while (reached := self._cell[0]) < value:
            if not alive():
                raise CheckpointError("the trainer is gone")
            time.sleep(POLL_SECONDS)
        if reached == ABANDONED:
            raise CheckpointError("the snapshot was given up")
