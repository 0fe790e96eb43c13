"""A rank's data to a local file system: as a file with its digests beside it, or as a segment of the file of its host.

No torch: the writer process uses it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..digest import BLOCK_BYTES, leaf_digests, seal
from ..faults import reach
from ..stored_file import segment_end
from .disk import sync_folder, write_small

PAGE = 4096
CHUNK = 8 * 1024 * 1024


Ready = Callable[[int], None]


@dataclass
class Written:
    """The result of writing one rank's data: their digest, and the seconds of each phase.

    start    byte of the file from which they were written on
    created  this writer has created the file
    """

    bytes: int
    digest: str
    hashing: float
    writing: float
    direct: bool
    start: int = 0
    created: bool = True


def write_image(image: memoryview, path: Path, leaves_path: Path, ready: Ready) -> Written:
    """Write `image` to a new file and its leaves' digests beside it; both are on the disk when this returns.

    The digests are computed by a second thread while this one writes. `image` starts on a page boundary and is followed
    by readable memory up to the next page boundary, so that O_DIRECT may write whole pages; the file is cut to length.
    Where the file system refuses O_DIRECT, the same bytes go through the page cache. Both threads follow the copy into
    `image`: `ready(n)` returns when its first n bytes are in place.
    """
    hashing = _Hashing(image, ready)
    start = time.perf_counter()
    try:
        with _PagedFile(path, shared=False) as file:
            size = len(image)
            whole = _extend(image, -(-size // PAGE) * PAGE) if file.direct else image
            file.write(whole, 0, lambda count: ready(min(count, size)))
            file.cut(size)
            file.sync()
    finally:
        hashing.join()
    beside, sealed = seal(hashing.leaves())
    write_small(leaves_path, beside, "leaves")
    sync_folder(path.parent, "data.folder")
    return Written(len(image), sealed, hashing.seconds, time.perf_counter() - start, file.direct)


def write_segment(image: memoryview, path: Path, start: int, ready: Ready) -> Written:
    """Write `image` and its leaves' digests into a file from byte `start` on; they are on the disk when this returns.

    Other processes write other segments of the file at the same time, and whoever comes first creates it. No two write to
    the same page: a segment begins on a page, and zeros fill its last one. For the rest see `write_image`.
    """
    hashing = _Hashing(image, ready)
    began = time.perf_counter()
    try:
        with _PagedFile(path, shared=True) as file:
            whole, stop = len(image) // PAGE * PAGE, segment_end(start, len(image))
            file.allocate(start, stop - start)
            file.write(image[:whole], start, ready)
            hashing.join()
            digests, sealed = seal(hashing.leaves())
            tail = mmap.mmap(-1, stop - start - whole)  # O_DIRECT asks for memory that begins on a page
            tail.write(image[whole:])
            tail.write(digests)
            file.write(memoryview(tail), start + whole, lambda _: None)
            file.sync()
    finally:
        hashing.join()
    sync_folder(path.parent, "data.folder")
    seconds = time.perf_counter() - began
    return Written(len(image), sealed, hashing.seconds, seconds, file.direct, start, file.created)


class _Hashing:
    """A thread that computes the digests of an image's leaves while the image comes into place."""

    def __init__(self, image: memoryview, ready: Ready) -> None:
        self.seconds = 0.0
        self._image, self._ready = image, ready
        self._outcome: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="checkpoint-hash", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        image = self._image
        try:
            start = time.perf_counter()
            reach("hash.before")
            parts: list[bytes] = []
            for at in range(0, len(image), BLOCK_BYTES):
                self._ready(min(at + BLOCK_BYTES, len(image)))
                parts.append(leaf_digests(image[at : at + BLOCK_BYTES]))
            reach("hash.after")
            self.seconds = time.perf_counter() - start
            self._outcome.put(b"".join(parts))
        except BaseException as error:
            self._outcome.put(error)

    def join(self) -> None:
        """Wait for the end of the thread, whatever it is."""
        self._thread.join()

    def leaves(self) -> bytes:
        """Return the digests, once, after `join`. Raises what has gone wrong in the thread."""
        result = self._outcome.get()
        if not isinstance(result, BaseException):
            return result
        try:
            raise result
        finally:
            del result  # or it and this frame would hold each other, and the image, until garbage is collected


class _PagedFile:
    """An open file that is written by whole pages past the page cache, where the file system can do that.

    shared   others may have created it, and write elsewhere in it
    direct   the page cache is still not in use
    created  it was not there before
    """

    def __init__(self, path: Path, *, shared: bool) -> None:
        reach("data.open.before")
        self._path = path
        self.created = not shared or _create(path)
        self._descriptor, self.direct = _open(path, os.O_WRONLY if shared else os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def __enter__(self) -> _PagedFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def allocate(self, start: int, length: int) -> None:
        """Ask for room at once, where the file system can give it: ranks that let one file grow wait for each other."""
        allocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)  # os.posix_fallocate would write instead
        offsets = ctypes.c_int64(start), ctypes.c_int64(length)
        if allocate is None or allocate(self._descriptor, 0, *offsets) == 0:
            return
        error = ctypes.get_errno()
        if error in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise OSError(error, os.strerror(error), str(self._path))

    def write(self, data: memoryview, start: int, ready: Ready) -> None:
        """Write all of `data` from byte `start` on, a page's first, as far as `ready` says that it is in place."""
        at = 0
        while at < len(data):
            part = data[at : at + CHUNK]
            ready(at + len(part))
            allowed = reach("data.write.before", len(part))
            try:
                done = os.pwrite(self._descriptor, part[:allowed], start + at)
            except OSError as error:
                if not self.direct or error.errno != errno.EINVAL:
                    raise
                done = 0
            if done == 0 and not self.direct:
                raise OSError(errno.EIO, f"{self._path}: nothing was written at byte {start + at}")
            reach("data.write.after")
            at += done
            if self.direct and (at % PAGE or done == 0):  # refused, or a short write left the grid that O_DIRECT asks for
                self.direct = False
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)

    def cut(self, size: int) -> None:
        """Cut the file to so many bytes."""
        os.ftruncate(self._descriptor, size)

    def sync(self) -> None:
        """Make what was written durable; the folder's entry still needs `sync_folder`."""
        reach("data.fsync.before")
        os.fsync(self._descriptor)
        reach("data.fsync.after")


def _create(path: Path) -> bool:
    """Create a file, unless it is there; return whether it was not. Of several writers one alone is told so."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    except FileExistsError:
        return False
    return True


def _open(path: Path, flags: int) -> tuple[int, bool]:
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        try:
            return os.open(path, flags | direct, 0o644), True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
            if flags & os.O_CREAT:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
    return os.open(path, flags, 0o644), False


def _extend(image: memoryview, padded: int) -> memoryview:
    """The same memory up to the next page boundary. The staging buffer behind an image always ends on one."""
    return memoryview(image.obj).cast("B")[:padded]
