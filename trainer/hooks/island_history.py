"""Keep which numbers of islands (`optim.local`) have trained a run: where some may be lost, its losses depend on that."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ...config.words import counted
from .base import Hook

if TYPE_CHECKING:
    from ..loop import Loop

log = logging.getLogger(__name__)


class IslandHistory(Hook):
    """Notes the number of islands wherever it changes, in the checkpoints of the run. Rows of metrics have `islands/present`.

    since  [first step, number of islands from there on] of each stretch, oldest first. Of a run resumed from a checkpoint
           that has no such state, the steps before are not known, and not in it
    """

    alone = True

    def __init__(self) -> None:
        self.since: list[list[int]] = []

    def on_run_begin(self, loop: Loop) -> None:
        """Note the number of islands of today."""
        first, present = loop.progress.step + 1, loop.mesh.layout.islands
        self.since = [each for each in self.since if each[0] < first]  # a run that goes back takes steps again
        before = self.since[-1][1] if self.since else None
        if before == present:
            return
        if before is not None:
            now = counted(present, "island")
            log.warning("from step %d on the run has %s (before: %d): losses depend on it", first, now, before)
        self.since.append([first, present])

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {"since": self.since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.since = [list(each) for each in state.get("since", [])]
