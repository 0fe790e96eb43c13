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
from pathlib import Path

from ...trainer.watch.folder import AttemptFolder
from ...trainer.watch.incidents import Incident, IncidentLog
from .. import forked
from ..exit_codes import TOO_FEW_MACHINES
from ..parent import when_launcher_dies
from ..watch.attempts import Judgement
from ..watch.failures import Failure, Report
from ..watch.supervisor import Supervisor, record_judgement, tell_judgement
from .leader import GATHER_SECONDS, Leader, Order, State
from .lease import LEASE_SECONDS, REFUSED_SECONDS, LeaseKeeper, LeaseWatch
from .memory import Assignment, Memory
from .part import Part, overlaid
from .ranks import LocalRanks
from .terms import Term, Terms, meeting_folder
from .wire import ANSWER_SECONDS, Link, Message, Server, free_port, is_loopback, own_address

ASK_SECONDS = 0.25
"""Time between two requests to the leader."""
YIELD_SECONDS = 3.0
"""Time for machines that were led by one that is gone to take over, before one that is new does."""
STOP_SECONDS = 60.0
"""Time for ranks to save and end when this machine is told to leave."""
APART_SECONDS = GATHER_SECONDS + 3 * ANSWER_SECONDS
"""Time after which a machine that takes no part in the run ends: a little more than a leader waits for machines."""
RETRY_SECONDS = 1.0
"""Time between two looks at a folder that can't be read or written."""


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
    unfollow = when_launcher_dies(machine.leave)
    try:
        return machine.run()
    finally:
        unfollow()
        signal.signal(signal.SIGTERM, before)
        machine.close()
        supervisor.close()


class Machine:
    """This machine in a run."""

    def __init__(self, part: Part, supervisor: Supervisor) -> None:
        self._part, self._supervisor = part, supervisor
        self._id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self._address, self._port = own_address(part.address), free_port()
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
        self._lease = LeaseWatch()
        self._answered = self._together = time.monotonic()  # heard a leader; was one of enough machines
        self._apart = 0  # term whose leader lives and can't be reached from here
        self._yields = 0.0  # until when others shall lead
        self._said: set[str] = set()

    def leave(self) -> None:
        """Leave the run: this machine's ranks are asked to save and end, and the others go on."""
        if self._leaving is None:
            self._leaving = time.monotonic()

    def run(self) -> int:
        """Ask and obey until the run ends. Return its exit code."""
        if is_loopback(self._address) and self._part.rules.most > 1:
            self._say(f"no other host reaches this one at {self._address}: give launch.address, or an interface's name there")
        while self._outcome is None:
            time.sleep(self.turn())
        return self._outcome

    def turn(self) -> float:
        """Look at the ranks, ask the leader and obey. Return for how many seconds to wait before the next turn."""
        self._look_at_ranks()
        if self._leaving is not None and self._may_leave(self._leaving):
            self._outcome = 0
            return 0.0
        if self._own is not None and self._is_deposed():
            self._lose_leader()
        answer = self._ask()
        if answer is not None:
            self._outcome = self._obey(answer)
        if self._outcome is None and time.monotonic() - self._together > APART_SECONDS:
            self._say(f"this machine took no part in the run for {APART_SECONDS:.0f} s, and ends")
            self._outcome = TOO_FEW_MACHINES
        if self._outcome is not None:
            return 0.0
        if self._own is not None:
            self._own.tick()
            self._give_way(self._own)
        return ASK_SECONDS if answer is not None or self._own is None else ASK_SECONDS / 5

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
        if self._ranks is None or time.monotonic() - asked > STOP_SECONDS:
            return True
        if self._own is not None and self._own.busy:
            return False  # ranks of other machines are still saving, and would be ended by the next leader
        return self._state is State.DONE

    # ---- the leader

    def _ask(self) -> Message | None:
        """Ask the leader what to do. None where there was none just now."""
        if self._link is None:
            try:
                self._link, self._known = self._find_leader(), False
            except OSError as error:
                self._say(f"{self._terms.folder}: {error}; trying again")
                time.sleep(RETRY_SECONDS)
            if self._link is None:
                return None
        try:
            answer = self._link.ask(self._about())
        except OSError as error:
            if isinstance(error, TimeoutError) and self._term is not None:
                self._silent = self._term.number  # its machine may still take connections
            self._lose_leader()
            return None
        self._known, self._answered = True, time.monotonic()
        if self._own is None or not self._own.lacks_machines:
            self._together = self._answered
        return answer

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
        """Connect to the leader of the newest term; lead the next one if that leader is gone. None: look again."""
        newest = self._terms.newest()
        if newest is None:
            if self._term is not None and (code := self._terms.outcome()) is not None:
                self._outcome = code  # the run has ended while this machine did not hear
            else:
                self._lead(None)
            return None
        now = time.monotonic()
        still = self._lease.still(newest.number, self._terms.lease(newest.number), now)
        if self._lease.moves:
            self._silent = 0  # it lives, and may answer again
        error: OSError | None = None
        if newest.number != self._silent:
            try:
                link = Link(newest.host, newest.port)
            except OSError as raised:
                error = raised
            else:
                self._term, self._lease = newest, LeaseWatch()
                self._join()
                return link
        if still >= self._patience(newest, error) and now >= self._yields:
            self._lead(newest)
        elif self._lease.moves:
            self._stand_apart(newest, error)
        return None

    def _patience(self, term: Term, error: OSError | None) -> float:
        """Return for how many seconds the lease of a leader that does not answer must not have moved."""
        if self._term is None:  # of a launch that was killed long ago, perhaps
            return LEASE_SECONDS + YIELD_SECONDS
        gone = isinstance(error, ConnectionRefusedError) and term == self._term
        return REFUSED_SECONDS if gone else LEASE_SECONDS

    def _stand_apart(self, term: Term, error: OSError | None) -> None:
        """Wait for a leader that lives and can't be reached from here. It does not count on this machine's ranks any more."""
        text = f"the leader of the run can't be reached at {term.host}:{term.port} ({error or 'no answer'}), and goes on"
        self._say(f"{text}: this machine waits. If it lasts, give launch.address on the machines, or open the network")
        if self._apart != term.number:
            self._terms.stand_apart(term.number, self._id, socket.gethostname())
            self._apart = term.number
        if self._ranks is not None and time.monotonic() - self._answered > ANSWER_SECONDS:
            self._end_ranks()

    def _join(self) -> None:
        """Take note that the leader can be reached, after all."""
        if self._apart:
            self._terms.rejoin(self._apart, self._id)
            self._apart = 0

    def _give_way(self, own: _Leading) -> None:
        """Let another machine lead, if too few machines reach this one and others can't."""
        if self._term is None or not own.lacks_machines_for(LEASE_SECONDS):
            return
        try:
            hosts = self._terms.apart(self._term.number)
        except OSError:  # the lease is renewed in the same folder, and tells of it
            return
        if hosts:
            self._say(f"{', '.join(hosts)} can't reach this machine at {self._address}:{own.port}: another one is to lead")
            self._yields = time.monotonic() + 2 * LEASE_SECONDS
            self._lose_leader()

    def _lead(self, before: Term | None) -> None:
        """Claim the next term, unless another machine is faster. before: the term of the leader that is gone."""
        own = _Leading(self._part, self._memory, self._incidents, self._terms)
        try:
            term = Term(1 if before is None else before.number + 1, self._id, self._address, own.port)
            if not self._terms.claim(term):
                return
            own.begin(term.number)
            if self._memory.assignment is not None and before is not None:
                own.take_over(before.id, lost=self._terms.lease(before.number) is not None)
            self._own, self._term = own, term
        finally:
            if self._own is not own:
                own.close()

    def _lose_leader(self) -> None:
        """Forget the leader: another is looked for, or this machine becomes it."""
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._own is not None:
            self._own.close()
            self._own = None
        self._lease = LeaseWatch()

    def _is_deposed(self) -> bool:
        """Return whether this machine leads, and another has taken it for lost and leads now."""
        try:
            return self._term is not None and self._terms.is_over(self._term.number)
        except OSError:
            return False  # the next look tells

    def _say(self, text: str) -> None:
        """Print something once."""
        if text not in self._said:
            self._said.add(text)
            print(f"{socket.gethostname()}: {text}", file=sys.stderr, flush=True)


