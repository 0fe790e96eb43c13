"""One machine's part in a run on several: it asks the leader a few times a second, and starts or ends its ranks as it says.

Any machine may lead. When the leader is lost, the first of the others to notice takes over, with what it knows of the run.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

from ... import __version__
from ...trainer.watch.folder import AttemptFolder
from ...trainer.watch.incidents import IncidentLog
from .. import forked
from ..exit_codes import BAD_CONFIG, TOO_FEW_MACHINES
from ..parent import when_launcher_dies
from ..watch.failures import Report
from ..watch.supervisor import Supervisor
from .addresses import ReservedPort, is_loopback, own_address
from .admission import credentials, unreachable
from .announcer import Announcer
from .leader import GATHER_SECONDS, Order, State
from .leading import Leading
from .lease import LEASE_SECONDS, REFUSED_SECONDS, LeaseWatch
from .memory import Assignment, Memory
from .part import Part, overlaid
from .ranks import KILL_SECONDS, LocalRanks
from .refusals import take_back_refusal, write_refusal
from .terms import Term, Terms, meeting_folder
from .wire import ANSWER_SECONDS, Link, Message

ASK_SECONDS = 0.25
"""Time between two requests to the leader."""
YIELD_SECONDS = 3.0
"""Time for machines that were led by one that is gone to take over, before one that is new does."""
STOP_SECONDS = 60.0
"""Time for ranks to save and end when this machine is told to leave."""
APART_SECONDS = GATHER_SECONDS + 3 * ANSWER_SECONDS
"""Time after which a machine that takes no part in the run ends: a little more than a leader waits for machines."""
SUSPENDED_SECONDS = 3 * ANSWER_SECONDS
"""A turn waits less than this for the leader: after a longer one this machine was suspended, which counts for nothing."""
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
        self._address, self._port = own_address(part.address), ReservedPort()
        self._terms = Terms(meeting_folder(Path(part.output_dir)))
        take_back_refusal(self._terms.folder)
        self._announcer = Announcer()
        self._incidents = IncidentLog(Path(part.output_dir))
        self._memory = Memory()
        self._term: Term | None = None
        self._silent = 0  # the newest term whose leader did not answer
        self._link: Link | None = None
        self._known = False  # whether the leader has this machine's memory
        self._own: Leading | None = None
        self._ranks: LocalRanks | None = None
        self._attempt, self._state = -1, State.WAITING
        self._report: Report | None = None
        self._ending = 0.0  # since when the ranks are to be gone
        self._leaving: float | None = None
        self._outcome: int | None = None
        self._lease = LeaseWatch()
        self._answered = self._together = self._turned = time.monotonic()  # heard a leader; was one of enough machines
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
            self._say(unreachable("this one", self._address))
        while self._outcome is None:
            time.sleep(self.turn())
        return self._outcome

    def turn(self) -> float:
        """Look at the ranks, ask the leader and obey. Return for how many seconds to wait before the next turn."""
        now = time.monotonic()
        if now - self._turned > SUSPENDED_SECONDS:
            self._together += now - self._turned
        self._turned = now
        self._look_at_ranks()
        if self._leaving is not None and self._may_leave(self._leaving):
            self._outcome = 0
            return 0.0
        if self._own is not None and self._own.deposed:
            self._lose_leader()
        answer = self._ask()
        if answer is not None:
            self._outcome = self._obey(answer)
        if self._outcome is None and time.monotonic() - self._together > APART_SECONDS:
            self._outcome = self._refuse(f"it took no part in the run for {APART_SECONDS:.0f} s, and ends", TOO_FEW_MACHINES)
        if self._outcome is not None:
            return 0.0
        if self._own is not None:
            self._own.tick()
            self._give_way(self._own)
        return ASK_SECONDS if answer is not None or self._own is None else ASK_SECONDS / 5

    def close(self) -> None:
        """End this machine's ranks, and what it does as the leader."""
        self._end_ranks()
        while self._ranks is not None and time.monotonic() - self._ending < KILL_SECONDS:
            time.sleep(ASK_SECONDS / 5)
            self._reap(self._ranks)
        if self._own is not None:
            self._own.wait_until_told()
            self._own.close()
        if self._link is not None:
            self._link.close()
        self._port.close()
        self._announcer.close()

    # ---- the ranks

    def _look_at_ranks(self) -> None:
        if self._ranks is None:
            return
        if self._state is State.ENDING:
            self._reap(self._ranks)
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
        """Start the ranks of an attempt, once those of the attempt before are gone: never beside them."""
        self._end_ranks()
        if self._ranks is not None:
            return
        self._attempt, self._state, self._report = assignment.number, State.RUNNING, None
        node, arguments = assignment.ids.index(self._id), overlaid(self._part.arguments, assignment.words)
        self._ranks = LocalRanks(assignment, self._memory.launch, node, self._supervisor.root, arguments)

    def _end_ranks(self) -> None:
        """Kill the ranks. This machine waits for another attempt as soon as they are gone."""
        if self._ranks is None:
            self._state = State.WAITING
            return
        if self._state is not State.ENDING:
            self._supervisor.end_attempt(self._attempt)
            self._ranks.kill()
            self._state, self._ending = State.ENDING, time.monotonic()
        self._reap(self._ranks)

    def _reap(self, ranks: LocalRanks) -> None:
        """Forget killed ranks once they are gone. The system may need long for that: to free memory, or waiting for a disk."""
        left = ranks.left()
        if not left:
            self._ranks, self._state = None, State.WAITING
            self._port.close()
            self._port = ReservedPort()
        elif time.monotonic() - self._ending > KILL_SECONDS:
            names = ", ".join(f"rank {rank} (pid {pid})" for rank, pid in left.items())
            self._say(f"{names} of attempt {self._attempt} was killed and is not gone yet: this machine waits for that")

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
            answer = self._link.ask(self._about(), "order")
        except OSError as error:
            silent = not self._known or isinstance(error, TimeoutError)
            if silent and self._term is not None:  # its machine, or another program there, may still take connections
                self._silent = self._term.number
            self._lose_leader()
            return None
        if answer["order"] == Order.STRANGER and self._term is not None:
            text = f"at {self._term.host}:{self._term.port} is not the leader of this run any more: {answer['said']}"
            self._say(text)
            self._silent = self._term.number
            self._lose_leader()
            return None
        if not self._known:
            self._join()
        self._known, self._answered = True, time.monotonic()
        if self._own is None or not self._own.lacks_machines:
            self._together = self._answered
        return answer

    def _about(self) -> Message:
        assert self._term is not None
        return {
            **credentials(self._term),
            "id": self._id,
            "host": socket.gethostname(),
            "address": self._address,
            "port": self._port.number,
            "state": self._state,
            "attempt": self._attempt,
            "report": None if self._report is None else self._report.as_dict(),
            "leaving": self._leaving is not None,
            "knows": self._memory.digest,
            "memory": None if self._known else self._memory.as_dict(),
            "common": None if self._known else self._part.common,
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
            if answer["said"] and self._own is None:  # a machine that leads has told it
                self._say(f"the run has ended: {answer['said']}")
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
                if code:
                    self._say(f"the run has ended with exit code {code}, while this machine could not reach its leader")
                self._outcome = code
            else:
                self._lead(None)
            return None
        now = time.monotonic()
        still = self._lease.still(newest.number, self._terms.lease(newest.number), now)
        if self._lease.moves and still == 0.0:
            self._silent = 0  # it lives, and may answer again
        error: OSError | None = None
        if why := self._unfit(newest):
            if self._lease.moves:
                self._outcome = self._refuse(why, BAD_CONFIG)
        elif newest.machine != socket.gethostname() and is_loopback(newest.host):
            error = OSError(unreachable(newest.machine, newest.host))
        elif newest.number != self._silent:
            try:
                link = Link(newest.host, newest.port)
            except OSError as raised:
                error = raised
            else:
                self._term = newest
                return link
        if self._outcome is not None:
            return None
        if still >= self._patience(newest, error) and now >= self._yields:
            self._lead(newest)
        elif self._lease.moves:
            self._stand_apart(newest, error)
        return None

    def _unfit(self, term: Term) -> str:
        """Return why this machine can't follow the leader of a term, in a sentence; "" if it can."""
        if term.version != __version__:
            other = term.version or "of an older version"
            return f"{term.machine} leads the run with Meshloom {other}, and this machine has {__version__}"
        return ""

    def _refuse(self, why: str, code: int) -> int:
        """Take no part in the run, and say why, in the run's folder, too. Return the exit code."""
        self._say(f"this machine takes no part in the run: {why}")
        if code == BAD_CONFIG:
            write_refusal(Path(self._part.output_dir), why)
        return code

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
            with contextlib.suppress(OSError):  # the leader looks for its note only while machines are missing
                self._terms.rejoin(self._apart, self._id)
            self._apart = 0

    def _give_way(self, own: Leading) -> None:
        """Let another machine lead, if too few machines reach this one and others can't, or no other host can."""
        alone = is_loopback(self._address) and not own.busy and any(host != socket.gethostname() for host in own.apart)
        if alone or (own.lacks_machines_for(LEASE_SECONDS) and own.apart):
            self._say(f"{', '.join(own.apart)} can't reach this machine at {self._address}:{own.port}: another one is to lead")
            self._yields = time.monotonic() + 2 * LEASE_SECONDS
            self._lose_leader()

    def _lead(self, before: Term | None) -> None:
        """Claim the next term, unless another machine is faster. before: the term of the leader that is gone."""
        own = Leading(self._part, self._memory, self._announcer, self._incidents, self._terms)
        try:
            term = Term(1, self._id, self._address, own.port)
            if before is not None:
                term = replace(term, number=before.number + 1, run=before.run or term.run)
            lost = before is None or self._terms.lease(before.number) is not None
            if not self._terms.claim(term):
                return
            led = before.id if before is not None and self._memory.assignment is not None else ""
            own.begin(term, led, lost=lost)
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
        if self._known:  # the lease was not looked at meanwhile
            self._lease = LeaseWatch()
        self._known = False

    def _say(self, text: str) -> None:
        """Print something once."""
        if text not in self._said:
            self._said.add(text)
            print(f"{socket.gethostname()}: {text}", file=sys.stderr, flush=True)
