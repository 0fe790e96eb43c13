"""A folder belongs to one run at a time: who has it, who is refused, and when it is free again."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from meshloom.checkpoint import lock as lock_module
from meshloom.checkpoint.errors import HeldError
from meshloom.checkpoint.fence import FENCE, Fence
from meshloom.checkpoint.lock import FolderLock, holder_of
from meshloom.checkpoint.saving.commit import LocalTarget
from meshloom.checkpoint.writing.writer import Writer
from support.checkpoint_runs import open_run
from support.checkpoint_worlds import fragments, make_arrays

HOLD = """
import pathlib, sys
from meshloom.checkpoint.lock import FolderLock

lock = FolderLock(pathlib.Path(sys.argv[1]))
print("has it", flush=True)
for line in sys.stdin:
    if line == "lose\\n":
        open(sys.argv[1] + "/.lock").close()  # ends this process's lock
    try:
        lock.check()
        print("has it", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


class Holder:
    """A process of its own that holds a folder's lock, as a start of a launch."""

    def __init__(self, folder: Path, fence: Fence) -> None:
        command, variables = [sys.executable, "-c", HOLD, str(folder)], {**os.environ, FENCE: str(fence)}
        self.process = subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.hears() == "has it"

    def hears(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def checks(self, word: str = "check") -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self.hears()


@pytest.fixture
def hold(tmp_path: Path) -> Generator[Callable[[int, int], Holder]]:
    made: list[Holder] = []

    def begin(term: int, attempt: int) -> Holder:
        made.append(Holder(tmp_path, Fence("launch-1", term, attempt)))
        return made[-1]

    yield begin
    for each in made:
        each.process.kill()
        each.process.communicate()


def test_a_later_start_takes_the_folder_from_a_frozen_one(
    tmp_path: Path,
    hold: Callable[[int, int], Holder],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    frozen = hold(1, 3)
    frozen.process.send_signal(signal.SIGSTOP)
    for other in (Fence("launch-2", 9, 9), Fence("launch-1", 1, 3), Fence("launch-1", 1, 2)):
        monkeypatch.setenv(FENCE, str(other))
        name = f"process {frozen.process.pid} (start 1.3 of launch-1)"
        assert (holder_of(tmp_path) or "").endswith(name)
        with pytest.raises(HeldError) as caught:
            FolderLock(tmp_path)
        assert name in str(caught.value)
    with monkeypatch.context() as elsewhere, pytest.raises(HeldError):
        elsewhere.setattr(lock_module.socket, "gethostname", lambda: "another machine")
        elsewhere.setattr(lock_module, "LOCK_SECONDS", 1.2)
        elsewhere.setattr(lock_module, "SILENT_SECONDS", 0.5)
        elsewhere.setenv(FENCE, str(Fence("launch-2", 9, 9)))
        FolderLock(tmp_path)
    (said,) = caplog.messages
    assert f"{name} is saving into this folder; waiting 0 s more" in said
    monkeypatch.setenv(FENCE, str(Fence("launch-1", 2, 3)))
    assert holder_of(tmp_path) is None
    lock = FolderLock(tmp_path)
    lock.check()
    frozen.process.send_signal(signal.SIGCONT)
    told = frozen.checks()
    assert told.startswith("HeldError") and f"process {os.getpid()} (start 2.3 of launch-1) has taken this folder over" in told
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    lock.check()
    lock.release()
    FolderLock(tmp_path).release()


def test_a_frozen_run_whose_folder_was_taken_does_not_commit(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.save(1, fragments(make_arrays(1), 1, 0)[0], {})
    beside = tmp_path / "beside"
    beside.write_text("other process 7 (start 2.4 of launch-1)")
    beside.replace(tmp_path / ".lock")
    run.save(2, fragments(make_arrays(2), 1, 0)[0], {})
    one, two = run.poll()
    assert (one.outcome, two.outcome) == ("committed", "failed")
    assert "other process 7 (start 2.4 of launch-1) has taken this folder over" in two.reason
    with pytest.raises(HeldError, match=r"start 2\.4 of launch-1"):
        target = LocalTarget(tmp_path / "elsewhere", coordinator=True)
        (tmp_path / "elsewhere" / ".lock").unlink()
        (tmp_path / "elsewhere" / ".lock").write_text("other process 7 (start 2.4 of launch-1)")
        target.prune(1)
    run.close()
    assert not (tmp_path / "step-00000002").exists()


def test_a_start_whose_lock_the_file_server_gave_on_finds_that_out(hold: Callable[[int, int], Holder]) -> None:
    earlier = hold(1, 3)
    assert earlier.checks("lose") == "has it"
    later = hold(2, 4)
    told = earlier.checks()
    assert told.startswith("HeldError") and "(start 2.4 of launch-1) has taken this folder over" in told
    assert later.checks() == "has it"


def test_a_start_that_is_late_gives_the_folder_back(tmp_path: Path, hold: Callable[[int, int], Holder]) -> None:
    """Two starts have taken it from one before both; the earlier of the two put its file last."""
    late = hold(1, 3)
    later = hold(2, 4)
    beside = tmp_path / "beside"
    beside.write_text(f"here process {late.process.pid} (start 1.3 of launch-1)")
    beside.replace(tmp_path / ".lock")
    assert later.checks() == "has it" and late.checks().startswith("HeldError")


def test_a_start_that_comes_after_a_later_one_is_refused(
    tmp_path: Path, hold: Callable[[int, int], Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier start was frozen before it took the folder."""
    monkeypatch.setenv(FENCE, str(Fence("launch-1", 1, 3)))
    later = hold(2, 4)
    monkeypatch.setattr(lock_module, "LOCK_SECONDS", 0.0)
    monkeypatch.setattr(lock_module.socket, "gethostname", lambda: "another machine")
    for over in (False, True):
        if over:
            later.process.kill()
            later.process.wait()
        with pytest.raises(HeldError, match=r"start 2\.4 of launch-1\) has taken this folder over"):
            FolderLock(tmp_path)
    monkeypatch.setenv(FENCE, str(Fence("launch-1", 2, 4)))
    FolderLock(tmp_path).release()


def test_a_folder_that_can_t_be_taken_back_is_left_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FENCE, str(Fence("launch-1", 2, 4)))
    lock = FolderLock(tmp_path)
    beside = tmp_path / "beside"
    beside.write_text("other process 7 (start 1.3 of launch-1)")
    beside.replace(tmp_path / ".lock")
    with monkeypatch.context() as full:

        def none(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        full.setattr(Path, "replace", none)
        with pytest.raises(OSError, match="No space left"):
            lock.check()
    lock.check()
    lock.release()
    FolderLock(tmp_path).release()


def test_a_lock_file_that_somebody_has_removed_is_no_reason_to_end(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    (tmp_path / ".lock").unlink()
    lock.check()
    lock.release()


def test_two_runs_on_one_folder_are_refused(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    with pytest.raises(HeldError, match="another run is saving into this folder"):
        open_run(tmp_path)
    run.close()
    open_run(tmp_path).close()


def test_failed_start_of_a_writer_releases_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken, pytest.raises(OSError, match="no more processes"):

        def start(_: object) -> None:
            raise OSError(errno.EAGAIN, "no more processes")

        broken.setattr(Writer, "_start", start)
        open_run(tmp_path)
    open_run(tmp_path).close()


def test_file_system_without_locks_warns_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    lock = FolderLock(tmp_path)
    assert "this file system has no locks ([Errno 37] No locks available)" in caplog.text
    lock.release()


ASK = """
import pathlib, socket, sys
from meshloom.checkpoint.lock import holder_of

socket.gethostname = lambda: sys.argv[2]
print(holder_of(pathlib.Path(sys.argv[1])))
"""


def test_a_folders_holder_is_told_without_touching_it(tmp_path: Path) -> None:
    def told(machine: str) -> str:
        command = [sys.executable, "-c", ASK, str(tmp_path), machine]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=250).stdout.strip()

    here = socket.gethostname()
    assert told(here) == "None" and not list(tmp_path.iterdir())
    lock = FolderLock(tmp_path)
    assert told(here) == f"{here} process {os.getpid()}"
    assert told("another") == "None", "which can't know whether that node is gone: FolderLock waits to see"
    assert holder_of(tmp_path) == "in this very process"
    assert told(here) == f"{here} process {os.getpid()}", "asking has not ended it"
    lock.release()
    assert told(here) == "None" and holder_of(tmp_path) is None
