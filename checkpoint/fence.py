"""The start of a run that a process belongs to, so that a later start may take a folder from an earlier one that does not end.

A machine that is frozen, or cut off from the others, keeps its locks. The machines that go on without it know that it takes no
part any more: the lease of its leader is over, or the leader has counted it as lost. So the later start takes the folder, and
the earlier one finds that out before it commits anything (M. Kleppmann, "How to do distributed locking", 2016: fencing tokens).

It looks before it renames a step, names it the newest, or deletes old ones. The file system does not look: a process that is
frozen between its look and the rename, or whose NFS client shows it the lock file of a moment ago (`acregmin` of nfs(5)), may
still rename a step of its own. That step is whole and of the same run.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

FENCE = "MESHLOOM_FENCE"
"""Environment variable with the fence of this process, as `str` of it."""
_WRITTEN = re.compile(r"start (\d+)\.(\d+) of (\S+?)\)?$")


@dataclass(frozen=True)
class Fence:
    """A start of a run's processes.

    launch   of the run, whose starts are compared with one another and with no others
    term     of the leader that decided on it, counted from 1
    attempt  its number within the launch
    """

    launch: str
    term: int
    attempt: int

    def __str__(self) -> str:
        return f"start {self.term}.{self.attempt} of {self.launch}"

    @classmethod
    def read(cls, text: str) -> Fence | None:
        """Read the fence at the end of a text; None if there is none."""
        found = _WRITTEN.search(text)
        return None if found is None else cls(found[3], int(found[1]), int(found[2]))

    @classmethod
    def own(cls) -> Fence | None:
        """Return that of this process; None if nobody has told it."""
        return cls.read(os.environ.get(FENCE, ""))

    def follows(self, other: Fence | None) -> bool:
        """Return whether this is a later start of the same launch: of a later term, or of the same one and later."""
        if other is None or other.launch != self.launch:
            return False
        return (self.term, self.attempt) > (other.term, other.attempt)


def follows(holder: str) -> bool:
    """Return whether this process belongs to a later start than the one that has left this text in a lock."""
    own = Fence.own()
    return own is not None and own.follows(Fence.read(holder))


def precedes(holder: str) -> bool:
    """Return whether this process belongs to an earlier start than the one that has left this text in a lock."""
    own, other = Fence.own(), Fence.read(holder)
    return own is not None and other is not None and other.follows(own)


def name_of_process(host: str) -> str:
    """Return the name of this process for a lock: its host, its number and, if it has one, its fence."""
    own = Fence.own()
    return f"{host} process {os.getpid()}" + ("" if own is None else f" ({own})")
