"""The phases of a save, and the one that it has reached."""

from __future__ import annotations

import threading
from enum import IntEnum


class SavePhase(IntEnum):
    """A phase of a save. It passes all of them in this order, also those in which it has nothing to do.

    PLANNED      it exists; the ranks agree on what it writes
    SNAPSHOTTED  the tensors may change: they are copied, or nothing of them is needed
    KEPT         it needs the keepers no more
    WRITTEN      it needs the writer no more
    ENDED        its report has the outcome: committed, kept, unkept, skipped or failed
    LEFT         its thread is over, and with it the deletion of old steps
    """

    PLANNED = 0
    SNAPSHOTTED = 1
    KEPT = 2
    WRITTEN = 3
    ENDED = 4
    LEFT = 5


class SaveProgress:
    """The phase that a save has reached. Any thread may wait for one."""

    def __init__(self) -> None:
        self._phase = SavePhase.PLANNED
        self._changed = threading.Condition()

    @property
    def phase(self) -> SavePhase:
        """The last phase that was reached."""
        return self._phase

    @property
    def ended(self) -> bool:
        """True once the save has its outcome."""
        return self._phase >= SavePhase.ENDED

    def reach(self, phase: SavePhase) -> None:
        """Go on to a phase. One that lies behind already is no step back."""
        with self._changed:
            self._phase = max(self._phase, phase)
            self._changed.notify_all()

    def wait(self, phase: SavePhase, timeout: float | None = None) -> bool:
        """Wait until the save has reached a phase. Return whether it has. timeout: in seconds; None: for ever"""
        with self._changed:
            return self._changed.wait_for(lambda: self._phase >= phase, timeout)
