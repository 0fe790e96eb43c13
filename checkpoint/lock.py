"""A folder that one run at a time writes into."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from .errors import HeldError

log = logging.getLogger(__name__)

LOCK = ".lock"
LOCK_SECONDS = 120.0
_locked: set[Path] = set()


class FolderLock:
    """A folder, taken for this process until `release`. A POSIX record lock: it ends with the process and works over NFS.

    Raises HeldError at once if another process of this machine holds it, and after two minutes otherwise (the time
    a file server needs to notice that a node is gone). Where the file system has no locks it warns, and holds nothing.
    """

    def __init__(self, folder: Path, name: str = LOCK, doing: str = "saving") -> None:
        """name: of the file that is locked; doing: what the run that has the folder does into it, for the message."""
        self._path = folder.resolve() / name
        problem = f"{folder}: another run is {doing} into this folder"
        fix = "stop it, or give this one a folder of its own"
        if self._path in _locked:
            raise HeldError(f"{problem} (in this very process); {fix}")
        self._file: int | None = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    log.warning(
                        "%s: this file system has no locks (%s); see to it that no other run uses the folder", folder, error
                    )
                    break
                holder = os.pread(self._file, 200, 0).decode(errors="replace").strip()
                if holder.startswith(f"{socket.gethostname()} ") or time.monotonic() > deadline:
                    os.close(self._file)
                    raise HeldError(f"{problem} ({holder}); {fix}") from error
                time.sleep(1.0)
        with contextlib.suppress(OSError):  # a full disk: who holds the lock can't be told then, but it is held
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{socket.gethostname()} process {os.getpid()}".encode(), 0)
        _locked.add(self._path)

    def release(self) -> None:
        """Let another run have the folder. May be called twice."""
        if self._file is not None:
            _locked.discard(self._path)
            os.close(self._file)
            self._file = None
