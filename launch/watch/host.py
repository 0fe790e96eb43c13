"""One watching thread a host: it reads the heartbeats of its ranks, and with those of other hosts judges the run.

It runs in torchrun's agent, the parent of the ranks. The agent of rank 0's host judges; the others send it what they see,
through a key-value store of the agents' own: the run's store may live in a process that hangs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...parallel.heartbeat import Phase, read_beat
from ...trainer.watch.folder import AttemptFolder, read_json
from ...trainer.watch.incidents import Incident, IncidentLog
from ...trainer.watch.process import process_state
from ..exit_codes import HUNG
from .judge import GONE, TRACED, RankState, Silence, describe, judge, with_missing
from .news import NewsLink, NewsStore
from .recorder import collect_dumps, read_dumps
from .stacks import Stack, take_stack

POLL_SECONDS = 0.25
PAUSED_SECONDS = 2.0
"""A poll that comes so late says that this host was suspended: its silence counts for nobody."""
LOST_SECONDS = 5.0
"""Seconds without news after which a host does not answer. It is judged much later: see `judge.LOST_SECONDS`."""
TOLD_SECONDS = 5.0
"""At most so long the judging host waits until all that answer have heard that the run is ended: with its own ranks its
launcher may end, and with it the store. Another host reads a stack, at worst for `stacks.PY_SPY_SECONDS`, before it hears."""
STACKS = 8
"""At most so many stacks are read at a time: each takes half a second as a rule."""
EARLY_SECONDS = 1.0
"""So long before a rank is named its stack is read, so that other hosts' stacks have come when the judge names them."""
STACK_SECONDS = 15.0
"""Age of a stack after which it is read anew: a rank may have begun to compile."""


@dataclass(frozen=True)
class Ended:
    """A run that was ended for a silent rank. code: its exit code."""

    attempt: int
    rank: int
    host: str
    message: str
    code: int = HUNG


