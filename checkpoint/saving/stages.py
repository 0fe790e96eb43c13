"""The stages of a save, and its turn among the saves of a Checkpointer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from enum import IntEnum


class Stage(IntEnum):
    """How far a save has come. It passes all stages in this order, also those in which it has nothing to do.

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


class Turn:
    """A save's stage, and its turn at what one save uses at a time: the tensors, the keepers, the writer, the commit.

    Whatever a save uses it leaves by reaching a stage. Those that come after it wait for that stage, and look at nothing else.
    """

    def __init__(self, after: Turn | None, *, disk: bool, memory: bool) -> None:
        """after: of the save before; disk, memory: what the save is meant for."""
        self._before = after
        self._disk = disk
        self._memory = memory
        self._stage = Stage.PLANNED
        self._changed = threading.Condition()

    @property
    def stage(self) -> Stage:
        """The last stage that was reached."""
        return self._stage

    def reach(self, stage: Stage) -> None:
        """Go on to a stage. One that lies behind already is no step back."""
        if stage >= Stage.ENDED:  # before anybody knows of it: who waits goes on from here, and old saves are let go
            self._before = next((turn for turn in self._earlier() if turn.stage < Stage.ENDED), None)
        with self._changed:
            self._stage = max(self._stage, stage)
            self._changed.notify_all()

    def wait(self, stage: Stage, timeout: float | None = None) -> bool:
        """Wait until the save has reached a stage. Returns whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: self._stage >= stage, timeout)

    def wait_for_tensors(self) -> None:
        """Wait until no earlier save copies tensors."""
        for turn in self._earlier():
            turn.wait(Stage.SNAPSHOTTED)

    def wait_for_keepers(self) -> None:
        """Wait until no earlier save needs the keepers."""
        for turn in self._earlier():
            if turn._memory:
                turn.wait(Stage.KEPT)

    @property
    def writer_is_free(self) -> bool:
        """Whether no earlier save needs the writer."""
        return all(turn.stage >= Stage.WRITTEN for turn in self._earlier() if turn._disk)

    def wait_for_writer(self) -> None:
        """Wait until no earlier save needs the writer."""
        for turn in self._earlier():
            if turn._disk:
                turn.wait(Stage.WRITTEN)

    def wait_to_commit(self) -> None:
        """Wait until every earlier save to the disk has its outcome."""
        for turn in self._earlier():
            if turn._disk:
                turn.wait(Stage.ENDED)

    def _earlier(self) -> Iterator[Turn]:
        """Yield the saves before that have not ended, the last one first. A few that have may be among them."""
        turn = self._before
        while turn is not None:
            yield turn
            turn = turn._before
