"""A save's turn among the saves of a Checkpointer."""

from __future__ import annotations

from collections.abc import Iterator

from .progress import SavePhase, SaveProgress


class Turn:
    """A save's turn at what one save uses at a time: the tensors, the keepers, the writer, the commit.

    Whatever a save uses it leaves by reaching a phase. Those that come after it wait for that phase, and look at nothing else.
    """

    def __init__(self, progress: SaveProgress, after: Turn | None, *, disk: bool, memory: bool) -> None:
        """progress: of this save; after: the turn of the save before; disk, memory: what this save is meant for."""
        self._progress = progress
        self._before = after
        self._disk = disk
        self._memory = memory

    def wait_for_tensors(self) -> None:
        """Wait until no earlier save copies tensors."""
        for turn in self._earlier():
            turn._progress.wait(SavePhase.SNAPSHOTTED)

    def wait_for_keepers(self) -> None:
        """Wait until no earlier save needs the keepers."""
        for turn in self._earlier():
            if turn._memory:
                turn._progress.wait(SavePhase.KEPT)

    @property
    def writer_is_free(self) -> bool:
        """True while no earlier save needs the writer."""
        return all(turn._progress.phase >= SavePhase.WRITTEN for turn in self._earlier() if turn._disk)

    def wait_for_writer(self) -> None:
        """Wait until no earlier save needs the writer."""
        for turn in self._earlier():
            if turn._disk:
                turn._progress.wait(SavePhase.WRITTEN)

    def wait_to_commit(self) -> None:
        """Wait until every earlier save to the disk has its outcome."""
        for turn in self._earlier():
            if turn._disk:
                turn._progress.wait(SavePhase.ENDED)

    def forget_ended(self) -> None:
        """Let go of the earlier saves that have ended, or every save of a run would hold the one before it."""
        self._before = next((turn for turn in self._earlier() if not turn._progress.ended), None)

    def _earlier(self) -> Iterator[Turn]:
        """Yield the earlier saves, the last one first: all that have not ended, and those that have but are not forgotten."""
        turn = self._before
        while turn is not None:
            yield turn
            turn = turn._before
