"""The process that writes: it gets a piece of shared memory and a name, and answers when the bytes are on the disk.

One per rank, started as a program of its own that imports no torch and takes part in no process group. A request is one
line of JSON over a socket; new shared memory comes along as a file descriptor.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import CheckpointError
from .disk import Ready, Written, write_image
from .remote_write import write_image_remote
from .watermark import Watermark

# While a save is hashed the thread that feeds the disk must not wait for the interpreter: a write takes 2 ms or so.
SWITCH_SECONDS = 0.0002


class SharedMemory(Protocol):
    """The part of an arena that the writer needs."""

    descriptor: int
    size: int
    watermark: Watermark

    def image(self, size: int) -> memoryview:
        """The first bytes of the memory."""
        ...


@dataclass(frozen=True)
class Request:
    """Make files `name` and `leaves` in `folder` (a path or URL) out of the first `size` bytes of an arena."""

    memory: SharedMemory
    size: int
    folder: str
    name: str
    leaves: str


class Writer(Protocol):
    """Makes files out of arenas, one after the other."""

    def begin(self, request: Request) -> None:
        """Start; the writing follows the arena's watermark. Every `begin` needs an `end`."""
        ...

    def end(self) -> Written:
        """Return when everything is durable. Raises OSError or CheckpointError."""
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
        self._thread: threading.Thread | None = None
        self._outcome: Written | BaseException | None = None
        self._interval = 0.0

    def begin(self, request: Request) -> None:
        """See Writer."""

        def ready(value: int) -> None:
            request.memory.watermark.wait(value, lambda: True)

        def write() -> None:
            image = request.memory.image(request.size)
            try:
                self._outcome = write_anywhere(image, request.folder, request.name, request.leaves, ready)
            except BaseException as error:
                self._outcome = error

        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        self._thread = threading.Thread(target=write, name="checkpoint-write", daemon=True)
        self._thread.start()

    def end(self) -> Written:
        """See Writer."""
        assert self._thread is not None
        self._thread.join()
        sys.setswitchinterval(self._interval)
        outcome = self._outcome
        if isinstance(outcome, BaseException):
            raise outcome
        assert outcome is not None
        return outcome

    def close(self) -> None:
        """See Writer."""


class ProcessWriter:
    """Writes in a process of its own, so that neither the interpreter lock nor a crash of the trainer is in the way."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._known: dict[int, int] = {}
        self._target = ""
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
        self._known = {}

    def begin(self, request: Request) -> None:
        """See Writer."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._socket is not None
        self._target = f"{request.folder}/{request.name}"
        memory = request.memory
        inode = os.fstat(memory.descriptor).st_ino
        fresh = self._known.get(memory.descriptor) != inode
        message = {
            "memory": memory.descriptor,
            "length": memory.size if fresh else 0,
            "size": request.size,
            "folder": request.folder,
            "name": request.name,
            "leaves": request.leaves,
        }
        try:
            socket.send_fds(self._socket, [json.dumps(message).encode() + b"\n"], [memory.descriptor] if fresh else [])
        except OSError:  # it died just now: `end` says how
            return
        self._known[memory.descriptor] = inode

    def end(self) -> Written:
        """See Writer."""
        assert self._socket is not None and self._process is not None
        try:
            answer = read_line(self._socket)
        except OSError:
            answer = b""
        if not answer:
            code = self._process.wait()
            self._socket.close()
            raise CheckpointError(f"the writer process died ({_how(code)}) while writing {self._target}")
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
