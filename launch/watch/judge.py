"""Judge from heartbeats which rank keeps the others waiting, and whether to end the run for it. Pure functions.

A rank is silent if its heartbeat has not changed for longer than is usual for it. Ranks wait for one another within a step, so
one that hangs silences all. Who is to blame is told in this order:

1. ranks whose process is stopped, or whose host does not answer
2. ranks that are behind: not begun yet, in an earlier step, or in an earlier part of the same step
3. ranks that are not in the phase EXCHANGE, if others are
4. ranks whose stack is not in a collective, if those of others are
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...config.words import counted
from ...parallel.heartbeat import Phase

NAMED_STEPS, NAMED_SECONDS, STOPPED_SECONDS = 2.0, 10.0, 3.0
"""A rank is named when it is silent for so many of its usual steps and so many seconds more; fewer if it is stopped."""
ENDED_STEPS, ENDED_SECONDS = 10.0, 30.0
"""A run is ended for a rank that still runs when it is silent for so long."""
LOST_SECONDS = 30.0
"""A host that gives no news is named after 2 usual steps and so many seconds."""
STORAGE_SECONDS = 120.0
"""Stands for ENDED_SECONDS in the phases of STORED: a file server may be slow for once."""
SAVE_MARGIN = 1.25
"""A save that does not get on gives up by itself after checkpoint.timeout, or a little more where ranks wait for each other.
Only then may its run be ended for it."""
FIRST_SECONDS = 60.0
"""A rank that saves for the first time is named after so long."""
UNKNOWN_SECONDS = 10.0
"""Stands for NAMED while no usual time of a step is known: the first steps compile."""
UNKNOWN_STEP = 1.0
"""Stands then for a step's usual time where a rank is stopped: that takes no compiler."""
MOVES = 1.0
"""Seconds within which a rank has to beat for its run not to be silent."""
STOPPED, TRACED, STORAGE = "T", "t", "D"
"""Linux's states of a process: stopped by a signal; held or followed by a debugger; waiting for a disk or a file server."""
GONE = ("X", "Z")
"""States of a process that has exited."""
TOGETHER = {Phase.FORWARD: Phase.EXCHANGE, Phase.BACKWARD: Phase.EXCHANGE, Phase.EXCHANGE: Phase.EXCHANGE}
"""Phases through which a rank goes many times in a step count as one part of it."""
UNBOUNDED = (Phase.START, Phase.OUTER, Phase.HOOKS, Phase.END)
"""Phases without a usual time: data are prepared, a slow link carries differences, a hook draws.
Only parallel.timeout bounds them, where a rank waits for one of these; where all ranks are in the same, nothing does."""
STORED = (Phase.DATA, Phase.SAVE)
"""Phases that wait for storage. If all ranks are in the same one and can't be told apart, storage is at fault and no rank."""
ALIKE = (*STORED, Phase.EVALUATION)
"""Phases in which all ranks may be slow together without a fault: parallel.timeout holds then."""
VARYING = (*STORED, Phase.EVALUATION)
"""Phases of which one is not as long as the other: the longest of the recent ones counts, not the median."""
UNLEARNED = (*UNBOUNDED, Phase.TASKS)
"""Phases whose earlier durations say nothing. Gathering a model, tokenising or one generation may take minutes within TASKS."""


@dataclass(frozen=True)
class RankState:
    """A rank as its heartbeat and its host show it at one moment.

    host        where it runs, with its pid; 0: it has not begun yet
    age         seconds since its last beat
    usual       median seconds of its phase (0: not known), and of a step (None: not known)
    longest     longest of its phase's recent times, in seconds (0: not known)
    state       Linux's letter for its process; "": its host does not answer
    stack       innermost Python frames, one line; "": not taken
    collective  whether that stack is in a collective; None: not known
    compiles    whether one of its threads compiles
    """

    rank: int
    host: str
    pid: int
    phase: Phase
    step: int
    micro_batch: int
    age: float
    usual: float = 0.0
    longest: float = 0.0
    step_usual: float | None = None
    state: str = "S"
    stack: str = ""
    collective: bool | None = None
    compiles: bool = False

    @property
    def stopped(self) -> bool:
        """True for a process that can't go on by itself."""
        return self.state in (STOPPED, "")

    @property
    def learned(self) -> float:
        """The seconds that its phase may take as far as is known; 0: nothing is."""
        return 0.0 if self.phase in UNLEARNED else self.longest if self.phase in VARYING else self.usual

    @property
    def where(self) -> str:
        """The phase, micro-batch and step, in words."""
        within = f" of micro-batch {self.micro_batch}" if self.micro_batch else ""
        return f"{self.phase.word}{within} in step {self.step}" if self.step else self.phase.word

    @property
    def named_after(self) -> float:
        """Seconds of silence after which the rank is named."""
        if self.state == "":
            return NAMED_STEPS * (self.step_usual or 0.0) + LOST_SECONDS
        if self.stopped:
            return NAMED_STEPS * (self.step_usual or UNKNOWN_STEP) + STOPPED_SECONDS
        if self.step_usual is None:
            return UNKNOWN_SECONDS
        return NAMED_STEPS * max(self.step_usual, self.learned or self.usual) + NAMED_SECONDS

    def ended_after(self, limit: float | None, timeout: float) -> float:
        """Return the seconds of silence after which the run is ended for this rank.

        limit: launch.silence, if it is a number; timeout: what holds where nothing was learned, and bounds what was
        """
        if self.state == STOPPED:
            return self.named_after if limit is None else max(limit, self.named_after)
        if self.step_usual is None or not self.learned or self.compiles or self.state == STORAGE:
            return timeout if limit is None else max(limit, timeout)
        seconds = STORAGE_SECONDS if self.phase in STORED else ENDED_SECONDS
        learned = min(timeout, ENDED_STEPS * max(self.step_usual, self.learned) + seconds)
        if limit is None:
            return learned
        return max(limit, learned) if self.phase is Phase.SAVE else limit


