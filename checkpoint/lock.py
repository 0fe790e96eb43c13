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
HERE = "in this very process"
_locked: set[Path] = set()


class FolderLock:
    """A folder, taken for this process until `release`. A POSIX record lock: it ends with the process and works over NFS.

    Raises HeldError at once if another process of this machine holds it, and after two minutes otherwise (the time
    a file server needs to notice that a node is gone). Where the file system has no locks it warns, and holds nothing.
    """

    def __init__(self, folder: Path, name: str = LOCK, doing: str = "saving") -> None:
        """name: of the file that is locked; doing: what the run that has the folder does into it, for the message."""
        self._path = folder.resolve() / name
        if self._path in _locked:
            raise HeldError(refusal(folder, doing, HERE))
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
                holder = _written(self._file)
                if _is_here(holder) or time.monotonic() > deadline:
                    os.close(self._file)
                    raise HeldError(refusal(folder, doing, holder)) from error
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


def holder_of(folder: Path, name: str = LOCK) -> str | None:
    """Return the process of this machine that has taken a folder, or None, without taking or touching the folder.

    Of one on another machine only FolderLock can tell, which waits to see whether that node is gone.
    """
    path = folder.resolve() / name
    if path in _locked:  # to open and close the file would end this process's own lock
        return HERE
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        holder = _written(file) if error.errno in (errno.EAGAIN, errno.EACCES) else ""
        return holder if _is_here(holder) else None
    finally:
        os.close(file)
    return None


def refusal(folder: Path, doing: str, holder: str) -> str:
    """Return the message that tells why a run may not write into a folder."""
    return f"{folder}: another run is {doing} into this folder ({holder}); stop it, or give this one a folder of its own"


def _is_here(holder: str) -> bool:
    return holder.startswith(f"{socket.gethostname()} ")


def _written(file: int) -> str:
    return os.pread(file, 200, 0).decode(errors="replace").strip()
