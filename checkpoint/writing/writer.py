"""The process that writes: it gets a piece of shared memory and a name, and answers when the bytes are on the disk.

One per rank, started as a program of its own that imports no torch and takes part in no process group. A request is one
line of JSON over a socket; new shared memory comes along as a file descriptor.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..errors import CheckpointError
from .disk import Written
from .handover import Giver, SharedMemory

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Request:
    """Make files `name` and `leaves` in `folder` (a path or URL) out of the first `size` bytes of an arena."""

    memory: SharedMemory
    size: int
    folder: str
    name: str
    leaves: str

    @property
    def target(self) -> str:
        """Where the data go."""
        return f"{self.folder}/{self.name}"


class Writer:
    """Makes files out of arenas, one after the other, in a process of its own.

    So neither the interpreter lock nor a crash of the trainer is in the way, and one that is stuck can be ended.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._giver: Giver | None = None
        self._request: Request | None = None
        self._start()

    def _start(self) -> None:
        here, there = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "meshloom.checkpoint.writing.writer_main", str(there.fileno()), str(os.getpid())],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a signal to the trainer's group must not end a save half-way
        )
        there.close()
        self._socket = here
        self._giver = Giver(here)

    def begin(self, request: Request) -> None:
        """Start; the writing follows the arena's watermark. Every `begin` needs an `end`."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._giver is not None
        self._request = request
        what = {"size": request.size, "folder": request.folder, "name": request.name, "leaves": request.leaves}
        with contextlib.suppress(OSError):  # it died just now: `end` says how
            self._giver.send(what, request.memory)

    def end(self, patience: float) -> Written:
        """Return when everything is durable. Raises CheckpointError if it failed, or got no further for so many seconds.

        A process that is stuck is killed; the next `begin` starts another.
        """
        link, process, request = self._socket, self._process, self._request
        assert link is not None and process is not None and request is not None
        try:
            answer = _await(
                request, lambda seconds: read_line(link) if select.select([link], [], [], seconds)[0] else None, patience
            )
        except OSError:
            answer = b""
        except CheckpointError:
            process.kill()  # and not waited for: a stuck disk may hold it for as long as it likes
            link.close()
            self._process = self._socket = None
            raise
        if not answer:
            code = process.wait()
            link.close()
            raise CheckpointError(f"the writer process died ({_how(code)}) while writing {request.target}")
        reply = json.loads(answer)
        if "error" in reply:
            raise CheckpointError(reply["error"])
        return Written(**reply)

    def close(self) -> None:
        """End the process."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.wait()
        self._process = self._socket = None


def _await(request: Request, look: Callable[[float], Answer | None], patience: float) -> Answer:
    """What `look(seconds)` finds. Raises CheckpointError after `patience` seconds in which the writer got no further."""
    life, since = -1, 0.0
    while True:
        found = look(min(1.0, patience))
        if found is not None:
            return found
        if request.memory.watermark.life != life:
            life, since = request.memory.watermark.life, time.monotonic()
        elif time.monotonic() - since > patience:
            raise CheckpointError(
                f"writing {request.target} got no further for {patience:g} s (checkpoint.timeout): a stuck disk?"
            )


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def read_line(source: socket.socket) -> bytes:
    """One line, without its end; empty when the other side is gone."""
    line = b""
    while not line.endswith(b"\n"):
        part = source.recv(65536)
        if not part:
            return b""
        line += part
    return line[:-1]
