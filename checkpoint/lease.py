"""A folder of an object store that one run at a time writes into.

Stores have no locks that end with a process. So who has the folder leaves a record there and renews it; one that is not
renewed any more is of a run that is gone. How old it is, is told by this machine's clock alone: by watching it. Whoever was
cut off and comes back finds another's record, and must not commit.

It may freeze between its look and its write, too, and then overwrite that record. So whoever takes the folder from a run that
may come back leaves a mark for it: a file of its own, which nobody overwrites. Any later run tells by it whose record is late.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, cast

from .errors import CheckpointError, HeldError
from .fence import follows, name_of_process, precedes
from .files import RemoteFiles
from .lock import LOCK

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0  # without news from it, after which a run is taken to be gone
RENEWAL_SECONDS = 15.0
WATCH_SECONDS = 1.0
MARK_SECONDS = 7 * 86400.0  # age of a mark, by the wall clocks of both machines, after which its run is taken to be dead
_held: set[str] = set()  # tokens of this process


class Lease:
    """A folder, taken for this process until `release`.

    Raises HeldError if another run has it, and CheckpointError if the store can't be read or written. After a run that
    crashed on another machine it takes LEASE_SECONDS to see that it is gone.

    Two that come at the same moment are told apart by a conditional write, where fsspec's library for the store has one, and
    by reading the record again.
    """

    def __init__(self, files: RemoteFiles) -> None:
        self._files = files
        self._token = uuid.uuid4().hex
        self._beats = 0
        self._overtook = False
        self._over = threading.Event()
        try:
            self._take()
        except OSError as error:
            raise CheckpointError(f"{files.label(LOCK)} can't be written: {error}") from error
        _held.add(self._token)
        self._thread = threading.Thread(target=self._renew, name="checkpoint-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises HeldError if another run has taken the folder meanwhile, CheckpointError if that can't be told."""
        record, mark = self._read(), self._own_mark()
        if not mark and (not record or self._is_late(record)):  # not record: somebody has tidied up
            self._write()
        elif record and record.get("token") != self._token:
            raise HeldError(self._overtaken(record))
        elif mark:  # this run has written over the other's record
            raise HeldError(self._overtaken(mark))

    def release(self) -> None:
        """Let another run have the folder. May be called twice.

        If a run before may only be cut off or frozen, a record stays and says that this one is over. Otherwise that run, once
        it is back, would find nothing, and take its own record to have been tidied away.

        A run that has lost the folder leaves all as it is: whoever has it puts its own record back at its next renewal.
        """
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join()
        _held.discard(self._token)
        with contextlib.suppress(Exception):  # then the next run waits
            if self._read().get("token") != self._token or self._own_mark():
                return
            if self._overtook:
                self._write(over=True)
            else:
                self._files.delete(LOCK)

    def _take(self) -> None:
        self._files.make()
        may_come_back, marked = False, dict[str, Any]()
        while (first := self._read()) or not self._write(anew=True):
            if first:
                marked = self._mark_of(first)
                self._watch(first)
                may_come_back = not _is_over(first) and not _has_died(first)
                # One before that, too, may come back: then this run's record is all that tells it.
                self._overtook = first.get("overtook") is True or _is_over(first) or may_come_back
                self._write()  # nobody renews it, or it is gone already
                break
        time.sleep(min(WATCH_SECONDS, LEASE_SECONDS))  # whoever read the same as this run has written, too, by now
        record = self._read()
        if self._is_late(record):
            self._write()
        elif record.get("token") != self._token:
            raise HeldError(self._refusal(record))
        if may_come_back:
            now = self._mark_of(first)
            if now != marked:  # this run froze: another has taken the folder meanwhile, and its record is overwritten
                self._mark(self._about())  # so that the other knows this record to be late
                self._write(over=True)
                raise HeldError(self._overtaken(now))
            self._mark(first)
        with contextlib.suppress(Exception):  # then a later run does it
            self._prune_marks()

    def _is_late(self, record: dict[str, Any]) -> bool:
        """Return whether one that may have hung has written this over the own record: an earlier start of the same launch, or a
        run from which this one, or one before it, has taken the folder.
        """
        holder = _holder(record)
        if record.get("token") == self._token or precedes(holder):
            return False
        marked = bool(self._mark_of(record))
        if not (marked or follows(holder)) or self._own_mark():  # who has lost the folder has no say
            return False
        if not marked:
            self._overtook = True
            self._mark(record)
        return True

    def _mark(self, record: dict[str, Any]) -> None:
        """Leave a mark for whoever wrote a record that this run has the folder now."""
        token = record.get("token")
        if isinstance(token, str) and token.isalnum():
            self._files.write(_name_of_mark(token), json.dumps({**self._about(), "time": time.time()}).encode())

    def _mark_of(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the mark that another run has left for whoever wrote a record; empty if there is none."""
        token = record.get("token")
        return self._read(_name_of_mark(token)) if isinstance(token, str) and token.isalnum() else {}

    def _own_mark(self) -> dict[str, Any]:
        """Return the mark that tells this run that it has lost the folder; empty if there is none."""
        return self._mark_of(self._about())

    def _prune_marks(self) -> None:
        """Delete marks for runs that have not come back for MARK_SECONDS."""
        for name in self._files.names():
            if name.startswith(_name_of_mark("")):
                written = self._read(name).get("time")
                if isinstance(written, int | float) and time.time() - written > MARK_SECONDS:
                    self._files.delete(name)

    def _watch(self, first: dict[str, Any]) -> None:
        """Return when whoever left this record is known to be gone. Raises HeldError if it is not, or is a later start."""
        if precedes(_holder(first)):  # which has taken the run's place, even if it is over
            raise HeldError(self._overtaken(first))
        if first.get("token") in _held:
            raise HeldError(self._refusal(first))
        late = self._mark_of(first)  # of a run that has lost the folder: whoever has it will put its own record back
        if not late and (_is_over(first) or _has_died(first)):
            return
        if not late and follows(_holder(first)):  # an earlier start of the same launch, which may hang
            return
        log.warning(
            "%s: waiting up to %g s to see whether %s is still there", self._files.label(), LEASE_SECONDS, _holder(first)
        )
        deadline = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(WATCH_SECONDS, LEASE_SECONDS))
            now = self._read()
            if now == first or self._mark_of(now):
                continue
            if not now or _is_over(now):
                return
            raise HeldError(self._refusal(now))

    def _overtaken(self, record: dict[str, Any]) -> str:
        return (
            f"{self._files.label()}: {_holder(record)} has taken this folder over from this run, which was cut off from it "
            "or taken to be gone; stop one of them, or give it a folder of its own"
        )

    def _refusal(self, record: dict[str, Any]) -> str:
        problem = f"{self._files.label()}: another run is saving into this folder ({_holder(record)})"
        return f"{problem}; stop it, or give this one a folder of its own"

    def _renew(self) -> None:
        while not self._over.wait(RENEWAL_SECONDS):
            with contextlib.suppress(Exception):  # a store that is away for a moment; `check` finds out what came of it
                record = self._read()
                if record.get("token", self._token) != self._token and not self._is_late(record):
                    return
                if self._own_mark():  # the next run must not take this one to be there
                    return
                if not self._over.is_set():
                    self._write()

    def _read(self, name: str = LOCK) -> dict[str, Any]:
        """Return the record, or a mark; empty if there is none."""
        try:
            text = self._files.read(name)
        except FileNotFoundError:
            return {}
        try:
            record = json.loads(text)
        except ValueError:
            record = None
        return cast(dict[str, Any], record) if isinstance(record, dict) and record else {"written": text.hex()}

    def _write(self, *, anew: bool = False, over: bool = False) -> bool:
        """Returns whether it was written: anew, only where no record is, as far as the store can tell.

        over: whether this run is over, so that any other may have the folder
        """
        record = {
            **self._about(),
            "beat": self._beats,
            **({"overtook": True} if self._overtook else {}),
            **({"over": True} if over else {}),
        }
        self._beats += 1
        return self._files.write(LOCK, json.dumps(record).encode(), anew=anew)

    def _about(self) -> dict[str, Any]:
        return {
            "holder": name_of_process(socket.gethostname()),
            "place": _place(),
            "process": os.getpid(),
            "token": self._token,
        }


def _name_of_mark(token: str) -> str:
    """Return the name of the file that tells the run with this token that it has lost the folder."""
    return f"{LOCK}.taken-from-{token}"


def _holder(record: dict[str, Any]) -> str:
    return str(record.get("holder", "somebody unknown"))


def _is_over(record: dict[str, Any]) -> bool:
    """Return whether whoever left this record has said that it is over."""
    return record.get("over") is True


def _place() -> str:
    """Identify the scope of process ids: the machine's boot and, in a container, its pid namespace. Empty if unknown."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    return ""


def _has_died(record: dict[str, Any]) -> bool:
    """Return whether a record was left by a process of this very scope that no longer runs."""
    process = record.get("process")
    if not record.get("place") or record.get("place") != _place() or not isinstance(process, int):
        return False
    return not Path(f"/proc/{process}").exists() or process == os.getpid()  # whose own tokens are known
