"""One machine's part in a run on several: it asks the leader a few times a second, and starts or ends its ranks as it says.

Any machine may lead. When the leader is lost, the first of the others to notice takes over, with what it knows of the run.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ...trainer.watch.folder import AttemptFolder
from ...trainer.watch.incidents import Incident, IncidentLog
from .. import forked
from ..watch.attempts import Judgement
from ..watch.failures import Failure, Report
from ..watch.supervisor import Supervisor, record_judgement, tell_judgement
from .leader import Leader, Order, State
from .memory import Assignment, Memory
from .part import Part, overlaid
from .ranks import LocalRanks
from .terms import Term, Terms, meeting_folder
from .wire import ANSWER_SECONDS, Link, Message, Server, free_port, own_address

ASK_SECONDS = 0.25
"""Time between two requests to the leader."""
YIELD_SECONDS = 3.0
"""Time for machines that were led by one that is gone to take over, before one that is new does."""
STOP_SECONDS = 60.0
"""Time for ranks to save and end when this machine is told to leave."""


def run_part(word: str) -> int:
    """Take part in a run until it ends. Return its exit code."""
    part = Part.from_word(word)
    forked.prepare()
    forked.can_fork()  # waits for the imports, and caches the answer
    supervisor = Supervisor(part.rules.max_restarts, several=True)
    machine = Machine(part, supervisor)

    def leave(*_: object) -> None:
        machine.leave()

    before = signal.signal(signal.SIGTERM, leave)
    over = _follow_launcher(machine.leave)
    try:
        return machine.run()
    finally:
        over.set()
        signal.signal(signal.SIGTERM, before)
        machine.close()
        supervisor.close()


def _follow_launcher(leave: Callable[[], None]) -> threading.Event:
    """Leave the run when the launcher dies, however. Return what ends the following."""
    launcher, over = os.getppid(), threading.Event()

    def follow() -> None:
        while os.getppid() == launcher:
            if over.wait(ASK_SECONDS):
                return
        leave()

    threading.Thread(target=follow, daemon=True).start()
    return over


class Machine:
    """This machine in a run."""

    def __init__(self, part: Part, supervisor: Supervisor) -> None:
        self._part, self._supervisor = part, supervisor
        self._id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self._address, self._port = own_address(), free_port()
        self._terms = Terms(meeting_folder(Path(part.output_dir)))
        self._incidents = IncidentLog(Path(part.output_dir))
        self._memory = Memory()
        self._term: Term | None = None
        self._silent = 0  # the newest term whose leader did not answer
        self._link: Link | None = None
        self._known = False  # whether the leader has this machine's memory
        self._own: _Leading | None = None
        self._ranks: LocalRanks | None = None
        self._attempt, self._state = -1, State.WAITING
        self._report: Report | None = None
        self._leaving: float | None = None
        self._outcome: int | None = None

    def leave(self) -> None:
        """Leave the run: this machine's ranks are asked to save and end, and the others go on."""
        if self._leaving is None:
            self._leaving = time.monotonic()

    def run(self) -> int:
        """Ask and obey until the run ends. Return its exit code."""
        while True:
            self._look_at_ranks()
            if self._leaving is not None and self._may_leave(self._leaving):
                return 0
            if self._own is not None and self._is_deposed():
                self._lose_leader()
            answer = self._ask()
            if answer is not None:
                self._outcome = self._obey(answer)
            if self._outcome is not None:
                return self._outcome
            if self._own is not None:
                self._own.tick()
            time.sleep(ASK_SECONDS if answer is not None else ASK_SECONDS / 5)

    def close(self) -> None:
        """End this machine's ranks, and what it does as the leader."""
        self._end_ranks()
        if self._own is not None:
            self._own.wait_until_told()
            self._own.close()
        if self._link is not None:
            self._link.close()

    # ---- the ranks

    def _look_at_ranks(self) -> None:
        if self._ranks is None:
            return
        codes = self._ranks.codes()
        failed = {rank: code for rank, code in codes.items() if code}
        if failed and (self._report is None or len(failed) != len(self._report.failures)):
            folder = AttemptFolder.of(self._supervisor.root, self._attempt)
            # Only the leader, who hears of all machines, can tell what follows from what: it does not wait here.
            self._report, self._state = self._supervisor.report(folder, failed, wait=False), State.FAILED
        elif not failed and None not in codes.values():
            self._state = State.DONE

    def _start_ranks(self, assignment: Assignment) -> None:
        self._end_ranks()
        self._attempt, self._state, self._report = assignment.number, State.RUNNING, None
        node, arguments = assignment.ids.index(self._id), overlaid(self._part.arguments, assignment.words)
        self._ranks = LocalRanks(assignment, self._memory.launch, node, self._supervisor.root, arguments)

    def _end_ranks(self) -> None:
        if self._ranks is not None:
            self._supervisor.end_attempt(self._attempt)
            self._ranks.kill()
            self._ranks = None
            self._port = free_port()
        self._state = State.WAITING

    def _may_leave(self, asked: float) -> bool:
        """Return whether this machine, which has to leave, has no ranks any more, or has waited long enough for them."""
        return self._ranks is None or self._state is State.DONE or time.monotonic() - asked > STOP_SECONDS

    # ---- the leader

    def _ask(self) -> Message | None:
        """Ask the leader what to do. None where there was none just now."""
        try:
            if self._link is None:
                self._link, self._known = self._find_leader(), False
                if self._link is None:
                    return None
            answer = self._link.ask(self._about())
            self._known = True
            return answer
        except OSError as error:
            if isinstance(error, TimeoutError) and self._term is not None:
                self._silent = self._term.number  # its machine may still take connections
            self._lose_leader()
            return None

    def _about(self) -> Message:
        return {
            "id": self._id,
            "host": socket.gethostname(),
            "address": self._address,
            "port": self._port,
            "processes": self._part.rules.processes,
            "state": self._state,
            "attempt": self._attempt,
            "report": None if self._report is None else self._report.as_dict(),
            "leaving": self._leaving is not None,
            "knows": self._memory.digest,
            "memory": None if self._known else self._memory.as_dict(),
        }

    def _obey(self, answer: Message) -> int | None:
        """Do what the leader says. Return the exit code where that is the end."""
        order = Order(answer["order"])
        if order is Order.REFUSE:
            print(f"{socket.gethostname()}: {answer['said']}", file=sys.stderr, flush=True)
            return int(answer["code"])
        if "memory" in answer:
            self._memory = Memory.from_dict(answer["memory"])
        if order is Order.END:
            return int(answer["code"])
        assignment = self._memory.assignment
        if order is Order.WAIT or assignment is None:
            self._end_ranks()
        elif assignment.number != self._attempt:
            self._start_ranks(assignment)
        elif order is Order.BORDER and self._ranks is not None:
            self._ranks.ask_to_save()
        return None

    def _find_leader(self) -> Link | None:
        """Connect to the leader of the newest term, or lead the next one. None: look again."""
        newest, known = self._terms.newest(), self._term
        if newest is None and known is not None and (code := self._terms.outcome()) is not None:
            self._outcome = code  # the run has ended while this machine did not hear
            return None
        if newest is not None and newest.number > self._silent:
            try:
                link = Link(newest.host, newest.port)
            except OSError:
                if known is None:  # of a launch that was killed long ago, perhaps
                    time.sleep(YIELD_SECONDS)
                    self._silent = newest.number
                    return None
            else:
                self._term = newest
                return link
        self._lead(newest)
        return None

    def _lead(self, before: Term | None) -> None:
        """Claim the next term, unless another machine is faster. before: the term of the leader that is lost."""
        own = _Leading(self._part, self._memory, self._incidents)
        term = Term(1 if before is None else before.number + 1, self._id, self._address, own.port)
        if not self._terms.claim(term):
            own.close()
            return
        if self._memory.assignment is not None and before is not None:
            own.take_over(before.id)
        self._own, self._term = own, term

    def _lose_leader(self) -> None:
        """Forget the leader: another is looked for, or this machine becomes it."""
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._own is not None:
            self._own.close()
            self._own = None

    def _is_deposed(self) -> bool:
        """Return whether this machine leads, and others have taken it for lost and follow another."""
        newest = self._terms.newest()
        return newest is not None and newest.id != self._id


