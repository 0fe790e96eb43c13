"""Saves keep their order, whatever becomes of those between them: one writer, one keeper, and the newest step wins."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from meshloom.checkpoint import faults
from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.files import open_files
from meshloom.checkpoint.folder import steps_newest_first
from meshloom.checkpoint.memory.keeper import Keeper
from meshloom.checkpoint.tools import verify
from meshloom.checkpoint.writing.writer import Request, Writer
from support.checkpoint_runs import open_run, restored_step
from support.checkpoint_worlds import Gate, fragments, make_arrays, together, told_of

pytestmark = pytest.mark.usefixtures("nothing_left")


def save(run: Checkpointer, step: int, **how: Any) -> None:
    run.save(step, fragments(make_arrays(step), 1, 0)[0], {"step": step}, **how)
    run.before_update()


class Users:
    """The users of a process; each one's turn ends no sooner than its gate is opened."""

    def __init__(self) -> None:
        self.gates: dict[int, threading.Event] = {}
        self.now: list[int] = []
        self.met = False

    def come(self, step: int) -> None:
        self.met |= bool(self.now)
        self.now.append(step)

    def go(self) -> None:
        step = self.now[0]
        if step in self.gates:
            assert self.gates[step].wait(60)
        self.now.remove(step)


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Users:
    users, begin, end = Users(), Writer.begin, Writer.end

    def begun(self: Writer, request: Request) -> None:
        users.come(int(request.folder.rpartition("step-")[2][:8]))
        begin(self, request)

    def ended(self: Writer, patience: float) -> Any:
        users.go()
        return end(self, patience)

    monkeypatch.setattr(Writer, "begin", begun)
    monkeypatch.setattr(Writer, "end", ended)
    return users


def all_are_whole(folder: Path) -> bool:
    names = steps_newest_first(open_files(folder))
    return all(isinstance(found, int) for name in names for found in verify(open_files(folder / name)))


def test_save_after_a_skipped_one_waits_for_the_writer(tmp_path: Path, writer: Users) -> None:
    writer.gates = {step: threading.Event() for step in (1, 2)}
    run = open_run(tmp_path, mode="async", timeout=60.0)  # memory for two
    for step in (1, 2, 3):
        save(run, step)
    assert [(report.step, report.outcome) for report in told_of(run, 3)] == [(3, "skipped")]
    writer.gates[1].set()
    told_of(run, 1)
    save(run, 4)  # in the memory of the first
    time.sleep(0.1)  # for what must not happen
    writer.gates[2].set()
    assert [(report.step, report.outcome) for report in run.finish()] == [(2, "committed"), (4, "committed")]
    assert not writer.met, "two saves used one writer"
    assert restored_step(tmp_path) == 4 and all_are_whole(tmp_path)


def test_save_kept_only_in_memory_does_not_hide_a_busy_writer(tmp_path: Path, writer: Users) -> None:
    writer.gates = {1: threading.Event()}
    run = open_run(tmp_path, mode="async", timeout=60.0, memory_every=1)
    reports = []
    for step in (1, 2, 3):
        save(run, step)
        reports += told_of(run, step) if step > 1 else []
    writer.gates[1].set()
    reports += run.finish()
    assert {report.step: report.outcome for report in reports} == {1: "committed", 2: "kept", 3: "kept"}
    assert not writer.met, "two saves used one writer"


