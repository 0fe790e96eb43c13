"""Bytes to a local file system so that they are still there after the power fails. No torch: the writer process uses it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import queue
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...config import cache
from ..digest import BLOCK_BYTES, leaf_digests, seal
from ..faults import reach

PAGE = 4096
CHUNK = 8 * 1024 * 1024
RENAME_EXCHANGE = 2
AT_FDCWD = -100


Ready = Callable[[int], None]


@dataclass
class Written:
    """The result of writing one rank's file: its digest, and the seconds of each phase."""

    bytes: int
    digest: str
    hashing: float
    writing: float
    direct: bool


def write_image(image: memoryview, path: Path, leaves_path: Path, ready: Ready) -> Written:
    """Write `image` to a new file and its leaves' digests beside it; both are on the disk when this returns.

    The digests are computed by a second thread while this one writes. `image` starts on a page boundary and is followed
    by readable memory up to the next page boundary, so that O_DIRECT may write whole pages; the file is cut to length.
    Where the file system refuses O_DIRECT, the same bytes go through the page cache. Both threads follow the copy into
    `image`: `ready(n)` returns when its first n bytes are in place.
    """
    outcome: queue.SimpleQueue[tuple[bytes, float] | BaseException] = queue.SimpleQueue()

    def digest() -> None:
        try:
            start = time.perf_counter()
            reach("hash.before")
            parts: list[bytes] = []
            for at in range(0, len(image), BLOCK_BYTES):
                ready(min(at + BLOCK_BYTES, len(image)))
                parts.append(leaf_digests(image[at : at + BLOCK_BYTES]))
            reach("hash.after")
            outcome.put((b"".join(parts), time.perf_counter() - start))
        except BaseException as error:
            outcome.put(error)

    hasher = threading.Thread(target=digest, name="checkpoint-hash", daemon=True)
    hasher.start()
    start = time.perf_counter()
    try:
        direct = _write_data(image, path, ready)
    finally:
        hasher.join()
    result = outcome.get()
    if isinstance(result, BaseException):
        try:
            raise result
        finally:
            del result  # or it and this frame would hold each other, and the image, until garbage is collected
    leaves, hashing = result
    beside, sealed = seal(leaves)
    write_small(leaves_path, beside, "leaves")
    sync_folder(path.parent, "data.folder")
    return Written(len(image), sealed, hashing, time.perf_counter() - start, direct)


def _write_data(image: memoryview, path: Path, ready: Ready) -> bool:
    reach("data.open.before")
    descriptor, direct = _open(path)
    try:
        size = len(image)
        padded = -(-size // PAGE) * PAGE
        whole = _extend(image, padded) if direct else image
        at = 0
        while at < len(whole):
            part = whole[at : at + CHUNK]
            ready(min(at + CHUNK, size))
            allowed = reach("data.write.before", len(part))
            try:
                done = os.pwrite(descriptor, part[:allowed], at)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                done = 0
            if done == 0 and not direct:
                raise OSError(errno.EIO, f"{path}: nothing was written at byte {at}")
            reach("data.write.after")
            at += done
            if direct and (at % PAGE or done == 0):  # refused, or a short write left the grid that O_DIRECT asks for
                direct = False
                fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
        os.ftruncate(descriptor, size)
        reach("data.fsync.before")
        os.fsync(descriptor)
        reach("data.fsync.after")
    finally:
        os.close(descriptor)
    return direct


def _open(path: Path) -> tuple[int, bool]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        try:
            return os.open(path, flags | direct, 0o644), True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    return os.open(path, flags, 0o644), False


def _extend(image: memoryview, padded: int) -> memoryview:
    """The same memory up to the next page boundary. The staging buffer behind an image always ends on one."""
    whole = memoryview(image.obj).cast("B") if isinstance(image.obj, mmap.mmap) else None
    if whole is None or len(whole) < padded:
        copy = mmap.mmap(-1, max(padded, PAGE))
        copy[: len(image)] = image
        return memoryview(copy)[:padded]
    return whole[:padded]


def write_small(path: Path, data: bytes, boundary: str) -> None:
    """Write a new small file and fsync it; the folder's entry still needs `sync_folder`."""
    reach(f"{boundary}.write.before")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        view = memoryview(data)
        while view:
            allowed = reach(f"{boundary}.write", len(view))
            done = os.write(descriptor, view[:allowed])
            if done == 0:
                raise OSError(errno.EIO, f"{path}: nothing was written")
            view = view[done:]
        reach(f"{boundary}.fsync.before")
        os.fsync(descriptor)
        reach(f"{boundary}.fsync.after")
    finally:
        os.close(descriptor)


def sync_folder(folder: Path, boundary: str) -> None:
    """Make the entries of a folder durable."""
    reach(f"{boundary}.fsync.before")
    cache.sync_folder(folder)
    reach(f"{boundary}.fsync.after")


def replace_small(path: Path, data: bytes, boundary: str) -> None:
    """Replace a small file's content in one step: whoever reads it sees the old text or the new, never a part."""
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        write_small(fresh, data, boundary)
        reach(f"{boundary}.rename.before")
        fresh.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    reach(f"{boundary}.rename.after")
    sync_folder(path.parent, boundary + ".folder")


def move_into_place(fresh: Path, final: Path) -> Path | None:
    """Give a finished folder its final name, in one step even where that name is taken.

    Returns where the folder that had the name before is now, or None.
    """
    reach("commit.rename.before")
    replaced: Path | None = None
    try:
        _rename_new(fresh, final)
    except FileExistsError:
        replaced = final.with_name(f"{final.name}.replaced-{uuid.uuid4().hex[:8]}")
        if _exchange(fresh, final):
            fresh.rename(replaced)
        else:  # a file system without an atomic exchange: for an instant neither has the name, but both are complete
            final.rename(replaced)
            reach("commit.rename.between")
            fresh.rename(final)
    reach("commit.rename.after")
    return replaced


def _rename_new(fresh: Path, final: Path) -> None:
    if final.exists():
        raise FileExistsError(errno.EEXIST, "exists", str(final))
    fresh.rename(final)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically; False where the system can't."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0


def hide_folder(folder: Path, boundary: str) -> Path:
    """Take a step's name away before it is deleted, so that a crash half-way leaves no half folder under a good name."""
    reach(f"{boundary}.rename.before")
    hidden = folder.with_name(f"{folder.name}.deleted-{uuid.uuid4().hex[:8]}")
    folder.rename(hidden)
    reach(f"{boundary}.rename.after")
    return hidden


def delete_folder(folder: Path, boundary: str) -> None:
    """Delete a folder that has no step's name, or has it no more."""
    reach(f"{boundary}.before")
    shutil.rmtree(folder)
    reach(f"{boundary}.after")
