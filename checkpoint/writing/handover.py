"""Shared memory handed to another process, once, over a socket: afterwards a number says which is meant. No torch."""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import socket
import weakref
from typing import Any, Protocol

from .watermark import Watermark

LINE_BYTES = 1 << 20


class SharedMemory(Protocol):
    """The part of a staging buffer that other processes need."""

    descriptor: int
    size: int
    watermark: Watermark

    def image(self, size: int) -> memoryview:
        """The first bytes of the memory."""
        ...


class Giver:
    """This end of the socket: sends requests about pieces of memory, and with the first about each its descriptor."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._numbers: weakref.WeakKeyDictionary[SharedMemory, int] = weakref.WeakKeyDictionary()
        self._count = itertools.count()

    def send(self, request: dict[str, Any], memory: SharedMemory) -> None:
        """Raises OSError if the other process is gone."""
        fresh = memory not in self._numbers
        if fresh:
            self._numbers[memory] = next(self._count)
        about = {"memory": self._numbers[memory], "length": memory.size, "alive": sorted(self._numbers.values())}
        socket.send_fds(self._link, [json.dumps(request | about).encode() + b"\n"], [memory.descriptor] if fresh else [])


class Taker:
    """The other end: maps what comes, and lets go of what the giver has no more."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._mapped: dict[int, mmap.mmap] = {}

    def receive(self) -> dict[str, Any]:
        """The next request. Raises ConnectionError when the giver is gone."""
        line, descriptors, _, _ = socket.recv_fds(self._link, LINE_BYTES, 1)
        with contextlib.ExitStack() as stack:
            for descriptor in descriptors:
                stack.callback(os.close, descriptor)
            while not line.endswith(b"\n"):
                part = self._link.recv(LINE_BYTES) if line else b""
                if not part:
                    raise ConnectionError("the trainer is gone")
                line += part
            request: dict[str, Any] = json.loads(line)
            for number in set(self._mapped).difference(request.get("alive", self._mapped)):
                del self._mapped[number]
            for descriptor in descriptors:
                self._mapped[request["memory"]] = mmap.mmap(descriptor, request["length"])
        return request

    def memory(self, request: dict[str, Any]) -> memoryview:
        """All of the memory that a request is about."""
        return memoryview(self._mapped[request["memory"]])