class HostWatch(threading.Thread):
    """Watches the ranks of this host, until it is told to stop.

    ended  what it has ended the newest attempt for; None: for nothing
    over   the newest attempt that others have ended; it is watched no more
    """

    def __init__(self, root: Path, store: NewsStore | None = None) -> None:
        """root: the watch folder; store: this agent's own, which gathers the news if rank 0 is here; None: of one host."""
        super().__init__(daemon=True, name="watch")
        self._root, self._store = root, store
        self._news: NewsLink | None = None
        self._over = threading.Event()
        self._host = socket.gethostname()
        self._mine: list[RankState] = []
        self._stacks: dict[int, tuple[int, float, Stack | None]] = {}  # rank → beats and time of its newest stack
        self._faults: set[str] = set()
        self._seen: dict[int, tuple[float, int, list[RankState]]] = {}  # node → when its newest news came, their number
        self._answering: set[int] = set()  # nodes whose news are not late
        self._attempt = -1
        self._polls, self._resumed, self._lost = 0, time.monotonic(), 0.0
        self._named: tuple[int, ...] = ()
        self.ended: Ended | None = None
        self.over = -1

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self.join()

    def run(self) -> None:
        """Poll until told to stop."""
        last = time.monotonic()
        while not self._over.wait(POLL_SECONDS):
            now = time.monotonic()
            if now - last > PAUSED_SECONDS:
                self._resumed = now
            last = now
            try:
                folder = AttemptFolder.newest(self._root)
                about: Any = None if folder is None else read_json(folder.run)
                if folder is not None and about is not None:
                    self._poll(folder, about, now)
                    last = max(last, time.monotonic() - PAUSED_SECONDS / 2)  # reading stacks takes a while
            except Exception as error:  # the watch must not end of one bad turn, nor the run
                told = f"{type(error).__name__}: {error}"
                if told not in self._faults:
                    self._faults.add(told)
                    self._say(f"{self._host}: the watch over the ranks has failed, and goes on: {told}")
        self._disconnect()

    def _poll(self, folder: AttemptFolder, about: Mapping[str, Any], now: float) -> None:
        attempt = int(folder.path.name.rpartition("-")[2])
        if attempt != self._attempt:
            self._attempt, self._named = attempt, ()
            self._disconnect()
            self._stacks, self._seen, self._answering = {}, {}, set()
        if attempt <= self.over or self._has_ended:
            return
        self._polls += 1
        mine = self._mine = self._local(folder, now)
        others: list[RankState] = []
        judges = any(each.rank == 0 for each in mine)
        if about["nodes"] > 1:  # before stacks are read: news must not be late
            others = self._exchange(about, mine, judges, now)
        mine = self._take_stacks(folder, about, mine, now)
        if not judges or any(each.state in (*GONE, TRACED) for each in [*mine, *others]):
            return  # torchrun ends the others of a rank that has exited; somebody debugs one that is traced
        limits = _limit(about["silence"]), float(about["timeout"]), float(about["save_timeout"])
        silence = judge(with_missing([*mine, *others], about.get("world_size", 0)), *limits)
        if silence is not None and silence.ends:  # a stack may be old: look again before anything is ended
            later = time.monotonic()
            mine = self._take_stacks(folder, about, self._local(folder, later), later, anew=True)
            silence = judge(with_missing([*mine, *others], about.get("world_size", 0)), *limits)
        self._judge(about, [*mine, *others], silence)

    @property
    def _has_ended(self) -> bool:
        """Return whether the newest attempt is ended."""
        return self.ended is not None and self.ended.attempt == self._attempt

    def _local(self, folder: AttemptFolder, now: float) -> list[RankState]:
        """Read the states of this host's ranks, with the stacks that have been read since their last beats."""
        found: list[RankState] = []
        for rank in folder.ranks():
            beat = read_beat(folder.beat(rank))
            if beat is None:
                continue
            state = RankState(
                rank,
                self._host,
                beat.pid,
                beat.phase,
                beat.step,
                beat.micro_batch,
                now - max(beat.since, self._resumed),
                beat.usual.get(beat.phase, 0.0),
                beat.longest.get(beat.phase, 0.0),
                beat.step_usual,
                process_state(beat.pid),
            )
            beats, _, stack = self._stacks.get(rank, (-1, 0.0, None))
            if beats != beat.beats:
                self._stacks.pop(rank, None)
            found.append(_with_stack(state, stack if beats == beat.beats else None))
        return found

    def _take_stacks(
        self, folder: AttemptFolder, about: Mapping[str, Any], states: Sequence[RankState], now: float, *, anew: bool = False
    ) -> list[RankState]:
        """Read the stacks of the ranks that are silent, and return all states with them. anew: also where one is known.

        Between two of them a host that does not judge exchanges news. It reads no more once the run is ended.
        """
        found: list[RankState] = []
        taken = 0
        for state in states:
            silent = state.age > state.named_after - EARLY_SECONDS and state.phase is not Phase.END
            beat = read_beat(folder.beat(state.rank)) if silent and state.state not in (*GONE, TRACED) else None
            known = self._stacks.get(state.rank)
            if beat is not None and taken < STACKS and (anew or known is None or now - known[1] > STACK_SECONDS):
                if taken and self._news is not None:
                    later = time.monotonic()
                    self._polls += 1
                    self._exchange(about, self._local(folder, later), judges=False, now=later)
                if self._has_ended:
                    break
                taken += 1
                stack = take_stack(beat.pid, folder.stack(state.rank), stopped=state.stopped)
                self._stacks[state.rank] = beat.beats, now, stack
                state = _with_stack(state, stack)
            found.append(state)
        return found

    def _exchange(self, about: Mapping[str, Any], states: list[RankState], judges: bool, now: float) -> list[RankState]:
        """Send this host's states to the judging host, or return there those of all other hosts."""
        prefix = self._prefix(about)
        try:
            if judges:
                return self._gather(prefix, about, now)
            if self._news is None:
                if not about.get("address"):
                    return []
                host, _, port = str(about["address"]).rpartition(":")
                self._news = NewsLink(host, int(port))
            rows = [asdict(each) for each in states]
            self._news.set(f"{prefix}/node-{about['node']}", json.dumps({"number": self._polls, "ranks": rows}))
            if ended := self._news.get(f"{prefix}/ended"):
                self._obey(json.loads(ended))
                self._news.set(f"{prefix}/node-{about['node']}/ended", "1")
            self._lost = now
        except (OSError, ValueError, KeyError) as error:  # its host is gone
            self._disconnect()
            if self._lost and now - self._lost > LOST_SECONDS:
                self._lost = 0.0
                self._say(f"{self._host}: the launcher of rank 0's host does not answer ({type(error).__name__})")
        return []

    def _disconnect(self) -> None:
        """Close the connection to the judging host; the next exchange makes another."""
        if self._news is not None:
            self._news.close()
            self._news = None

    def _prefix(self, about: Mapping[str, Any]) -> str:
        """Return what names of values begin with: hosts of another launch or attempt are not heard."""
        return f"{about.get('launch', '')}/attempt-{self._attempt}"

    def _gather(self, prefix: str, about: Mapping[str, Any], now: float) -> list[RankState]:
        """Return the newest states of the other hosts' ranks; those of a host without news don't answer."""
        found: list[RankState] = []
        self._answering = set()
        for node in range(about["nodes"]):
            if node == about["node"]:
                continue
            key = f"{prefix}/node-{node}"
            if self._store is not None and (found_news := self._store.get(key)):
                news = json.loads(found_news)
                if node not in self._seen or self._seen[node][1] != news["number"]:
                    rows = [replace(RankState(**row), phase=Phase(row["phase"])) for row in news["ranks"]]
                    self._seen[node] = (now, news["number"], rows)
            if node in self._seen:
                came, _, rows = self._seen[node]
                late = now - max(came, self._resumed)
                if late <= LOST_SECONDS:
                    self._answering.add(node)
                lost = late > LOST_SECONDS and not any(each.state in GONE for each in rows)
                found += [replace(each, age=each.age + late, state="" if lost else each.state) for each in rows]
        return found

    def _judge(self, about: Mapping[str, Any], states: Sequence[RankState], silence: Silence | None) -> None:
        """Name who is silent, and end the run if it is too long."""
        if silence is None:
            if self._named:
                self._tell(about, "recovered", f"rank {', '.join(map(str, self._named))} goes on", None)
            self._named = ()
            return
        names = tuple(each.rank for each in silence.blamed)
        first = silence.blamed[0]
        text = describe(silence)
        if not silence.ends:
            if not self._named:
                self._named = names
                after = "" if silence.limit == float("inf") else f"; after {silence.limit:.0f} s the run is ended"
                self._tell(about, "silence", f"{text}{after}{_stack_of(first)}", silence)
            return
        recorded = ""
        if about.get("recorder"):
            recorded = read_dumps(collect_dumps(Path(about["recorder"]), [each.rank for each in states if not each.stopped]))
        message = text + (f"; {recorded}" if recorded else "") + _stack_of(first)
        self.ended = Ended(self._attempt, first.rank, first.host, message)
        if self._store is not None:
            self._end_others(self._store, self._prefix(about), self.ended)
        self._kill()
        self._tell(about, "hang", f"run ended: {message}", silence)

    def _end_others(self, store: NewsStore, prefix: str, ended: Ended) -> None:
        """Tell the other hosts that the run is ended, and wait until those that answer have ended their ranks."""
        store.set(f"{prefix}/ended", json.dumps(asdict(ended)))
        deadline = time.monotonic() + TOLD_SECONDS
        while time.monotonic() < deadline and not self._over.wait(POLL_SECONDS / 5):
            if all(store.get(f"{prefix}/node-{node}/ended") for node in self._answering):
                return

    def _obey(self, ended: dict[str, Any]) -> None:
        """End this host's ranks, as the judging host has decided."""
        self.ended = Ended(**ended)
        self._kill()

    def _kill(self) -> None:
        """Kill this host's ranks. They hang: nothing that they could still save would be complete."""
        for each in self._mine:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each.pid, signal.SIGKILL)

    def _tell(self, about: Mapping[str, Any], kind: str, text: str, silence: Silence | None) -> None:
        """Print a sentence, and keep it in the run's incidents."""
        self._say(text)
        incident = Incident(kind, text, host=self._host)
        if silence is not None:
            first = silence.blamed[0]
            details = {
                "silent": [{**asdict(each), "phase": each.phase.word} for each in silence.blamed],
                "waiting": {each.rank: each.where for each in silence.waiting},
                "limit": silence.limit if silence.limit != float("inf") else None,
                "attempt": self._attempt,
            }
            incident = replace(
                incident,
                step=first.step or None,
                rank=first.rank,
                host=first.host,
                pid=first.pid or None,
                phase=first.phase.word,
                details=details,
            )
        IncidentLog(Path(about["output_dir"])).write(incident)

    @staticmethod
    def _say(text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal or a log that is gone must not end the watch
            print(text, file=sys.stderr, flush=True)


def _limit(silence: object) -> float | None:
    """Return launch.silence as a limit in seconds; None: it is to be learned."""
    if silence is None:
        return float("inf")
    return float(silence) if isinstance(silence, int | float) else None


def _with_stack(state: RankState, stack: Stack | None) -> RankState:
    if stack is None:
        return state
    return replace(state, stack=stack.told, collective=stack.collective, compiles=stack.compiles)


def _stack_of(state: RankState) -> str:
    return f"\n  its stack: {state.stack}" if state.stack else ""