def test_save_after_a_skipped_one_waits_for_the_keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users, hold, go_on = Users(), Keeper.hold, threading.Event()

    def held(self: Keeper, buffer: Any, size: int, version: str, step: int, *rest: Any) -> dict[str, Any]:
        users.come(step)
        if step == 2:
            assert go_on.wait(60)
        answer = hold(self, buffer, size, version, step, *rest)
        users.go()
        return answer

    monkeypatch.setattr(Keeper, "hold", held)
    run = open_run(tmp_path, mode="async", timeout=60.0, memory_every=1)  # memory for three
    save(run, 1, disk=False)
    told_of(run, 1)
    for step in (2, 3, 4):
        save(run, step, disk=False)
    assert [(report.step, report.outcome) for report in told_of(run, 4)] == [(4, "skipped")]
    assert run._context.memory is not None
    run._context.pool.limit = 4 * 2**21  # room for one more, as if a save had come to its end
    save(run, 5, disk=False)
    time.sleep(0.1)
    go_on.set()
    assert [(report.step, report.outcome) for report in run.wait()] == [(step, "kept") for step in (2, 3, 5)]
    assert not users.met, "two saves used one keeper"
    run.close()


def test_a_save_writes_while_the_one_before_it_waits_to_commit(tmp_path: Path) -> None:
    slow = Gate("report.before")
    faults.install(slow)
    run = open_run(tmp_path, mode="async", timeout=60.0, host_memory_gib=6.3 / 1024)  # memory for three
    for step in (1, 2, 3):
        save(run, step)
    deadline = time.monotonic() + 20
    while not (written := list(tmp_path.glob("step-00000003.tmp-*/rank-00000.leaves"))) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.1)  # for what must not happen
    assert slow.visitors == ["checkpoint-1"], "a save goes to its commit before an earlier one has its outcome"
    slow.open.set()
    assert written, "the third waits for the second's commit, which waits for the first's"
    assert [(report.step, report.outcome) for report in run.finish()] == [(step, "committed") for step in (1, 2, 3)]


def test_ranks_that_save_different_steps_are_told_and_save_none(tmp_path: Path) -> None:
    def body(control: Control) -> tuple[str, str]:
        run = Checkpointer(tmp_path, control, CheckpointConfig(mode="sync", timeout=60.0))
        run.save(1 + control.rank, fragments(make_arrays(), 2, 0)[control.rank], {}, required=True)
        (report,) = run.wait()
        run.close()
        return report.outcome, report.reason

    for outcome, reason in together(2, body):
        assert outcome == "failed" and "ranks save different steps at once: 1, 2" in reason
    assert not steps_newest_first(open_files(tmp_path))


def test_the_end_waits_for_what_came_before_a_skipped_save(tmp_path: Path) -> None:
    slow = Gate("report.before")
    faults.install(slow)
    run = open_run(tmp_path, mode="async", timeout=60.0, host_memory_gib=2.1 / 1024)  # memory for one
    save(run, 1)
    save(run, 2)
    told_of(run, 2)
    ending = threading.Thread(target=run.close, daemon=True)
    ending.start()
    ending.join(0.2)
    assert ending.is_alive(), "the folder, the writer and the memory are given back while they are in use"
    slow.open.set()
    ending.join(60)
    assert not ending.is_alive()
    assert restored_step(tmp_path) == 1


def test_two_saves_never_delete_the_same_step_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(tmp_path, mode="async", timeout=60.0)
    inside, met = threading.Event(), threading.Event()

    def prune(keep: int) -> list[str]:
        if inside.is_set():
            met.set()
        inside.set()
        met.wait(0.2)
        inside.clear()
        return []

    monkeypatch.setattr(run._target, "prune", prune)
    for step in (1, 2, 3):
        save(run, step, required=True)
    run.finish()
    assert not met.is_set()


def test_save_without_memory_in_time_ends_itself_not_the_run(tmp_path: Path) -> None:
    slow = Gate("report.before")
    run = open_run(tmp_path, mode="async", timeout=1.0, host_memory_gib=2.1 / 1024)  # memory for one
    faults.install(slow)
    save(run, 1)
    save(run, 2, required=True)
    slow.open.set()
    (report,) = (report for report in run.wait() if report.step == 2)
    assert report.outcome == "failed" and "no snapshot memory became free" in report.reason
    save(run, 3, required=True)
    with contextlib.suppress(Exception):
        run.finish()
    assert restored_step(tmp_path) == 3
