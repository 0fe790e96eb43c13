"""The process that writes: it gets a piece of shared memory and a name, and answers when the bytes are on the disk.

One per rank, started as a program of its own that imports no torch and takes part in no process group. A request is one
line of JSON over a socket; new shared memory comes along as a file descriptor.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from .handover import Giver, SharedMemory
from .image import Written

EXIT_SECONDS = 10.0


@dataclass(frozen=True)
class Request:
    """Make files `name` and `leaves` in `folder` (a path or URL) out of the first `size` bytes of a staging buffer.

    start: byte of file `name` at which a segment begins, which has the digests in it; None: it is a file of the rank's own
    """

    memory: SharedMemory
    size: int
    folder: str
    name: str
    leaves: str
    start: int | None = None

    @property
    def target(self) -> str:
        """Return the path that the data are written to."""
        return f"{self.folder}/{self.name}"


class Writer:
    """Makes files out of staging buffers, one after the other, in a process of its own.

    So neither the interpreter lock nor a crash of the trainer is in the way, and one that is stuck can be ended.

    on_progress  called about once a second while `end` waits and the process gets on, in the thread that waits
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._giver: Giver | None = None
        self._request: Request | None = None
        self.on_progress: Callable[[], None] = lambda: None
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
        """Start; the writing follows the staging buffer's watermark. Every `begin` needs an `end`."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._giver is not None and self._request is None, "one after the other"
        self._request = request
        what: dict[str, Any] = {"size": request.size, "folder": request.folder, "name": request.name}
        what |= {"leaves": request.leaves, "start": request.start}
        with contextlib.suppress(OSError):  # it died just now: `end` says how
            self._giver.send(what, request.memory)

    def end(self, patience: float) -> Written:
        """Return when everything is durable. Raises CheckpointError if it failed, or got no further for so many seconds.

        A process that is stuck is killed; the next `begin` starts another. Where this wait is interrupted, `abandon` it.
        """
        link, process, request = self._socket, self._process, self._request
        assert link is not None and process is not None and request is not None
        try:
            answer = _answer(link, request, patience, self.on_progress)
        except CheckpointError:
            self._kill()  # and not waited for: a stuck disk may hold it for as long as it likes
            raise
        self._request = None  # and with it the staging buffer: one that is closed must not stay mapped in the process either
        if not answer:
            code = process.wait()
            link.close()
            raise CheckpointError(f"the writer process died ({_how(code)}) while writing {request.target}")
        reply = json.loads(answer)
        if "error" in reply:
            raise CheckpointError(reply["error"])
        return Written(**reply)

    @property
    def busy(self) -> bool:
        """Return whether a `begin` has had no `end` yet."""
        return self._request is not None

    def abandon(self) -> None:
        """Throw away what was begun, and the process with it; the next `begin` starts another."""
        process = self._process
        self._kill()
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # or it would still write into what is deleted next
                process.wait(EXIT_SECONDS)

    def _kill(self) -> None:
        self._request = None
        if self._process is not None:
            self._process.kill()
        if self._socket is not None:
            self._socket.close()
        self._process = self._socket = None

    def close(self) -> None:
        """End the process."""
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it hung up before
                self._socket.shutdown(socket.SHUT_RDWR)  # closing says nothing while a child of this process has a copy
            self._socket.close()
        if self._process is not None:
            try:
                self._process.wait(EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process = self._socket = None


def _answer(link: socket.socket, request: Request, patience: float, on_progress: Callable[[], None]) -> bytes:
    """The line that the writer answers; empty if it is gone. on_progress: called when it has got on

    Raises CheckpointError after `patience` seconds in which it got no further.
    """
    line = b""
    life, since = -1, 0.0
    link.settimeout(min(1.0, patience))
    while not line.endswith(b"\n"):
        try:
            part = link.recv(65536)
        except TimeoutError:
            if request.memory.watermark.life != life:
                life, since = request.memory.watermark.life, time.monotonic()
                on_progress()
            elif time.monotonic() - since > patience:
                raise CheckpointError(
                    f"writing {request.target} got no further for {patience:g} s (checkpoint.timeout): a stuck disk?"
                ) from None
            continue
        except OSError:
            return b""
        if not part:
            return b""
        line += part
    return line


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