@dataclass(frozen=True)
class Silence:
    """A silent run.

    blamed   the ranks that keep the others waiting
    waiting  those that wait for them
    ends     whether the silence is long enough to end the run
    limit    seconds of silence after which that is so
    """

    blamed: list[RankState]
    waiting: list[RankState] = field(default_factory=list[RankState])
    ends: bool = False
    limit: float = 0.0


def judge(
    ranks: Sequence[RankState], limit: float | None = None, timeout: float = 600.0, save_timeout: float = 0.0
) -> Silence | None:
    """Return the silence of a run, if it is silent.

    limit         launch.silence, if it is a number
    timeout       parallel.timeout
    save_timeout  checkpoint.timeout, in whose place the longer one counts for a rank that saves

    A run of which a rank has exited is not judged: torchrun ends its others. Nor is one that somebody debugs.
    """
    live = [each for each in ranks if each.phase is not Phase.END]
    if not live or any(each.state in GONE for each in ranks) or any(each.state == TRACED for each in live):
        return None
    stopped = [each for each in live if each.state == STOPPED and each.age > each.named_after]
    answering = [each for each in live if each.state]
    lost = [each for each in live if not each.state and not stopped]
    if not answering:
        return None
    if lost and not all(each.age > each.named_after for each in answering):
        lost, live = [], answering  # the run goes on: only the news of a host are lost
    if not stopped and min(each.age for each in live) < MOVES:
        return None
    blamed = stopped or lost or blame(live)
    if not any(each.age > _named_after(each, timeout) for each in blamed):
        return None
    if not stopped and len({each.phase for each in live}) == 1 and _nobody_waits(blamed, live):
        return None
    # Where no rank is stopped, the most patient limit of all holds: who is to blame is not certain.
    saving = max(timeout, SAVE_MARGIN * save_timeout)
    limits = [each.ended_after(limit, saving if each.phase is Phase.SAVE else timeout) for each in stopped or live]
    if blamed == live and live[0].phase in ALIKE:
        limits.append(timeout if limit is None else limit)
    after = min(limits) if stopped else max(limits)
    waiting = [each for each in live if each not in blamed]
    return Silence(blamed, waiting, any(each.age > after for each in blamed), after)


def with_missing(ranks: Sequence[RankState], world_size: int) -> list[RankState]:
    """Add the ranks that have not begun: others already wait for them."""
    known = {each.rank for each in ranks}
    age = max((each.age for each in ranks), default=0.0)
    missing = [RankState(rank, "", 0, Phase.START, 0, 0, age) for rank in range(world_size) if rank not in known]
    return sorted([*ranks, *missing], key=lambda each: each.rank)


def _named_after(state: RankState, timeout: float) -> float:
    """Return the seconds after which a rank is named: in a phase without a usual time, half of what bounds it."""
    if state.stopped or state.phase not in (*UNLEARNED, Phase.SAVE) or state.learned:
        return state.named_after
    return max(state.named_after, min(FIRST_SECONDS, timeout / 2) if state.phase is Phase.SAVE else timeout / 2)


def _nobody_waits(blamed: Sequence[RankState], live: Sequence[RankState]) -> bool:
    """Return whether ranks that are in the same phase all prepare, write or compute: nobody waits for another."""
    if blamed[0].phase in (Phase.SAVE, Phase.TASKS):  # all alike: slow storage, or a long tokenisation. Else some wait for one.
        return len(blamed) == len(live)
    return blamed[0].phase in UNBOUNDED


def blame(ranks: Sequence[RankState]) -> list[RankState]:
    """Return the ranks that keep the others waiting, as far as these states can tell; all of them if they can't."""
    least = min((each.step, _part(each)) for each in ranks)
    blamed = [each for each in ranks if (each.step, _part(each)) == least]
    blamed = [each for each in blamed if each.phase is not Phase.EXCHANGE] or blamed
    return [each for each in blamed if each.collective is False] or [each for each in blamed if not each.collective] or blamed


def _part(state: RankState) -> int:
    """Return the part of a run's beginning, or of a step, that a rank is in, in their order."""
    return int(TOGETHER.get(state.phase, state.phase))


def describe(silence: Silence) -> str:
    """Return the sentence that says who is silent since when, and what the others wait for."""
    parts: list[str] = []
    for each in silence.blamed[:4]:
        if not each.pid:
            parts.append(f"rank {each.rank} has not begun for {each.age:.1f} s")
            continue
        if each.state == "":
            how = "gives no answer, nor does its host's launcher,"
        elif each.stopped:
            how = "is stopped (SIGSTOP)"
        elif each.state == "D":
            how = "waits for a disk or a file server"
        else:
            how = "does not go on"
        parts.append(f"rank {each.rank} ({each.host}, pid {each.pid}) {how} in {each.where}, for {each.age:.1f} s")
    if len(silence.blamed) > 4:
        parts.append(f"and {counted(len(silence.blamed) - 4, 'more rank')}")
    text = "; ".join(parts)
    places: dict[str, list[int]] = {}
    for each in silence.waiting:
        places.setdefault(each.where, []).append(each.rank)
    waits = [f"{_ranks(found)} in {where}" for where, found in places.items()]
    return text + (f"; waiting for it: {'; '.join(waits[:3])}" if waits else "")


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return ("rank " if len(ranks) == 1 else "ranks ") + shown + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
