"""The process that writes: it gets a piece of shared memory and a name, and answers when the bytes are on the disk.

One per rank, started as a program of its own that imports no torch and takes part in no process group. A request is one
line of JSON over a socket; new shared memory comes along as a file descriptor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from ..errors import CheckpointError
from .disk import Ready, Written, write_image
from .handover import Giver, SharedMemory
from .remote_write import write_image_remote

# While a save is hashed the thread that feeds the disk must not wait for the interpreter: a write takes 2 ms or so.
SWITCH_SECONDS = 0.0002
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


class Writer(Protocol):
    """Makes files out of arenas, one after the other."""

    def begin(self, request: Request) -> None:
        """Start; the writing follows the arena's watermark. Every `begin` needs an `end`."""
        ...

    def end(self, patience: float) -> Written:
        """Return when everything is durable. Raises OSError or CheckpointError, also after so many seconds without a step."""
        ...

    def close(self) -> None:
        """End the process, if there is one."""
        ...


def write_anywhere(image: memoryview, folder: str, name: str, leaves: str, ready: Ready) -> Written:
    """Write to a local folder or an fsspec URL."""
    if "://" in folder:
        return write_image_remote(image, folder, name, leaves, ready)
    return write_image(image, Path(folder) / name, Path(folder) / leaves, ready)


class ThreadWriter:
    """Writes in a thread of this process: for the synchronous mode, where training waits anyway."""

    def __init__(self) -> None:
        self._request: Request | None = None
        self._outcome: queue.SimpleQueue[Written | BaseException] = queue.SimpleQueue()
        self._interval = 0.0

    def begin(self, request: Request) -> None:
        """See Writer."""

        outcome = self._outcome = queue.SimpleQueue()  # its own: a thread that was given up may still come to its end

        def ready(value: int) -> None:
            request.memory.watermark.wait(value, lambda: True)

        def write() -> None:
            image = request.memory.image(request.size)
            try:
                outcome.put(write_anywhere(image, request.folder, request.name, request.leaves, ready))
            except BaseException as error:
                outcome.put(error)

        self._request = request
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        threading.Thread(target=write, name="checkpoint-write", daemon=True).start()

    def end(self, patience: float) -> Written:
        """See Writer."""
        assert self._request is not None

        def look(seconds: float) -> Written | BaseException | None:
            with contextlib.suppress(queue.Empty):
                return self._outcome.get(timeout=seconds)
            return None

        try:
            outcome = _await(self._request, look, patience)
        finally:
            sys.setswitchinterval(self._interval)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def close(self) -> None:
        """See Writer."""


class ProcessWriter:
    """Writes in a process of its own, so that neither the interpreter lock nor a crash of the trainer is in the way."""

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
        """See Writer."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._giver is not None
        self._request = request
        what = {"size": request.size, "folder": request.folder, "name": request.name, "leaves": request.leaves}
        with contextlib.suppress(OSError):  # it died just now: `end` says how
            self._giver.send(what, request.memory)

    def end(self, patience: float) -> Written:
        """See Writer. A process that gets no further is killed; the next `begin` starts another."""
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
        """See Writer."""
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


def answer_of(written: Written) -> bytes:
    """A reply as a line."""
    return json.dumps(dataclasses.asdict(written)).encode() + b"\n"
