"""Judge whether a run that has failed is worth another start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...config.words import counted
from ...trainer.watch.rank import PORT_IS_TAKEN
from ..exit_codes import BAD_CONFIG, DIVERGED, NO_PROGRESS

FRUITLESS = 2
"""Restarts without progress after which a run is given up; one is enough for an exception that has come again."""


@dataclass(frozen=True)
class Attempt:
    """One start of the processes, to its failure.

    first, last  the steps that it began and ended with, counted from 1; 0: it came to none
    code         exit code of the rank that failed first; of a hang, HUNG
    rank, host   of the one that failed first; None: not known
    error        what it said that it failed of, if it was a fault of its own
    """

    first: int
    last: int
    code: int
    rank: int | None = None
    host: str = ""
    error: str = ""


@dataclass(frozen=True)
class Judgement:
    """A decision after a failed attempt. code: with which to end, unless it is started again. said: the reason, for people."""

    again: bool
    code: int
    said: str


def judge_attempts(attempts: Sequence[Attempt], max_restarts: int) -> Judgement:
    """Decide after the last of these attempts. max_restarts: launch.max_restarts."""
    last = attempts[-1]
    if last.code == BAD_CONFIG:
        return Judgement(False, BAD_CONFIG, "a config error is not tried again")
    if last.code == DIVERGED:
        return Judgement(False, DIVERGED, "the run ended by its own decision, and is not started again")
    # Another process may take the port at which ranks are to meet, before they do. The next attempt meets at another.
    taken = "DistNetworkError" in last.error and PORT_IS_TAKEN in last.error
    if len(attempts) == 1 and last.error and last.first == last.last and not taken:
        return Judgement(False, last.code, "an error in the first step is not tried again" if max_restarts else "the run ends")
    fruitless = _fruitless(attempts)
    repeated = fruitless > 0 and bool(last.error) and attempts[-2].error == last.error
    if fruitless >= FRUITLESS or repeated:
        at = f"step {last.last}" if last.last else "the start"
        said = f"{counted(fruitless + 1, 'attempt')} came no further than {at}, so the run is not started again"
        return Judgement(False, NO_PROGRESS, said + _always_first(attempts[-fruitless - 1 :]))
    if len(attempts) > max_restarts:
        spent = f" after {counted(max_restarts, 'restart')}" if max_restarts else ""
        return Judgement(False, last.code, f"the run ends{spent}")
    return Judgement(
        True, last.code, f"starting again, from what is saved if anything is (restart {len(attempts)} of {max_restarts})"
    )


def _fruitless(attempts: Sequence[Attempt]) -> int:
    """Count the last attempts that reached no new step, and began at none later than those before."""
    count = 0
    for number in range(len(attempts) - 1, 0, -1):
        before, now = attempts[:number], attempts[number]
        if now.last > max(each.last for each in before) or now.first > max(each.first for each in before):
            break
        count += 1
    return count


def _always_first(attempts: Sequence[Attempt]) -> str:
    """Name the rank that was the first to fail in all of several attempts."""
    ranks = {each.rank for each in attempts}
    if len(ranks) != 1 or None in ranks:
        return ""
    return f"; rank {attempts[-1].rank} ({attempts[-1].host}) was the first to fail in each of them"
