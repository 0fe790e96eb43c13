"""Reused shared memory in which a rank's file is put together before, and while, it is written."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..dtypes import TORCH_DTYPES
from ..errors import CheckpointError
from ..planning.plan import FileLayout
from ..writing.watermark import Watermark
from .staging_size import HUGE_PAGE, rounded

log = logging.getLogger(__name__)

POPULATE_WRITE = 23  # madvise: make the pages now, or say that there are none left (Linux 5.14)
SLICE_BYTES = 512 * 2**20  # the least that is worth a thread of its own


class StagingBuffer:
    """One mapping of anonymous shared memory that the writer process maps too, by its descriptor.

    A page at the end says how much of the file is in place, so that the writer can follow the copy.
    folder: where a file without a name takes the place of memory (`checkpoint.snapshot_folder`); it is never pinned.
    """

    def __init__(self, size: int, pin: bool, folder: str | None = None) -> None:
        self.size = rounded(size)
        if folder is None:
            self.descriptor = os.memfd_create("meshloom-checkpoint", os.MFD_CLOEXEC)
            os.ftruncate(self.descriptor, self.size)
        else:
            self.descriptor = _nameless_file(folder, self.size)
            pin = False
        with contextlib.ExitStack() as failed:  # or the pages that there were would stay taken
            failed.callback(os.close, self.descriptor)
            self.memory = mmap.mmap(self.descriptor, self.size, mmap.MAP_SHARED)
            failed.callback(self.memory.close)
            if folder is None:
                with contextlib.suppress(OSError):  # where the system allows it for shared memory
                    self.memory.madvise(mmap.MADV_HUGEPAGE)
                self._populate()
            failed.pop_all()
        self.watermark = Watermark(memoryview(self.memory))
        self._pinned = False
        if pin:
            self._pin()
        self._layout: FileLayout | None = None
        self._views: list[torch.Tensor] = []

    def _populate(self) -> None:
        """Make all pages now, many at once: a shortage of memory must show here, not as SIGBUS in the copy."""
        threads = max(1, min(len(os.sched_getaffinity(0)), self.size // SLICE_BYTES))
        step = -(-self.size // threads // HUGE_PAGE) * HUGE_PAGE
        address = self._address()
        libc = ctypes.CDLL(None, use_errno=True)

        def make(at: int) -> int:
            length = min(step, self.size - at)
            failed = libc.madvise(ctypes.c_void_p(address + at), ctypes.c_size_t(length), POPULATE_WRITE)
            return ctypes.get_errno() if failed else 0

        with ThreadPoolExecutor(threads) as pool:
            faults = [code for code in pool.map(make, range(0, self.size, step)) if code]
        if errno.EINVAL in faults:  # an older kernel: one thread, and no more than that
            os.posix_fallocate(self.descriptor, 0, self.size)
        elif faults:
            raise CheckpointError(f"{self.size / 2**30:.3f} GiB of memory for a snapshot: {os.strerror(faults[0])}")

    def _pin(self) -> None:
        """Lock the pages for the GPU's copy engines.

        Where that is refused (a limit of the system) snapshots are slower, since every copy goes through the driver's own
        buffers, but right all the same.
        """
        device = torch.cuda.current_device()

        def register() -> int:
            torch.cuda.set_device(device)  # a new thread begins on device 0
            return int(_cuda().cudaHostRegister(self._address(), self.size, 1))  # 1: for all of the process's devices

        with ThreadPoolExecutor(1) as pool:  # CUDA keeps a failure as the last error of its thread; here it ends with it
            code = pool.submit(register).result()
        self._pinned = code == 0
        if code:
            log.warning(
                "page-locking %.3f GiB for snapshots failed (CUDA error %d): they will be copied more slowly; fewer or smaller "
                "ones (checkpoint.host_memory_gib) may fit",
                self.size / 2**30,
                code,
            )

    def _address(self) -> int:
        return torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr()

    def views(self, layout: FileLayout) -> list[torch.Tensor]:
        """One tensor per copy, shaped (panels, *one panel's shape), in the file being put together, header included."""
        if layout is not self._layout:
            self.memory[: len(layout.header)] = layout.header
            self._views = [
                torch.frombuffer(
                    self.memory,
                    dtype=TORCH_DTYPES[copy.dtype],
                    count=copy.box.numel,
                    offset=copy.start,
                ).view(copy.panels, *copy.box.shape[:-1], *(extent // copy.panels for extent in copy.box.shape[-1:]))
                for copy in layout.copies
            ]
            self._layout = layout
        return self._views

    def image(self, size: int) -> memoryview:
        """The first `size` bytes."""
        return memoryview(self.memory)[:size]

    def close(self) -> None:
        """Give the memory back, whoever still has this object. No copy into it may be under way.

        Tensors of it point to nothing afterwards; what is looked at as bytes stays until nobody does.
        """
        if self._pinned:
            self._pinned = False
            code = int(_cuda().cudaHostUnregister(self._address()))
            if code:
                log.warning("memory of snapshots could not be unlocked (CUDA error %d)", code)
        self._views = []
        self._layout = None
        self.watermark.release()
        try:
            self.memory.close()
        except BufferError:  # the traceback of something that failed, say, holds a view of it
            log.warning("%.3f GiB of memory for snapshots are given back only when nobody looks at them", self.size / 2**30)
        os.close(self.descriptor)


@dataclass
class StagingPool:
    """At most `limit` bytes of staging buffers (None: room for `count`), lent one at a time and reused.

    least: how many must find room beside each other for saves to get on. pin: lock new buffers for the GPU's copy engines.
    folder: of their files, where they are not to be in memory.
    """

    limit: int | None
    count: int = 2
    least: int = 1
    pin: bool = False
    folder: str | None = None

    def __post_init__(self) -> None:
        self._free: list[StagingBuffer] = []
        self._lent: list[StagingBuffer] = []
        self._holders: dict[int, int] = {}
        self._changed = threading.Condition()

    @property
    def bytes(self) -> int:
        """Host memory taken now."""
        return sum(buffer.size for buffer in [*self._free, *self._lent])

    def reserve(self, size: int) -> None:
        """Make the staging buffers that saves of this size will use now, as many as the limit allows."""
        buffers = [self.lend(size, 0.0)]
        while len(buffers) < self.count and self.has_room(size):
            buffers.append(self.lend(size, 0.0))
        for buffer in buffers:
            self.take_back(buffer)

    def has_room(self, size: int) -> bool:
        """Return whether a staging buffer of this size could be lent at once."""
        with self._changed:
            return self._fits(size)

    def lend(self, size: int, timeout: float) -> StagingBuffer:
        """A staging buffer of at least this size; waits for one to come back. Raises CheckpointError if it never can fit."""
        if self.limit is not None and self.least * rounded(size) > self.limit:
            what = "a snapshot takes" if self.least == 1 else f"{self.least} snapshots (checkpoint.memory_every keeps one) take"
            raise CheckpointError(
                f"{what} {self.least * rounded(size) / 2**30:.3f} GiB of host memory, more than checkpoint.host_memory_gib="
                f"{self.limit / 2**30:.3f}; raise it"
            )
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self._fits(size):
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise CheckpointError(
                        f"no snapshot memory became free within {timeout:g} s (checkpoint.timeout): the disk is too slow or "
                        "stuck; save less often (checkpoint.every), or give more memory (checkpoint.host_memory_gib)"
                    )
            buffer = next((buffer for buffer in self._free if buffer.size >= rounded(size)), None)
            if buffer is not None:
                self._free.remove(buffer)
            else:
                self._drop_free()  # before the new one is made: the limit is for both
                buffer = StagingBuffer(size, self.pin, self.folder)
            self._lent.append(buffer)
            self._holders[id(buffer)] = 1
            return buffer

    def share(self, buffer: StagingBuffer) -> None:
        """One more holder of a loan; it ends when all have given it back."""
        with self._changed:
            self._holders[id(buffer)] += 1

    def take_back(self, buffer: StagingBuffer) -> None:
        """A holder's end of a loan."""
        with self._changed:
            self._holders[id(buffer)] -= 1
            if self._holders[id(buffer)]:
                return
            self._lent.remove(buffer)
            self._free.append(buffer)
            self._changed.notify_all()

    def close(self) -> None:
        """Give all memory back; nothing may be lent any more."""
        with self._changed:
            self._drop_free()

    def _drop_free(self) -> None:
        while self._free:
            self._free.pop().close()

    def _fits(self, size: int) -> bool:
        if any(buffer.size >= rounded(size) for buffer in self._free):
            return True
        lent = sum(buffer.size for buffer in self._lent)
        return len(self._lent) < self.count if self.limit is None else lent + rounded(size) <= self.limit


def _nameless_file(folder: str, size: int) -> int:
    """The descriptor of a file of this size, all of its room taken, that is gone when it is closed."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return os.dup(file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"{size / 2**30:.3f} GiB for a snapshot in checkpoint.snapshot_folder={folder}: {error}"
        ) from error


def _cuda() -> Any:
    """The CUDA runtime's own functions."""
    return torch.cuda.cudart()
