"""The cache: folders that are built once and read by all.

Whatever is there under its name is complete: it is built in a temporary folder and renamed. Processes that start
together, on one node or on several that share the cache, let one of them build while the others wait.
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


def expand_user(written: str) -> Path:
    """A path as a user writes it, ~ being their home; that of somebody who has none here is left as it is."""
    return Path(os.path.expanduser(written))  # noqa: PTH111 (which fails for such a user)


def cache_folder(configured: str | None) -> Path:
    """`data.cache_dir`, else the environment's MESHLOOM_CACHE, else ~/.cache/meshloom."""
    return expand_user(configured or os.environ.get("MESHLOOM_CACHE") or "~/.cache/meshloom")


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def build_once(target: Path, build: Callable[[Path], None]) -> None:
    """Make sure that the folder `target` exists, calling `build(empty folder)` in one process only.

    The lock ends with the process that holds it; what a killed one left is removed by the next that builds. The file of the
    lock goes once the folder is there: whoever still waits for it, or makes it anew, finds the folder.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0.1)
    except Timeout:
        log.info("waiting for another process that builds %s", target)
        lock.acquire()
    try:
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
            Path(lock.lock_file).unlink(missing_ok=True)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    finally:
        lock.release()
