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
from .fence import follows, name_of_process, precedes

log = logging.getLogger(__name__)

LOCK = ".lock"
LOCK_SECONDS = 120.0
SILENT_SECONDS = 5.0
"""Time after which who waits for the folder is told so."""
HERE = "in this very process"
TAKEN = (errno.EAGAIN, errno.EACCES)
_locked: set[Path] = set()


class FolderLock:
    """A folder, taken for this process until `release`. A POSIX record lock: it ends with the process and works over NFS.

    Raises HeldError at once if another process of this machine holds it, and after two minutes otherwise (the time
    a file server needs to notice that a node is gone). Where the file system has no locks it warns, and holds nothing.

    A later start of the same launch (`fence.py`) takes the folder from an earlier one at once: it puts a lock file of its own
    in the place of the other's, which finds that out by `check`.
    """

    def __init__(self, folder: Path, name: str = LOCK, doing: str = "saving") -> None:
        """name: of the file that is locked; doing: what the run that has the folder does into it, for the message."""
        self._folder, self._doing = folder, doing
        self._path = folder.resolve() / name
        if self._path in _locked:
            raise HeldError(refusal(folder, doing, HERE))
        self._file: int | None = self._take()
        _locked.add(self._path)

    def check(self) -> None:
        """Raises HeldError if a later start of the run has taken the folder, OSError if that can't be told."""
        if self._file is None:
            return
        if self._is_in_place(self._file):
            holder = _written(self._file)  # a file server gives the lock of a machine that it hears nothing from to another
            if not precedes(holder):
                return
        elif not self._path.exists():
            return
        else:
            holder = self._path.read_text(errors="replace").strip()
        if follows(holder):  # an earlier start has put its file here, as late as it took the folder from one before it
            file = self._replace(holder)
            os.close(self._file)
            self._file = file
            return
        raise HeldError(self._overtaken(holder))

    def release(self) -> None:
        """Let another run have the folder. May be called twice."""
        if self._file is not None:
            _locked.discard(self._path)
            os.close(self._file)
            self._file = None

    def _take(self) -> int:
        """Lock the file, and return its descriptor."""
        began = time.monotonic()
        told = False
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = self._refuse_later(file)
                if follows(holder):
                    os.close(file)
                    return self._replace(holder)
                if error.errno not in TAKEN:
                    none = "this file system has no locks"
                    log.warning("%s: %s (%s); see to it that no other run uses the folder", self._folder, none, error)
                    return self._signed(file)
                os.close(file)
                waited = time.monotonic() - began
                if _is_here(holder) or waited > LOCK_SECONDS:
                    raise HeldError(refusal(self._folder, self._doing, holder)) from error
                if waited > SILENT_SECONDS and not told:
                    told = True
                    log.warning(
                        "%s: %s is %s into this folder; waiting %.0f s more to see whether it is still there",
                        self._folder, holder or "another run", self._doing, LOCK_SECONDS - waited,
                    )  # fmt: skip
                time.sleep(1.0)
            else:
                if self._is_in_place(file):
                    self._refuse_later(file)
                    return self._signed(file)
                os.close(file)  # another process has put its own file here meanwhile

    def _refuse_later(self, file: int) -> str:
        """Return who has signed an open file. Closes it and raises HeldError if that is a later start of this launch.

        Such a file refuses an earlier start even when the later one has ended: the run went on without this process.
        """
        holder = _written(file)
        if precedes(holder):
            os.close(file)
            raise HeldError(self._overtaken(holder))
        return holder

    def _overtaken(self, holder: str) -> str:
        return f"{self._folder}: {holder} has taken this folder over from this process, without which the run goes on"

    def _replace(self, holder: str) -> int:
        """Put a file that this process has locked in the place of another's, and return its descriptor. holder: the other."""
        beside = self._path.with_name(f"{self._path.name}.{socket.gethostname()}-{os.getpid()}")
        file = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: the name says who has the folder
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._signed(file)
            beside.replace(self._path)
        except BaseException:
            os.close(file)
            beside.unlink(missing_ok=True)
            raise
        log.warning("%s: taken over from %s, which the run goes on without", self._folder, holder)
        return file

    def _is_in_place(self, file: int) -> bool:
        """Return whether an open file is still the one that has the lock's name."""
        try:
            there, here = self._path.stat(), os.fstat(file)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):  # ESTALE: the file server has removed the one that was replaced
                return False
            raise
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)

    @staticmethod
    def _signed(file: int) -> int:
        with contextlib.suppress(OSError):  # a full disk: who holds the lock can't be told then, but it is held
            os.ftruncate(file, 0)
            os.pwrite(file, name_of_process(socket.gethostname()).encode(), 0)
        return file


def holder_of(folder: Path, name: str = LOCK) -> str | None:
    """Return the process of this machine that has taken a folder, or None, without taking or touching the folder.

    None, too, if this process may take it from that one, an earlier start of the same launch. Of one on another machine only
    FolderLock can tell, which waits to see whether that node is gone.
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
        holder = _written(file) if error.errno in TAKEN else ""
        return holder if _is_here(holder) and not follows(holder) else None
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
