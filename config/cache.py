"""The cache: folders that one process builds and all read.

A folder in the cache is complete: it is built under a temporary name and renamed. Of processes that start together, on one
node or on several that share the cache, one builds while the others wait.
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


def expand_user(written: str) -> Path:
    """Expand ~ in a path. Without a known home folder the path stays as it is."""
    return Path(os.path.expanduser(written))  # noqa: PTH111 (Path.expanduser fails without a home)


def cache_folder(configured: str | None) -> Path:
    """Return the cache folder: `configured` (data.cache_dir), else $MESHLOOM_CACHE, else ~/.cache/meshloom."""
    return expand_user(configured or os.environ.get("MESHLOOM_CACHE") or "~/.cache/meshloom")


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(target: Path, doing: str) -> Generator[None]:
    """Hold the lock beside a place in the cache, so that one process of several makes it. doing: what that process does.

    The lock is released when its process ends. Its file is removed once `target` exists: a process that still waits for the
    lock, or creates it again, then finds the target.
    """
    from filelock import FileLock, Timeout

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0.1)
    except Timeout:
        log.info("waiting for another process that %s", doing)
        lock.acquire()
    try:
        yield
    finally:
        try:
            if target.exists():
                Path(lock.lock_file).unlink(missing_ok=True)
        finally:
            lock.release()


def build_once(target: Path, build: Callable[[Path], None]) -> None:
    """Make sure that the folder `target` exists, calling `build(empty folder)` in one process only.

    What a killed process left is removed by the next that builds.
    """
    if target.exists():
        return
    with locked(target, f"builds {target}"):
        if target.exists():
            return
        for left in target.parent.glob(f".{glob.escape(target.name)}.building-*"):
            shutil.rmtree(left, ignore_errors=True)
        building = target.with_name(f".{target.name}.building-{uuid.uuid4().hex[:12]}")
        building.mkdir()
        try:
            build(building)
            sync_folder(building)
            building.rename(target)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(building, ignore_errors=True)
