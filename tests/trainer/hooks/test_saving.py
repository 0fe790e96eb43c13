"""A run's requests to its checkpointer: saves, confirmations, and the wait before an update."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.errors import CheckpointError, SavesFailed
from meshloom.checkpoint.report import SaveReport
from meshloom.parallel.heartbeat import Heartbeat, Phase, read_beat
from meshloom.trainer.all_ranks import PeerFailed
from meshloom.trainer.hooks.base import Hook
from meshloom.trainer.hooks.saving import Saving
from meshloom.trainer.loop import Loop, TrainingDiverged
from meshloom.trainer.watch.incidents import read_incidents
from support.parity import Work, build, take_steps
from support.ranks import run_ranks


class NotedCalls:
    """Stands for a checkpointer: notes what it is asked for."""

    def __init__(self, mode: str, calls: list[str]) -> None:
        self.config = CheckpointConfig(mode=mode)
        self._calls = calls

    def tell_progress(self, on_progress: Any) -> None:
        self.on_progress = on_progress

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

    wait = finish = poll


class StepEnds(Hook):
    """Notes the end of each step, behind the hooks before it."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def on_step_end(self, loop: Loop) -> None:
        self._calls.append(f"end {loop.progress.step}")


def asked(rank: int, world_size: int, mode: str) -> list[str]:
    """Return what a run of four steps that saves every second one asks its checkpointer for."""
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


def test_the_writers_progress_is_progress_of_the_save(tmp_path: Path) -> None:
    checkpointer, heartbeat = NotedCalls("async", []), Heartbeat(tmp_path / "beat")
    loop = SimpleNamespace(progress=SimpleNamespace(step=0), mesh=SimpleNamespace(heartbeat=heartbeat))
    Saving(cast(Checkpointer, checkpointer), 2, {}).on_run_begin(cast(Loop, loop))
    beats: list[int] = []
    for phase in (Phase.UPDATE, Phase.SAVE):
        heartbeat.beat(phase)
        checkpointer.on_progress()
        found = read_beat(tmp_path / "beat")
        assert found is not None
        beats.append(found.beats)
    assert beats == [2, 4]


class FullDisk(NotedCalls):
    """Stands for a checkpointer whose saves fail: the one rank hears of it after the second step, the other never."""

    def __init__(self, rank: int, calls: list[str]) -> None:
        super().__init__("async", calls)
        self._rank = rank

    def poll(self) -> list[Any]:
        if self._rank == 0 and "confirm 1" in self._calls:
            raise SavesFailed("3 saves in a row failed")
        return []


def saved_to_a_full_disk(rank: int, world_size: int) -> tuple[str, str]:
    """The exception that ends this rank, and what its checkpointer was asked for last."""
    calls: list[str] = []
    saving = Saving(cast(Checkpointer, FullDisk(rank, calls)), 2, {})
    work = Work(samples=2)
    with pytest.raises((CheckpointError, PeerFailed)) as caught:
        take_steps(build(work, world_size), work, range(9), saving)
    return str(caught.value), calls[-1]


def test_saves_that_fail_end_all_ranks_at_the_same_step() -> None:
    (own, last), (peer, peers_last) = run_ranks(2, saved_to_a_full_disk)
    assert own == "3 saves in a row failed" and peer == "another rank failed"
    assert last == peers_last


class Poison(Hook):
    """Makes every weight NaN after the first step. The second, by which ranks hear of the full disk, then has no loss."""

    def on_step_end(self, loop: Loop) -> None:
        if loop.progress.step == 1:
            for fragment in loop.engine.fragments():
                fragment.tensor.fill_(math.nan)


def diverged_on_a_full_disk(rank: int, world_size: int) -> str:
    calls: list[str] = []
    saving, work = Saving(cast(Checkpointer, FullDisk(rank, calls)), 2, {}), Work(samples=2)
    with pytest.raises((CheckpointError, PeerFailed, TrainingDiverged)) as caught:
        take_steps(build(work, world_size), work, range(9), Poison(), saving)
    return type(caught.value).__name__


def test_a_full_disk_and_a_nan_in_one_step_end_all_ranks() -> None:
    assert run_ranks(2, diverged_on_a_full_disk) == ["TrainingDiverged"] * 2


class LastSave(NotedCalls):
    """Stands for a checkpointer whose save was committed on rank 0, while rank 1 did not hear of it."""

    def __init__(self, rank: int, calls: list[str], fails: bool) -> None:
        super().__init__("async", calls)
        self._rank, self._fails = rank, fails

    def wait(self) -> list[SaveReport]:
        return [SaveReport(step=2, outcome="committed" if self._rank == 0 else "failed")]

    def finish(self) -> list[Any]:
        if self._fails and self._rank == 0:
            raise CheckpointError("the last save failed")
        return []


def saved_at_the_end(rank: int, world_size: int, fails: bool) -> tuple[str, str]:
    """Return how the end of a run ends on this rank, and what its checkpointer was asked for last."""
    calls: list[str] = []
    saving, work = Saving(cast(Checkpointer, LastSave(rank, calls, fails)), 2, {}), Work(samples=2)
    loops: list[Loop] = []

    class Kept(Hook):
        def on_step_end(self, loop: Loop) -> None:
            loops.append(loop)

    take_steps(build(work, world_size), work, range(2), saving, Kept())
    try:
        saving.finish(loops[0])
    except (CheckpointError, PeerFailed) as error:
        return str(error), calls[-1]
    return "", calls[-1]


def noted_failures(rank: int, world_size: int, folder: Path) -> None:
    """Fail a save on rank 1, of which both ranks hear."""

    class Failing(NotedCalls):
        def poll(self) -> list[Any]:
            report = SaveReport(step=1, reason="rank 1: no room", culprit=1)
            if self._calls[-1:] == ["prepare"]:
                return [report]
            if self._calls[-1:] == ["confirm 2"]:
                raise SavesFailed("3 saves in a row failed", [replace(report, step=2)])
            return []

    os.chdir(folder)  # where the loop of the tests keeps its run
    work = Work(samples=2)
    with pytest.raises(SavesFailed):
        take_steps(build(work, world_size), work, range(4), Saving(cast(Checkpointer, Failing("async", [])), 2, {}))


def test_a_failed_save_is_an_incident_once(tmp_path: Path) -> None:
    """Also the one that ends the run."""
    run_ranks(2, noted_failures, tmp_path)
    for step, incident in enumerate(read_incidents(tmp_path), start=1):
        assert (incident["kind"], incident["rank"], incident["step"], incident["phase"]) == ("save_failed", 1, step, "save")
        assert incident["message"] == f"saving step {step} failed: rank 1: no room"
    assert len(list(read_incidents(tmp_path))) == 2


def test_ranks_decide_together_on_the_last_save() -> None:
    assert run_ranks(2, saved_at_the_end, False) == [("", "save 2")] * 2
    assert [said for said, _ in run_ranks(2, saved_at_the_end, True)] == ["the last save failed", "another rank failed"]
