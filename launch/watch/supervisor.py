"""The watch of one torchrun agent: it tells of the first failure before torchrun does, and decides about another start."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...parallel.heartbeat import read_beat
from ...trainer.watch.folder import WATCH_FOLDER, WATCH_PORT, AttemptFolder, read_json
from ...trainer.watch.incidents import Incident, IncidentLog
from ...trainer.watch.process import process_state
from .attempts import Attempt, Judgement, judge_attempts
from .failures import Failure, Report, merge, read_failure
from .host import HostWatch
from .news import NewsStore
from .recorder import recorder_environment
from .watch_folder import WatchFolder

OWN_REASON_SECONDS = 2.0
"""Time for the rank that failed first to be seen, where all that ended so far only lost a peer."""
ENDED_BY_TORCHRUN = (signal.SIGTERM, signal.SIGKILL)
"""Signals with which torchrun ends the other ranks of one that has failed."""


class Supervisor:
    """Watches the attempts of one torchrun agent.

    judgement  of the newest failed attempt; None: none has failed
    root       the watch folder
    """

    def __init__(self, max_restarts: int, *, several: bool) -> None:
        """several: whether the run has several hosts, each with an agent."""
        self._folder = WatchFolder()
        self.root = self._folder.path
        self._max_restarts = max_restarts
        self._attempts: list[Attempt] = []
        self._told: AttemptFolder | None = None
        self.judgement: Judgement | None = None
        store: NewsStore | None = None
        self._environment = dict(os.environ)
        os.environ[WATCH_FOLDER] = str(self.root)
        for name, value in recorder_environment(self.root).items():
            os.environ.setdefault(name, value)
        if several:
            store = NewsStore()
            os.environ[WATCH_PORT] = str(store.port)
        self._store = store
        self._watch = HostWatch(self.root, store)
        self._watch.start()

    def ranks(self) -> list[int]:
        """Return the process ids of this host's ranks that run."""
        folder = AttemptFolder.newest(self.root)
        beats = [] if folder is None else [read_beat(folder.beat(rank)) for rank in folder.ranks()]
        return [beat.pid for beat in beats if beat is not None and process_state(beat.pid) not in "XZ"]

    def end_attempt(self, number: int) -> None:
        """Watch an attempt no more: its ranks are ended."""
        self._watch.over = number

    def close(self) -> None:
        """End the watch and remove its folder."""
        self._watch.stop()
        if self._store is not None:
            self._store.close()
        os.environ.clear()
        os.environ.update(self._environment)
        self._folder.remove()

    def watch(self, agent_class: Any) -> Callable[[], None]:
        """Make torchrun's agents of this class ask here about their workers. Returns what undoes it."""
        # Private: the method with which the agent looks at its workers, and its counter of restarts. Nothing public tells of
        # a failure before the other workers have ended, or gives up early. tests/launch/watch/test_supervisor.py notices.
        before = agent_class._monitor_workers

        def monitor(agent: Any, group: Any) -> Any:
            self._look(agent, self._codes(agent, group), lambda: self._codes(agent, group))
            result = before(agent, group)
            # A rank may have failed between the two looks. Torchrun has ended the others since, by these two signals.
            failures: dict[int, Any] = getattr(result, "failures", {})
            if failures:
                codes = {rank: code for rank, code in self._codes(agent, group).items() if -code not in ENDED_BY_TORCHRUN}
                self._look(agent, codes | {rank: failure.exitcode for rank, failure in failures.items()})
            return result

        agent_class._monitor_workers = monitor
        return lambda: setattr(agent_class, "_monitor_workers", before)

    def _look(self, agent: Any, failed: dict[int, int], again: Callable[[], dict[int, int]] = dict) -> None:
        """Tell of the ranks that have failed, if any, and have the agent give up where they are not started again."""
        if failed and (self.judgement is None or self.judgement.again):  # else the count below is no more
            self.tell(failed, again, self._max_restarts - int(agent._remaining_restarts))
            if self.judgement is not None and not self.judgement.again:
                agent._remaining_restarts = 0

    @staticmethod
    def _codes(agent: Any, group: Any) -> dict[int, int]:
        return {group.workers[local].global_rank: code for local, code in exit_codes(agent._pcontext).items() if code}

    def tell(self, failed: dict[int, int], again: Callable[[], dict[int, int]] = dict, number: int | None = None) -> None:
        """Print which rank was the first to fail and what is done about it, once an attempt.

        failed: rank → exit code, of those that have ended so far; again: reads them anew
        number: of the attempt, as ranks are told it; None: the newest of which ranks have a folder
        """
        folder = AttemptFolder.newest(self.root) if number is None else AttemptFolder.of(self.root, number)
        if folder is None or folder == self._told:
            return
        self._told = folder
        attempt, first = merge([self.report(folder, failed, again)])
        self._attempts.append(attempt)
        self.judgement = judge_attempts(self._attempts, self._max_restarts)
        # Of one rank alone that has told its own fault, nothing is left to say.
        if first is None or not (first.spoke and self._max_restarts == 0):
            tell_judgement(first, self.judgement)
        about: Any = read_json(folder.run) or {}
        if "output_dir" in about:
            record_judgement(Path(about["output_dir"]), self._attempts, first, self.judgement)

    def report(
        self, folder: AttemptFolder, failed: dict[int, int], again: Callable[[], dict[int, int]] = dict, *, wait: bool = True
    ) -> Report:
        """Return what this machine's ranks tell of their failure. failed, again: see `tell`.

        wait: whether to wait a little for the rank that failed first, where all that failed so far only lost a peer
        """
        folder.path.mkdir(exist_ok=True)  # ranks that end before they are watched, as of a config error, make none
        beats = {rank: read_beat(folder.beat(rank)) for rank in folder.ranks()}

        def failures(codes: dict[int, int]) -> list[Failure]:
            return [read_failure(folder, rank, code, beats.get(rank)) for rank, code in codes.items()]

        ended = self._watch.ended
        if ended is not None and folder == AttemptFolder.of(self.root, ended.attempt):
            return Report.of((), beats.values(), (ended.rank, ended.host, ended.code))
        deadline = time.monotonic() + (OWN_REASON_SECONDS if wait else 0.0)
        found = failures(failed)
        while all(each.peer for each in found) and time.monotonic() < deadline:
            time.sleep(0.05)
            found = failures(failed | again())
        return Report.of(found, beats.values(), None)


