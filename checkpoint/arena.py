"""Reused shared memory in which a rank's file is put together before, and while, it is written."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch

from .dtypes import TORCH_DTYPES
from .errors import CheckpointError
from .plan import FileLayout
from .watermark import TRAILER, Watermark

HUGE_PAGE = 2 * 1024 * 1024


class Arena:
    """One mapping of anonymous shared memory that the writer process maps too, by its descriptor.

    A page at the end says how much of the file is in place, so that the writer can follow the copy.
    """

    def __init__(self, size: int, pin: bool) -> None:
        self.size = rounded(size)
        self.descriptor = os.memfd_create("meshloom-checkpoint", os.MFD_CLOEXEC)
        os.posix_fallocate(self.descriptor, 0, self.size)  # a shortage of memory shows here, not as SIGBUS in the copy
        self.memory = mmap.mmap(self.descriptor, self.size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        with contextlib.suppress(OSError):  # where the system allows it for shared memory
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.watermark = Watermark(memoryview(self.memory))
        self._pinned = False
        if pin:
            self._pin()
        self._layout: FileLayout | None = None
        self._views: list[torch.Tensor] = []

    def _pin(self) -> None:
        """Lock the pages for the GPU's copy engines; without it copies would block the thread that asks for them."""
        error = _cuda().cudaHostRegister(self._address(), self.size, 1)  # 1: for all of the process's devices
        if int(error) != 0:
            raise CheckpointError(f"pinning {self.size} bytes of memory failed ({error}); lower checkpoint.host_memory_gib")
        self._pinned = True

    def _address(self) -> int:
        return torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr()

    def views(self, layout: FileLayout) -> list[torch.Tensor]:
        """One tensor per piece, in the memory where the file's bytes are put together; the header is in place."""
        if layout is not self._layout:
            self.memory[: len(layout.header)] = layout.header
            self._views = [
                torch.frombuffer(
                    self.memory,
                    dtype=TORCH_DTYPES[placed.dtype],
                    count=placed.box.numel,
                    offset=placed.start,
                ).view(placed.box.shape)
                for placed in layout.placed
            ]
            self._layout = layout
        return self._views

    def image(self, size: int) -> memoryview:
        """The first `size` bytes."""
        return memoryview(self.memory)[:size]

    def close(self) -> None:
        """Give the memory back."""
        if self._pinned:
            _cuda().cudaHostUnregister(self._address())
        self._views = []
        os.close(self.descriptor)


@dataclass
class ArenaPool:
    """At most `limit` bytes of arenas (None: room for `count`), lent one at a time and reused.

    pin: lock new arenas for the GPU's copy engines.
    """

    limit: int | None
    count: int = 2
    pin: bool = False

    def __post_init__(self) -> None:
        self._free: list[Arena] = []
        self._lent: list[Arena] = []
        self._holders: dict[int, int] = {}
        self._changed = threading.Condition()

    @property
    def bytes(self) -> int:
        """Host memory taken now."""
        return sum(arena.size for arena in [*self._free, *self._lent])

    def reserve(self, size: int) -> None:
        """Make the arenas that saves of this size will use now, as many as the limit allows."""
        arenas = [self.lend(size, 0.0)]
        while len(arenas) < self.count and self.has_room(size):
            arenas.append(self.lend(size, 0.0))
        for arena in arenas:
            self.take_back(arena)

    def has_room(self, size: int) -> bool:
        """Whether an arena of this size could be lent at once."""
        with self._changed:
            return self._fits(size)

    def lend(self, size: int, timeout: float) -> Arena:
        """An arena of at least this size; waits for one to come back. Raises CheckpointError if it never can fit."""
        if self.limit is not None and rounded(size) > self.limit:
            raise CheckpointError(
                f"a snapshot takes {rounded(size) / 2**30:.3f} GiB of host memory, more than checkpoint.host_memory_gib="
                f"{self.limit / 2**30:.3f}; raise it"
            )
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self._fits(size):
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise CheckpointError(f"no snapshot memory became free within {timeout:g} s: the disk is too slow or stuck")
            arena = next((arena for arena in self._free if arena.size >= rounded(size)), None)
            if arena is not None:
                self._free.remove(arena)
            else:
                for outgrown in [arena for arena in self._free if arena.size < rounded(size)]:
                    self._free.remove(outgrown)
                    outgrown.close()
                arena = Arena(size, self.pin)
            self._lent.append(arena)
            self._holders[id(arena)] = 1
            return arena

    def share(self, arena: Arena) -> None:
        """One more holder of a loan; it ends when all have given it back."""
        with self._changed:
            self._holders[id(arena)] += 1

    def take_back(self, arena: Arena) -> None:
        """A holder's end of a loan."""
        with self._changed:
            self._holders[id(arena)] -= 1
            if self._holders[id(arena)]:
                return
            self._lent.remove(arena)
            self._free.append(arena)
            self._changed.notify_all()

    def close(self) -> None:
        """Give all memory back; nothing may be lent any more."""
        with self._changed:
            for arena in self._free:
                arena.close()
            self._free.clear()

    def _fits(self, size: int) -> bool:
        if any(arena.size >= rounded(size) for arena in self._free):
            return True
        lent = sum(arena.size for arena in self._lent)
        return len(self._lent) < self.count if self.limit is None else lent + rounded(size) <= self.limit


def _cuda() -> Any:
    """The CUDA runtime's own functions."""
    return torch.cuda.cudart()


def rounded(size: int) -> int:
    """The memory that an arena for so many bytes takes: with its trailer, in whole pages of either kind."""
    return -(-(size + TRAILER) // HUGE_PAGE) * HUGE_PAGE
