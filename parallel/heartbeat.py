"""Heartbeat: what this rank is doing, in memory that a watching process of the same host can read at any time.

A rank writes at each change of phase; nothing is sent and nobody waits. One beat costs about a microsecond. The record is a
small file, mapped into memory, so it outlives a rank that dies or is stopped. Times are of CLOCK_MONOTONIC, which all processes
of a host share.
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median


class Phase(enum.IntEnum):
    """A rank's occupation, in the order in which a run and each of its steps goes through it.

    START is everything before the first step but JOIN, in which ranks connect. EXCHANGE is waiting for other ranks (and, on
    GPUs, for the device). OUTER is waiting for other islands. HOOKS is what a run does between steps and has no phase of its
    own. TASKS is an evaluation on tasks. END is that of a rank that is done or has failed.
    """

    START = 0
    JOIN = 1
    DATA = 2
    FORWARD = 3
    BACKWARD = 4
    EXCHANGE = 5
    UPDATE = 6
    OUTER = 7
    HOOKS = 8
    EVALUATION = 9
    TASKS = 10
    SAVE = 11
    END = 12

    @property
    def word(self) -> str:
        """The phase's name in messages."""
        return self.name.lower()


TOLD = (Phase.EVALUATION, Phase.SAVE)
"""Phases whose whole durations are told by `learn`: an evaluation beats many times, and a save goes on in the background."""

OWN_WORK = (Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE)
"""Phases of a step that are a rank's own work, as far as the host sees it."""

RECENT = 8
"""Durations of each phase, and of whole steps, that are kept: their median is what is usual."""

_HEAD = struct.Struct("<QdqqqqqQ")  # beats, since, step, phase, micro-batch, pid, steps done, beats again
_DURATION = struct.Struct("<d")
_ROWS = len(Phase) + 1  # one for each phase, and one for steps
SIZE = _HEAD.size + _ROWS * RECENT * _DURATION.size


@dataclass(frozen=True)
class Beat:
    """A heartbeat as read from outside.

    beats        number of beats so far
    since        when the phase began or was last seen to go on, seconds of CLOCK_MONOTONIC
    step         the step under way, counted from 1; 0: none yet
    phase        what the rank is doing
    micro_batch  counted from 1; 0: not in one
    pid          of the rank
    steps_done   steps that it has completed since it was started
    usual        phase → median of its recent durations, in seconds; a phase that has not ended twice is absent
    longest      phase → longest of its recent durations; of TOLD those that were told by `learn`; absent: none is known
    step_usual   the same of steps; None: fewer than two
    """

    beats: int
    since: float
    step: int
    phase: Phase
    micro_batch: int
    pid: int
    steps_done: int
    usual: dict[Phase, float]
    longest: dict[Phase, float]
    step_usual: float | None


class Heartbeat:
    """Writes this rank's record. Without a file it keeps the durations only.

    totals  phase → seconds spent in it so far
    """

    def __init__(self, path: Path | None = None) -> None:
        """path: of the record; it is created."""
        if path is None:
            self._memory = mmap.mmap(-1, SIZE)
        else:
            with path.open("w+b") as file:
                file.truncate(SIZE)
                self._memory = mmap.mmap(file.fileno(), SIZE)
        self.totals = [0.0] * len(Phase)
        self._beats = self._step = self._steps_done = 0
        self._ended = [0] * _ROWS
        self._phase, self._micro_batch, self._pid = Phase.START, 0, os.getpid()
        self._since = self._begun = self._step_since = time.monotonic()  # since the last change; since the last `beat`
        self._write(self._since)

    def beat(self, phase: Phase, micro_batch: int = 0) -> None:
        """Begin a phase, which ends the one before."""
        now = time.monotonic()
        before, seconds = self._phase, now - self._since
        self.totals[before] += seconds
        if before not in TOLD:
            self._keep(before, now - self._begun)
        self._phase, self._micro_batch, self._since, self._begun = phase, micro_batch, now, now
        self._write(now)

    def interrupt(self, phase: Phase) -> None:
        """Be in another phase for a moment within this one. Call it again to return.

        Only the seconds in each are told apart. What is usual of the outer phase is learned from all of it, as it would be
        without interruption.
        """
        now = time.monotonic()
        self.totals[self._phase] += now - self._since
        self._phase, self._since = phase, now
        self._write(now)

    def go_on(self, phase: Phase) -> None:
        """Tell that this rank gets on in a phase, if it is in it. Any thread may."""
        if self._phase is phase:
            self._write(time.monotonic())

    def begin_step(self, step: int) -> None:
        """Begin a step, in the phase DATA. step: counted from 1."""
        now = time.monotonic()
        if self._step:
            self._steps_done += 1
            self._keep(len(Phase), now - self._step_since)
        self._step, self._step_since = step, now
        self.beat(Phase.DATA)

    def learn(self, phase: Phase, seconds: float) -> None:
        """Take in how long a phase took that does not show it by itself: a whole save or evaluation."""
        self._keep(phase, seconds)

    @property
    def step(self) -> int:
        """The step under way; 0: none yet."""
        return self._step

    @property
    def phase(self) -> Phase:
        """The phase that this rank is in."""
        return self._phase

    @property
    def micro_batch(self) -> int:
        """The micro-batch that this rank is in, counted from 1; 0: in none."""
        return self._micro_batch

    def _keep(self, row: int, seconds: float) -> None:
        """Keep a duration in place of the oldest of its row."""
        place = row * RECENT + self._ended[row] % RECENT
        self._ended[row] += 1
        _DURATION.pack_into(self._memory, _HEAD.size + place * _DURATION.size, seconds)

    def _write(self, since: float) -> None:
        self._beats = beats = self._beats + 1  # both counts are of one value, whatever another thread does meanwhile
        place = self._step, self._phase, self._micro_batch
        _HEAD.pack_into(self._memory, 0, beats, since, *place, self._pid, self._steps_done, beats)


def read_beat(path: Path) -> Beat | None:
    """Read a rank's record; None if there is none yet, or it is being written at this moment."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if len(content) < SIZE:
        return None
    beats, since, step, phase, micro_batch, pid, done, again = _HEAD.unpack_from(content)
    if not beats or beats != again:
        return None
    rows = struct.unpack_from(f"<{_ROWS * RECENT}d", content, _HEAD.size)
    kept = [[seconds for seconds in rows[at : at + RECENT] if seconds > 0] for at in range(0, len(rows), RECENT)]
    usual = {each: median(kept[each]) for each in Phase if len(kept[each]) > 1}
    longest = {each: max(kept[each]) for each in Phase if kept[each]}
    of_steps = median(kept[-1]) if len(kept[-1]) > 1 else None
    return Beat(beats, since, step, Phase(phase), micro_batch, pid, done, usual, longest, of_steps)
