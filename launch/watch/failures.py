"""The first rank to fail, from exit codes and the reasons that ranks have left: one message for the run."""

from __future__ import annotations

import math
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...parallel.heartbeat import Beat
from ...trainer.watch.folder import AttemptFolder, read_json
from .judge import RankState


@dataclass(frozen=True)
class Failure:
    """A rank that has failed.

    where      the phase and step in which it was
    error      the exception in one line; "": it left no reason
    peer       whether its reason is that another rank is gone
    time       when it wrote its reason, seconds of CLOCK_MONOTONIC; infinite: it wrote none
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

    @property
    def spoke(self) -> bool:
        """True for a rank that ended with a message of its own, such as a config error."""
        return self.code > 0 and not self.error

    @property
    def message(self) -> str:
        """The sentence about it."""
        pid = "" if self.pid is None else f", pid {self.pid}"
        who = f"rank {self.rank} ({socket.gethostname()}{pid})"
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
    written = float(reason.get("time", math.inf))
    return Failure(rank, code, where, pid, phase, error, trace, bool(reason.get("peer")), written)


def first_failure(failures: Mapping[int, Failure]) -> Failure:
    """Choose the one that the others follow from: killed by a signal, then an error of its own, then any.

    Of several the one that wrote its reason first. NCCL's watchdog aborts a rank whose peer is gone: errors go before SIGABRT.
    """
    found = sorted(failures.values(), key=lambda each: each.time)
    for chosen in (
        [each for each in found if each.code < 0 and each.code != -signal.SIGABRT],
        [each for each in found if not each.peer and not each.spoke and each.code > 0],
        [each for each in found if not each.peer],
    ):
        if chosen:
            return chosen[0]
    return found[0]
