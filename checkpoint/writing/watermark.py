"""The progress of the copy into shared memory, for a writer in another process. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..errors import CheckpointError

TRAILER = 4096
ABANDONED = 2**64 - 1
POLL_SECONDS = 0.0005


class Watermark:
    """Two numbers in the last page of a piece of shared memory: so many of its first bytes are in place, and a sign of life
    of who follows the copy.
    """

    def __init__(self, memory: memoryview) -> None:
        self._cells = memory[len(memory) - TRAILER : len(memory) - TRAILER + 16].cast("Q")

    def set(self, value: int) -> None:
        """Say how many bytes are in place: one aligned store, seen whole by the other process."""
        self._cells[0] = value

    def release(self) -> None:
        """Look at the memory no more: it is about to go."""
        self._cells.release()

    def abandon(self) -> None:
        """Say that the rest will never come."""
        self._cells[0] = ABANDONED

    @property
    def life(self) -> int:
        """A number that changes while the follower gets on."""
        return self._cells[1]

    def wait(self, value: int, alive: Callable[[], bool]) -> None:
        """Return when so many bytes are in place: the follower's part. Raises CheckpointError if they will never be."""
        self._cells[1] += 1
        while (reached := self._cells[0]) < value:
            if not alive():
                raise CheckpointError("the trainer is gone")
            time.sleep(POLL_SECONDS)
        if reached == ABANDONED:
            raise CheckpointError("the snapshot was given up")
