"""Bytes to a local file system so that they are still there after the power fails. No torch: the writer process uses it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import uuid
from pathlib import Path

from ...config import cache
from ..faults import reach

RENAME_EXCHANGE = 2
AT_FDCWD = -100


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
