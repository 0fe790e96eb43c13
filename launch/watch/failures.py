"""The first rank to fail, from exit codes and the reasons that ranks have left on each machine: one message for the run."""

from __future__ import annotations

import math
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...parallel.heartbeat import Beat
from ...trainer.watch.folder import AttemptFolder, read_json
from ..exit_codes import DIVERGED
from .attempts import Attempt
from .judge import RankState


@dataclass(frozen=True)
class Failure:
    """A rank that has failed.

    where      the phase and step in which it was
    error      the exception in one line; "": it left no reason
    peer       whether its reason is that another rank is gone
    time       when it wrote its reason, seconds since 1970; infinite: it wrote none
    host       where it ran
    """

    rank: int
    code: int
    where: str
    pid: int | None
    phase: str | None = None
    error: str = ""
    traceback: str = ""
    peer: bool = False
    time: float = math.inf
    host: str = field(default_factory=socket.gethostname)

    @property
    def spoke(self) -> bool:
        """True for a rank that ended with a message of its own, such as a config error."""
        return self.code > 0 and not self.error

    @property
    def message(self) -> str:
        """The sentence about it."""
        pid = "" if self.pid is None else f", pid {self.pid}"
        who = f"rank {self.rank} ({self.host}{pid})"
        if self.code < 0:
            name = signal.Signals(-self.code).name if -self.code in signal.valid_signals() else f"signal {-self.code}"
            hint = "; out of memory, if nobody has killed it: see dmesg" if -self.code == signal.SIGKILL else ""
            return f"{who} was killed by {name} in {self.where}{hint}"
        if self.error:
            return f"{who} failed in {self.where}: {self.error}"
        return f"{who} was the first to fail, with exit code {self.code}, in {self.where}"


def read_failure(folder: AttemptFolder, rank: int, code: int, beat: Beat | None) -> Failure:
    """Return what is known of a rank that has ended with this code, negative for a signal."""
    reason: Any = read_json(folder.failure(rank)) or {}
    where = "the start"
    if beat is not None:
        where = RankState(rank, "", beat.pid, beat.phase, beat.step, beat.micro_batch, 0.0).where
    pid = None if beat is None else beat.pid
    error, trace = str(reason.get("error", "")), str(reason.get("traceback", ""))
    phase = None if beat is None else beat.phase.word
    written = float(reason.get("time", math.inf)) + time.time() - time.monotonic()
    return Failure(rank, code, where, pid, phase, error, trace, bool(reason.get("peer")), written)


@dataclass(frozen=True)
class Report:
    """One machine's report of an attempt that has failed there.

    failures     its ranks that have failed
    first, last  the steps that its ranks began and ended with, counted from 1; 0: they came to none
    ended        rank, host and exit code of a rank for whose silence the run was ended
    """

    failures: Sequence[Failure]
    first: int
    last: int
    ended: tuple[int, str, int] | None = None

    @classmethod
    def of(cls, failures: Iterable[Failure], beats: Iterable[Beat | None], ended: tuple[int, str, int] | None) -> Report:
        """Make the report of this machine, from the heartbeats of its ranks."""
        known = [beat for beat in beats if beat is not None and beat.step]
        first = min((beat.step - beat.steps_done for beat in known), default=0)
        return cls(tuple(failures), first, max((beat.step for beat in known), default=0), ended)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """Read what `as_dict` has given."""
        ended = values["ended"]
        failures = tuple(Failure(**row) for row in values["failures"])
        return cls(failures, values["first"], values["last"], None if ended is None else (ended[0], ended[1], ended[2]))

    @property
    def follows(self) -> bool:
        """True if all that is told here follows from another rank's end."""
        return self.ended is None and all(each.peer for each in self.failures)


def merge(reports: Sequence[Report]) -> tuple[Attempt, Failure | None]:
    """Return the attempt that several machines tell of, and its first failure; None if there is none, as of a silent rank."""
    first = min((each.first for each in reports if each.first), default=0)
    last = max(each.last for each in reports)
    for each in reports:
        if each.ended is not None:
            rank, host, code = each.ended
            return Attempt(first, last, code, rank, host), None
    found = first_failure([failure for each in reports for failure in each.failures])
    code = found.code if found.code > 0 else 128 - found.code
    if code == DIVERGED:  # all ranks have decided alike, and the run has said why: none of them has failed
        return Attempt(first, last, code), None
    error = f"exit code {code}" if found.spoke else "" if found.peer else found.error.partition("\n")[0]
    return Attempt(first, last, code, found.rank, found.host, error), found


def first_failure(failures: Iterable[Failure]) -> Failure:
    """Choose the one that the others follow from: killed by a signal, then an error of its own, then any.

    Of several the one that wrote its reason first. NCCL's watchdog aborts a rank whose peer is gone: errors go before SIGABRT.
    """
    found = sorted(failures, key=lambda each: each.time)
    for chosen in (
        [each for each in found if each.code < 0 and each.code != -signal.SIGABRT],
        [each for each in found if not each.peer and not each.spoke and each.code > 0],
        [each for each in found if not each.peer],
    ):
        if chosen:
            return chosen[0]
    return found[0]