class _Leading:
    """The leader's part of a machine: a server in front of a `Leader`."""

    def __init__(self, part: Part, memory: Memory, incidents: IncidentLog) -> None:
        self._part, self._incidents = part, incidents
        self._lock = threading.Lock()
        self._leader = Leader(part.rules, self._tell, self._judged, memory)
        self._server = Server(self._hear, self._lost)
        self.port = self._server.port

    def take_over(self, lost: str) -> None:
        with self._lock:
            self._leader.take_over(lost)

    def tick(self) -> None:
        with self._lock:
            self._leader.tick(time.monotonic())

    def wait_until_told(self) -> None:
        """Wait until every machine has heard of the end."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while self._leader.ended is not None and not self._leader.told and time.monotonic() < deadline:
            time.sleep(ASK_SECONDS / 5)
            self.tick()
        if self._leader.ended is not None:
            Terms(meeting_folder(Path(self._part.output_dir))).end(self._leader.ended)

    def close(self) -> None:
        self._server.close()

    def _hear(self, message: Message) -> Message:
        with self._lock:
            return self._leader.hear(message, time.monotonic())

    def _lost(self, machine: str) -> None:
        with self._lock:
            self._leader.lost(machine, time.monotonic())

    def _tell(self, kind: str, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        if kind:
            self._incidents.write(Incident(kind, text))

    def _judged(self, memory: Memory, first: Failure | None, judgement: Judgement) -> None:
        tell_judgement(first, judgement)
        record_judgement(Path(self._part.output_dir), memory.failures, first, judgement)
