"""A folder belongs to one run at a time: who has it, who is refused, and when it is free again."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from meshloom.checkpoint.errors import HeldError
from meshloom.checkpoint.lock import FolderLock, holder_of
from meshloom.checkpoint.writing.writer import Writer
from support.checkpoint_runs import open_run


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


def test_who_has_a_folder_is_told_to_others_without_touching_it(tmp_path: Path) -> None:
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
