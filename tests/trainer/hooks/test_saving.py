"""When a run asks its checkpointer for what: saves, confirmations, and the wait before an update."""

from __future__ import annotations

from typing import Any, cast

import pytest

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.trainer.hooks.base import Hook
from meshloom.trainer.hooks.saving import Saving
from meshloom.trainer.loop import Loop
from support.parity import Work, build, take_steps
from support.ranks import run_ranks


class NotedCalls:
    """Stands for a checkpointer: notes what it is asked for."""

    def __init__(self, mode: str, calls: list[str]) -> None:
        self.config = CheckpointConfig(mode=mode)
        self._calls = calls

    def prepare(self, fragments: Any) -> None:
        self._calls.append("prepare")

    def save(self, step: int, fragments: Any, state: Any, *, required: bool, disk: bool, hold: bool) -> None:
        self._calls.append(f"save {step}{', held' if hold else ''}")

    def confirm(self, step: int) -> None:
        self._calls.append(f"confirm {step}")

    def before_update(self) -> float:
        self._calls.append("before update")
        return 0.0

    def poll(self) -> list[Any]:
        return []


class StepEnds(Hook):
    """Notes the end of each step, behind the hooks before it."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def on_step_end(self, loop: Loop) -> None:
        self._calls.append(f"end {loop.progress.step}")


def asked(rank: int, world_size: int, mode: str) -> list[str]:
    """What a run of four steps that saves every second one asks its checkpointer for."""
    calls: list[str] = []
    saving = Saving(cast(Checkpointer, NotedCalls(mode, calls)), 2, {})
    work = Work(samples=2)
    take_steps(build(work, world_size), work, range(4), saving, StepEnds(calls))
    return calls


SAVES = {
    # A step's numbers come while the next one computes; until then its save is no checkpoint.
    "async": ["save 2, held", "end 2", "before update", "confirm 2", "end 3", "before update", "confirm 3", "save 4, held"],
    "sync": ["confirm 2", "save 2", "end 2", "before update", "end 3", "before update", "confirm 3", "confirm 4", "save 4"],
}


@pytest.mark.parametrize("mode", SAVES)
def test_saves_wait_for_their_loss_and_updates_for_their_saves(mode: str) -> None:
    (calls,) = run_ranks(1, asked, mode)
    start = ["before update", "confirm 1", "prepare", "end 1", "before update"]
    end = ["end 4", "confirm 4"] if mode == "async" else ["end 4"]
    assert calls == [*start, *SAVES[mode], *end]