def tell_judgement(first: Failure | None, judgement: Judgement) -> None:
    """Print which rank was the first to fail, and what is done about it."""
    lines = [judgement.said]
    if first is not None:
        lines = [f"{first.message}; {judgement.said}", *([first.traceback.rstrip()] if first.traceback else [])]
    print("\n".join(lines), file=sys.stderr, flush=True)


def record_judgement(output_dir: Path, attempts: Sequence[Attempt], first: Failure | None, judgement: Judgement) -> None:
    """Keep the last attempt's failure in the run's incidents."""
    attempt = attempts[-1]
    details = {"code": attempt.code, "attempt": len(attempts), "said": judgement.said}
    kind = "restart" if judgement.again else "end"
    incident = Incident(kind, judgement.said, attempt.last or None, attempt.rank, attempt.host, details=details)
    if first is not None:
        kind = "death" if first.code < 0 else "error"
        more = {**details, "traceback": first.traceback} if first.traceback else details
        incident = replace(incident, kind=kind, message=first.message, pid=first.pid, phase=first.phase, details=more)
    IncidentLog(output_dir).write(incident)


def exit_codes(context: Any) -> dict[int, int | None]:
    """Return the exit codes of a torchrun agent's workers by local rank; None for those that run."""
    if context is None:
        return {}
    if hasattr(context, "subprocess_handlers"):
        return {local: handler.proc.poll() for local, handler in context.subprocess_handlers.items()}
    processes = getattr(context, "_pc", None)
    return {} if processes is None else {local: process.exitcode for local, process in enumerate(processes.processes)}
