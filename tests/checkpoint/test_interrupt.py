"""A save that Ctrl-C interrupts ends then and there, on all ranks, and is in the way of none that comes after it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshloom.checkpoint import faults
from meshloom.checkpoint.checkpointer import Checkpointer
from meshloom.checkpoint.config import CheckpointConfig
from meshloom.checkpoint.control import Control
from meshloom.checkpoint.memory.wire import receive_line
from meshloom.checkpoint.saving.save import Save
from support.checkpoint_runs import open_run, restored_step
from support.checkpoint_worlds import fragments, make_arrays, together

BOUNDARIES = ["vote.before", "decision.before", "snapshot.before", "snapshot.after", "report.before", "manifest.write.before"]
NAMED = ["commit.rename.after", "latest.rename.before"]  # the step has its name already
TIDYING = "prune.rename.before"

pytestmark = [pytest.mark.started_writers, pytest.mark.usefixtures("nothing_left")]


@pytest.fixture(autouse=True)
def no_faults_left() -> Iterator[None]:
    yield
    faults.install(None)


def interrupt_at(boundary: str) -> None:
    """Ctrl-C, once, when the trainer comes to this boundary."""

    def hook(reached: str, amount: int) -> int:
        if reached == boundary:
            faults.install(None)
            raise KeyboardInterrupt
        return amount

    faults.install(hook)


def save(run: Checkpointer, step: int) -> None:
    run.save(step, fragments(make_arrays(step), 1, 0)[0], {"step": step}, required=True)
    run.before_update()


def goes_on(run: Checkpointer, folder: Path, second: str = "failed") -> None:
    """The next saves of an interrupted run are whole, and are told of behind the one that was interrupted."""
    for step in (3, 4):
        save(run, step)
    assert [(report.step, report.outcome) for report in run.finish()] == [(2, second), (3, "committed"), (4, "committed")]
    assert restored_step(folder) == 4
    assert not list(folder.glob("step-*.*"))


@pytest.mark.parametrize("boundary", [*BOUNDARIES, *NAMED, TIDYING])
def test_a_save_that_is_interrupted_is_in_nobodys_way(tmp_path: Path, boundary: str) -> None:
    run = open_run(tmp_path, keep=1)
    save(run, 1)
    run.wait()
    interrupt_at(boundary)
    with pytest.raises(KeyboardInterrupt):
        save(run, 2)
    assert restored_step(tmp_path) == (1 if boundary in BOUNDARIES else 2)
    goes_on(run, tmp_path, "committed" if boundary == TIDYING else "failed")


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["Giver.send", "_answer"])
def test_a_writer_that_was_interrupted_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Its orders may have been cut short, and its late answer must not be taken for that of the next save."""
    run = open_run(tmp_path)
    first = run._context.writer._process
    assert first is not None
    with monkeypatch.context() as patch:
        patch.setattr(f"meshloom.checkpoint.writing.writer.{name}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(run, 2)
    assert first.poll() is not None
    goes_on(run, tmp_path)


def test_a_keeper_that_was_interrupted_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(tmp_path, memory_every=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("meshloom.checkpoint.memory.keeper.receive_line", interrupted_second())
        save(run, 2)
    goes_on(run, tmp_path)


def interrupted_second() -> Any:
    """The first answer of a keeper is its greeting."""
    calls: list[int] = []

    def receive(link: Any) -> Any:
        calls.append(1)
        return receive_line(link) if len(calls) == 1 else interrupted()

    return receive


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("can't start new thread")])
def test_a_save_whose_thread_never_was_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def start(_: threading.Thread) -> None:
        raise error

    run = open_run(tmp_path, mode="async")
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", start)
        save(run, 2)
    (report,) = run.poll()
    assert report.outcome == "failed" and type(error).__name__ in report.reason
    save(run, 3)
    run.finish()
    assert restored_step(tmp_path) == 3


def test_a_wait_that_is_interrupted_loses_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(tmp_path, mode="async")
    save(run, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Save, "join", interrupted)
        run.wait()
    goes_on(run, tmp_path, "committed")


def test_the_other_ranks_are_told_of_an_interruption(tmp_path: Path) -> None:
    config = CheckpointConfig(mode="sync", keep=0, timeout=60.0)

    def hook(reached: str, amount: int) -> int:
        if reached == "snapshot.before" and threading.current_thread() in struck:
            struck.clear()
            raise KeyboardInterrupt
        return amount

    def body(control: Control) -> list[tuple[int, str, str]]:
        run = Checkpointer(tmp_path, control, config)
        if control.rank == 1:
            struck.append(threading.current_thread())
        for step in (1, 2):
            with contextlib.suppress(KeyboardInterrupt):
                run.save(step, fragments(make_arrays(step), 2, 0)[control.rank], {})
        return [(report.step, report.outcome, report.reason.partition(":")[0]) for report in run.finish()]

    struck: list[threading.Thread] = []
    faults.install(hook)
    told, interrupted = together(2, body)
    assert told == [(1, "failed", "rank 1"), (2, "committed", "")]
    assert interrupted == [(1, "failed", "KeyboardInterrupt"), (2, "committed", "")]
