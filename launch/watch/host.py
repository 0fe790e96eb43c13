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
from ..exit_codes import HUNG
from .judge import RankState, Silence, describe, judge
from .recorder import collect_dumps, read_dumps
from .stacks import Stack, process_state, take_stack

POLL_SECONDS = 0.25
PAUSED_SECONDS = 2.0
"""A poll that comes so late says that this host was suspended: its silence counts for nobody."""
LOST_SECONDS = 5.0
"""Seconds without news after which a host does not answer."""
STACKS = 8
"""At most so many stacks are read at a time: each takes up to half a second."""


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
    """

    def __init__(self, root: Path, store: Any = None) -> None:
        """root: the watch folder; store: this agent's own, which gathers the news if rank 0 is here; None: of one host."""
        super().__init__(daemon=True, name="watch")
        self._root, self._store = root, store
        self._news: Any = None
        self._over = threading.Event()
        self._host = socket.gethostname()
        self._mine: list[RankState] = []
        self._stacks: dict[int, tuple[int, Stack | None]] = {}
        self._seen: dict[int, tuple[float, int, list[RankState]]] = {}  # node → when its newest news came, their number
        self._attempt = -1
        self._polls, self._resumed, self._lost = 0, time.monotonic(), 0.0
        self._named: tuple[int, ...] = ()
        self.ended: Ended | None = None

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
            folder = AttemptFolder.newest(self._root)
            about: Any = None if folder is None else read_json(folder.run)
            if folder is not None and about is not None:
                self._poll(folder, about, now)
                last = max(last, time.monotonic() - PAUSED_SECONDS / 2)  # reading stacks takes a while

    def _poll(self, folder: AttemptFolder, about: Mapping[str, Any], now: float) -> None:
        attempt = int(folder.path.name.rpartition("-")[2])
        if attempt != self._attempt:
            self._attempt, self._named, self._news = attempt, (), None
            self._stacks, self._seen = {}, {}
        if self.ended is not None and self.ended.attempt == attempt:
            return
        self._polls += 1
        states = self._mine = self._local(folder, now)
        if any(each.state in "XZ" and each.state for each in states):
            return  # a rank has died: torchrun ends the others
        judges = any(each.rank == 0 for each in states)
        if about["nodes"] > 1:
            states = self._exchange(about, states, judges, now)
        if judges:
            self._judge(about, states, judge(states, _limit(about["silence"]), float(about["timeout"])))

    def _local(self, folder: AttemptFolder, now: float) -> list[RankState]:
        """Read the states of this host's ranks, with the stacks of those that are silent."""
        found: list[RankState] = []
        taken = 0
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
                beat.step_usual,
                process_state(beat.pid),
            )
            if state.age > state.named_after and state.phase is not Phase.END and state.state not in "XZ":
                known = self._stacks.get(rank, (-1, None))
                if known[0] != beat.beats and taken < STACKS:
                    taken += 1
                    known = beat.beats, take_stack(beat.pid, folder.stack(rank), stopped=state.stopped)
                    self._stacks[rank] = known
                if (stack := known[1]) is not None:
                    state = replace(state, stack=stack.told, collective=stack.collective, compiles=stack.compiles)
            found.append(state)
        return found

    def _exchange(self, about: Mapping[str, Any], states: list[RankState], judges: bool, now: float) -> list[RankState]:
        """Send this host's states to the judging host, or gather there those of all hosts."""
        prefix = f"attempt-{self._attempt}"
        try:
            if judges:
                return states + self._gather(prefix, about, now)
            if self._news is None:
                if not about.get("address"):
                    return states
                from torch.distributed import TCPStore

                host, _, port = str(about["address"]).rpartition(":")
                self._news = TCPStore(host, int(port), is_master=False, timeout=_seconds(LOST_SECONDS))
            rows = [asdict(each) for each in states]
            self._news.set(f"{prefix}/node-{about['node']}", json.dumps({"number": self._polls, "ranks": rows}))
            if self._news.check([f"{prefix}/ended"]):
                self._obey(json.loads(self._news.get(f"{prefix}/ended")))
            self._lost = now
        except Exception as error:  # a store may raise anything when its host is gone
            self._news = None
            if self._lost and now - self._lost > LOST_SECONDS:
                self._lost = 0.0
                self._say(f"{self._host}: the launcher of rank 0's host does not answer ({type(error).__name__})")
        return states

    def _gather(self, prefix: str, about: Mapping[str, Any], now: float) -> list[RankState]:
        """Return the newest states of the other hosts' ranks; those of a host without news don't answer."""
        found: list[RankState] = []
        for node in range(about["nodes"]):
            if node == about["node"]:
                continue
            key = f"{prefix}/node-{node}"
            if self._store.check([key]):
                news = json.loads(self._store.get(key))
                if node not in self._seen or self._seen[node][1] != news["number"]:
                    rows = [replace(RankState(**row), phase=Phase(row["phase"])) for row in news["ranks"]]
                    self._seen[node] = (now, news["number"], rows)
            if node in self._seen:
                came, _, rows = self._seen[node]
                late = now - max(came, self._resumed)
                lost = late > LOST_SECONDS
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
        self._tell(about, "hang", f"run ended: {message}", silence)
        self.ended = Ended(self._attempt, first.rank, first.host, message)
        if self._store is not None:
            self._store.set(f"attempt-{self._attempt}/ended", json.dumps(asdict(self.ended)))
        self._kill()

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
                incident, step=first.step or None, rank=first.rank, host=first.host, pid=first.pid, phase=first.phase.word,
                details=details,
            )  # fmt: skip
        IncidentLog(Path(about["output_dir"])).write(incident)

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _limit(silence: object) -> float | None:
    """Return launch.silence as a limit in seconds; None: it is to be learned."""
    if silence is None:
        return float("inf")
    return float(silence) if isinstance(silence, int | float) else None


def _stack_of(state: RankState) -> str:
    return f"\n  its stack: {state.stack}" if state.stack else ""


def _seconds(number: float) -> Any:
    import datetime

    return datetime.timedelta(seconds=number)