class _Leading:
    """The leader's part of a machine: a server in front of a `Leader`."""

    def __init__(self, part: Part, memory: Memory, incidents: IncidentLog, terms: Terms) -> None:
        self._part, self._incidents, self._terms = part, incidents, terms
        self._lock = threading.Lock()
        self._leader = Leader(part.rules, self._tell, self._judged, memory)
        self._server = Server(self._hear, self._lost)
        self._lease: LeaseKeeper | None = None
        self._lacking: float | None = None
        self.port = self._server.port

    @property
    def busy(self) -> bool:
        """True until the attempt has ended on all machines."""
        return self._leader.busy

    @property
    def lacks_machines(self) -> bool:
        """True while fewer machines are here than the run needs."""
        return self._leader.lacks_machines

    def lacks_machines_for(self, seconds: float) -> bool:
        """Return whether that has been so for a while, as far as calls of this method saw it."""
        now = time.monotonic()
        self._lacking = (self._lacking or now) if self.lacks_machines else None
        return self._lacking is not None and now - self._lacking > seconds

    def begin(self, number: int) -> None:
        """Renew the lease of the term that was claimed."""
        self._lease = LeaseKeeper(self._terms, number)

    def take_over(self, before: str, *, lost: bool) -> None:
        with self._lock:
            self._leader.take_over(before, lost=lost)

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
            if self._lease is not None:
                self._lease.stop()
                self._lease = None
            try:
                self._terms.end(self._leader.ended)
            except OSError as error:
                print(f"{self._terms.folder}: how the run has ended can't be written ({error})", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._server.close()
        if self._lease is not None:
            self._lease.release()
            self._lease = None

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
