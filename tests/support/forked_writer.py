"""Writer processes that are forked from their trainer, which has imported all that they need: a start costs a fifth as much.

Only the start differs: the process has its own session, none of its trainer's descriptors but the socket, and its own faults.
It has a copy of the trainer's memory, too, and what that has mapped: tests of either want interpreters of their own.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from meshloom.checkpoint import faults
from meshloom.checkpoint.writing import writer, writer_main


class ForkedWriter:
    """Takes the place of `subprocess.Popen` in `meshloom.checkpoint.writing.writer`."""

    def __init__(self, words: Sequence[str], *, pass_fds: Sequence[int], stdin: int, start_new_session: bool) -> None:
        assert list(words[1:3]) == ["-m", "meshloom.checkpoint.writing.writer_main"] and start_new_session
        self._code: int | None = None
        self._lock = threading.Lock()
        self.pid = os.fork()
        if self.pid == 0:
            self._serve(words, pass_fds)

    @staticmethod
    def _serve(words: Sequence[str], pass_fds: Sequence[int]) -> None:
        try:
            gc.disable()  # what the trainer has not yet let go is not for this process to end
            os.setsid()
            low = 3  # peers of a trainer that dies must see it hang up, and its locks must go
            for descriptor in (*sorted(pass_fds), os.sysconf("SC_OPEN_MAX")):
                os.closerange(low, descriptor)
                low = descriptor + 1
            faults.install(None)
            sys.argv = list(words[2:])
            writer_main.main()
        except BaseException:
            os._exit(1)
        os._exit(0)

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        with self._lock:
            if self._code is None:
                done, status = os.waitpid(self.pid, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if done else None
            return self._code

    def wait(self, timeout: float = float("inf")) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("writer", timeout)
            time.sleep(0.001)
        return code

    def kill(self) -> None:
        """End it now."""
        if self.poll() is None:
            os.kill(self.pid, 9)


def fork_writers(patch: pytest.MonkeyPatch) -> None:
    """Have writers of this process, and of those forked from it, start so."""
    names = {"Popen": ForkedWriter, "DEVNULL": subprocess.DEVNULL, "TimeoutExpired": subprocess.TimeoutExpired}
    patch.setattr(writer, "subprocess", SimpleNamespace(**names))
