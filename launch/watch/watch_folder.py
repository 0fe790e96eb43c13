"""The watch folder: in memory where the machine has /dev/shm, and held by a lock as long as its launcher lives.

A launcher that is killed can't remove its folder. The next one on the machine does: a folder whose lock nobody holds is left
over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "meshloom-watch-"
LOCK = "lock"
YOUNG_SECONDS = 60.0
"""A folder without a lock file may be one that another launcher is just making."""


class WatchFolder:
    """A new folder, until `remove`. The system gives its lock back when this process ends, however."""

    def __init__(self, parent: Path | None = None) -> None:
        """parent: default /dev/shm, or where temporary files go if that can't be written to."""
        shared = Path("/dev/shm")
        parent = parent or (shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir()))
        remove_left_over(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        """Remove the folder, and give the lock back."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_left_over(parent: Path) -> None:
    """Remove the watch folders in `parent` whose launchers are gone. Those of other users stay."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid() and not folder.is_symlink() and _is_left_over(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_left_over(folder: Path) -> bool:
    """Return whether nobody holds the lock of a folder. Raises OSError where that can't be told."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return time.time() - folder.stat().st_mtime > YOUNG_SECONDS
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
