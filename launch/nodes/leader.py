"""The machine that leads decides: who takes part, what a failure means, when a machine may join. No sockets, no clock.

Machines ask it a few times a second, each with its own state; the answer is what to do. An attempt ends in one of these ways:

all ranks reached the end            the run ends
a machine is lost                    the next attempt begins with those that are left; it costs no restart
a rank has failed by itself          `judge_attempts` decides, with one count for all machines
a machine waits, or wants to leave   the ranks save at the end of their step, and the next attempt begins
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from ...config.words import counted
from ...trainer.watch.rank import PORT_IS_TAKEN
from ..exit_codes import BAD_CONFIG, NO_PROGRESS, TOO_FEW_MACHINES
from ..watch.attempts import FRUITLESS, Judgement, judge_attempts
from ..watch.failures import Failure, Report, merge
from .memory import Assignment, Memory, NodeRanks
from .part import Rules
from .wire import ANSWER_SECONDS, Message

RECONNECT_SECONDS = 0.5
"""A machine whose connection has ended is lost if it does not ask again within so many seconds."""
ENDING_SECONDS = 60.0
"""Time for killed ranks of a machine to be gone: the system may have to give back much memory, or wait for a disk."""
PORTS = 3
"""Times in a row that ranks meet at another port, where the first one was taken meanwhile."""
SETTLE_SECONDS = 2.0
"""Time for further machines to come when one waits to join, and for further reports when a rank has failed."""
SURVIVOR_SECONDS = 15.0
"""Time for a machine that took part in the last attempt to end its ranks and come to the next."""
SUSPENDED_SECONDS = ANSWER_SECONDS / 2
"""A leader that has decided nothing for so long was suspended itself: silence until then counts for nobody."""
GATHER_SECONDS = 600.0
"""Time for enough machines to come."""


class State(StrEnum):
    """State of a machine's ranks. ENDING: they were killed and are not gone. DONE: all have ended with exit code 0."""

    ENDING = "ending"
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Order(StrEnum):
    """An order to a machine. BORDER: let its ranks save and end. WAIT: end its ranks, and ask again.

    STRANGER: this leader is not its own, which it has to look for.
    """

    WAIT = "wait"
    RUN = "run"
    BORDER = "border"
    END = "end"
    REFUSE = "refuse"
    STRANGER = "stranger"


IDLE = (State.WAITING, State.ENDING)
"""States of a machine that takes part in no attempt."""


@dataclass
class Node:
    """A machine, as it showed itself last. gone: when its connection ended."""

    id: str
    host: str
    address: str
    port: int
    joined: float
    heard: float
    state: State = State.WAITING
    attempt: int = -1
    report: Report | None = None
    leaving: bool = False
    gone: float | None = None


@dataclass
class Leader:
    """Leads a run. Not for several threads at a time.

    tell     prints a sentence, and keeps it as an incident of this kind, if there is one: (kind or "", sentence)
    judged   called with the first failure of an attempt and what is decided about it
    memory   what has happened; a leader that takes over begins with what it knew as one of the others
    leads    whether this machine leads, and still does: else it begins no attempt, and ends no run for want of machines
    term     number of this leader's term
    missing  who does not take part and why, as far as it is known
    ended    exit code of the run once it is over
    why      the reason for an end that is no success, which the other machines are told; "": there is none
    """

    rules: Rules
    tell: Callable[[str, str], None]
    judged: Callable[[Memory, Failure | None, Judgement], None]
    memory: Memory = field(default_factory=Memory)
    ended: int | None = None
    why: str = ""
    leads: Callable[[], bool] = lambda: False
    term: int = 0
    missing: Sequence[str] = ()
    _nodes: dict[str, Node] = field(default_factory=dict[str, Node])
    _running: bool = False
    _border: bool = False
    _expected: set[str] = field(default_factory=set[str])
    _since: float | None = None
    _failed: float | None = None
    _told: str = ""
    _ticked: float | None = None
    _adopting: float | None = None
    _refused: str = ""
    _ports_taken: int = 0
    _lacks: bool = True

    def take_over(self, before: str, *, lost: bool = True) -> None:
        """Begin after the machine that led before, as one of the others. lost: else it has given up the lead by itself.

        A machine that led without ranks of its own leaves those of the others as they are: their attempt goes on.
        """
        assignment = self.memory.assignment
        assert assignment is not None
        self._expected = set(assignment.ids) - {before}
        if before not in assignment.ids:
            self._adopting = SURVIVOR_SECONDS
        elif lost:
            self._tell_lost([node for node in assignment.nodes if node.id == before])

    def hear(self, message: Message, now: float) -> Message:
        """Answer a machine. now: seconds of a clock that never goes back."""
        node = self._nodes.get(message["id"])
        if node is None:
            node = Node(message["id"], message["host"], message["address"], message["port"], now, now)
        self._nodes[node.id] = node
        node.heard, node.gone, node.port = now, None, message["port"]
        node.state, node.attempt, node.leaving = State(message["state"]), message["attempt"], message["leaving"]
        node.report = None if message["report"] is None else Report.from_dict(message["report"])
        known = None if message["memory"] is None else Memory.from_dict(message["memory"])
        if known is not None and known.number > self.memory.number and not self._running:  # that machine was here before
            self.memory = known
            assert known.assignment is not None
            self._expected = {each for each in known.assignment.ids if each in self._nodes}
            self._adopting, self._since = SETTLE_SECONDS, now
        self.tick(now)
        return self._answer(node, message["knows"])

    def refuse(self, told: str) -> Message:
        """Return the answer to a machine that does not fit, and tell people. It is the reason if too few others come."""
        if told != self._refused:
            self._refused = told
            self.tell("nodes", told)
        return {"order": Order.REFUSE, "code": BAD_CONFIG, "said": told}

    def lost(self, node: str, now: float) -> None:
        """Take note that a machine's connection has ended."""
        if node in self._nodes:
            self._nodes[node].gone = now

    def tick(self, now: float) -> None:
        """Decide what is due by now."""
        if self.ended is not None:
            return
        if self._ticked is not None and now - self._ticked > SUSPENDED_SECONDS:
            for each in self._nodes.values():
                each.heard = now
            self._since = None if self._since is None else self._since + now - self._ticked
            self._failed = None if self._failed is None else self._failed + now - self._ticked
        self._ticked = now
        gone = [each for each in self._nodes.values() if _is_lost(each, now)]
        for each in gone:
            del self._nodes[each.id]
            self._expected.discard(each.id)
        if self._running:
            self._watch(now)
        else:
            self._gather(now)

    @property
    def told(self) -> bool:
        """True once every machine has heard of the end."""
        return not self._nodes

    @property
    def lacks_machines(self) -> bool:
        """True while fewer machines are here than the run needs."""
        return self._lacks and not self._running and self._adopting is None

    @property
    def busy(self) -> bool:
        """True until the attempt has ended on all machines."""
        return self._running

    def _waiting(self) -> list[Node]:
        """Return the machines that may take part in the next attempt."""
        found = [each for each in self._nodes.values() if each.state is State.WAITING and not each.leaving]
        return [each for each in found if each.id not in self.memory.left_out]

    def _staying(self, assignment: Assignment) -> set[str]:
        """Return the machines of an attempt that are here, and do not want to leave."""
        return {each for each in assignment.ids if each in self._nodes and not self._nodes[each].leaving}

    # ---- before an attempt

    def _gather(self, now: float) -> None:
        self._since = now if self._since is None else self._since
        if self._adopting is not None and self._adopts(now - self._since):
            return
        waiting = self._waiting()
        size, late = self.rules.size(len(waiting)), now - self._since
        self._lacks = not size
        if self.memory.assignment is not None:
            here = {each.id for each in waiting}
            ending = {each.id for each in self._nodes.values() if each.state is State.ENDING}
            patience = ENDING_SECONDS if self._expected & ending else SURVIVOR_SECONDS
            ready = self._expected <= here or late > patience
        else:
            newest = max((each.joined for each in waiting), default=now)
            ready = len(waiting) >= self.rules.most or now - newest >= self.rules.join_seconds
        if size and ready:
            if self.leads():
                self._begin(waiting, size)
        elif not size and late > GATHER_SECONDS:
            if not self.leads():
                return
            reasons = list(filter(None, [self._refused, *self.missing]))
            why = "".join(f"; {reason}" for reason in reasons)
            self.why = f"too few machines came in {GATHER_SECONDS:.0f} s: {self._count(len(waiting))}{why}"
            self.tell("end", self.why)
            # A run that has begun had enough machines with such a config.
            self.ended = BAD_CONFIG if reasons and self.memory.assignment is None else TOO_FEW_MACHINES
        elif not size and late > SETTLE_SECONDS:
            why = "".join(f"; {reason}" for reason in self.missing)
            self._say(f"waiting for machines: {self._count(len(waiting))}{why}")

    def _adopts(self, late: float) -> bool:
        """Go on with the attempt of an earlier leader if all of its machines are in it; return whether to wait for that."""
        assignment = self.memory.assignment
        assert assignment is not None and self._adopting is not None
        there = [self._nodes[each] for each in assignment.ids if each in self._nodes]
        there = [each for each in there if each.attempt == assignment.number]
        if len(there) == len(assignment.nodes) and all(each.state not in IDLE for each in there):
            self._running, self._border, self._failed, self._told = True, False, None, ""
        elif late <= self._adopting and all(each.state not in IDLE for each in there):
            return True
        else:
            self._expected |= self._staying(assignment)
        self._adopting = None
        return self._running

    def _count(self, here: int) -> str:
        return f"{here} of at least {min(self.rules.placements)} are here"

    def _begin(self, waiting: Sequence[Node], size: int) -> None:
        """Begin an attempt. Machines keep their order, so that rank 0 moves only when it must."""
        before = [] if self.memory.assignment is None else self.memory.assignment.ids
        order = sorted(waiting, key=lambda each: (before.index(each.id) if each.id in before else len(before), each.joined))
        chosen = order[:size]
        count = self.rules.processes
        nodes = [NodeRanks(each.id, each.host, number * count, count) for number, each in enumerate(chosen)]
        words = self.rules.placements[size]
        first = chosen[0]
        assignment = Assignment(self.memory.number + 1, nodes, first.address, first.port, words, self.term)
        self.memory = replace(self.memory, launch=self.memory.launch or f"launch-{secrets.token_hex(4)}", assignment=assignment)
        self._running, self._border, self._failed, self._told = True, False, None, ""
        if assignment.number and set(before) != set(assignment.ids):
            added = f", with {' '.join(words)}" if words else ""
            self.tell("nodes", f"the run goes on with {counted(size, 'machine')}{added}")

    # ---- during an attempt

    def _watch(self, now: float) -> None:
        assignment = self.memory.assignment
        assert assignment is not None
        missing = [each for each in assignment.nodes if each.id not in self._nodes]
        here = [self._nodes[each.id] for each in assignment.nodes if each.id in self._nodes]
        here = [each for each in here if each.attempt == assignment.number]
        failed = [each for each in here if each.state is State.FAILED]
        idle = [each for each in here if each.state in IDLE]
        if idle:
            names = ", ".join(each.host for each in idle)
            self.tell("node_lost", f"{names} was cut off and has ended its ranks: the run goes on from what is saved")
            self._next(now)
        elif missing:
            self._tell_lost(missing)
            self._next(now)
        elif failed:
            self._failed = now if self._failed is None else self._failed
            reports = [each.report for each in failed if each.report is not None]
            # A machine that is lost shows by its silence later than by what its peers' ranks say.
            patience = ANSWER_SECONDS + SETTLE_SECONDS if all(each.follows for each in reports) else SETTLE_SECONDS
            if len(failed) == len(assignment.nodes) and not all(each.follows for each in reports):
                patience = RECONNECT_SECONDS
            if now - self._failed >= patience:
                self._judge(reports, now)
        elif len(here) == len(assignment.nodes) and all(each.state is State.DONE for each in here):
            if self._border:
                self._next(now)
            else:
                self.ended = 0
        elif not self._border:
            self._border = self._wants_border(assignment, now)

    def _wants_border(self, assignment: Assignment, now: float) -> bool:
        """Return whether to begin anew after this step, for a machine that waits to join or wants to leave."""
        staying = self._staying(assignment)
        spare = [each for each in self._waiting() if each.id not in assignment.ids]
        for each in assignment.nodes:
            if each.id not in staying:
                self.tell("nodes", f"{each.said} leaves at the end of the step: its launcher has ended")
        larger = self.rules.size(len(staying) + len(spare)) > len(assignment.nodes)
        if larger and now - min(each.joined for each in spare) >= SETTLE_SECONDS:
            hosts = ", ".join(each.host for each in spare)
            self.tell("nodes", f"{hosts} joins at the end of the step, once the run has saved")
            return True
        return len(staying) < len(assignment.ids)

    def _judge(self, reports: Sequence[Report], now: float) -> None:
        assignment = self.memory.assignment
        assert assignment is not None
        attempt, first = merge(reports)
        taken = first is not None and PORT_IS_TAKEN in first.error and re.search(rf"\b{assignment.port}\b", first.error)
        if taken and not attempt.last and self._ports_taken < PORTS:
            self._ports_taken += 1
            self.tell("nodes", f"port {assignment.port} of {assignment.host} was taken meanwhile: the ranks meet at another")
            self._next(now)
            return
        self._ports_taken = 0
        owner = next(each.id for each in assignment.nodes if 0 <= (attempt.rank or 0) - each.first_rank < each.processes)
        failures = [*self.memory.failures, attempt]
        self.memory = replace(self.memory, failures=failures, first=[*self.memory.first, owner])
        judgement = judge_attempts(failures, self.rules.max_restarts)
        judgement = self._without_bad_machine(judgement)
        self.judged(replace(self.memory, failures=failures), first, judgement)
        if judgement.again:
            self._next(now)
        else:
            self.why = judgement.said if first is None else f"{first.message}; {judgement.said}"
            self.ended = judgement.code

    def _without_bad_machine(self, judgement: Judgement) -> Judgement:
        """Leave out the machine whose ranks were always the first to die, where there are enough others."""
        first, failures = self.memory.first[-FRUITLESS - 1 :], self.memory.failures[-FRUITLESS - 1 :]
        always = judgement.code == NO_PROGRESS and len(set(first)) == 1 and not any(each.error for each in failures)
        others = [each for each in self._nodes if each != first[-1] and each not in self.memory.left_out]
        if judgement.again or not always or not self.rules.size(len(others)):
            return judgement
        left_out = [*self.memory.left_out, first[-1]]
        self.memory = replace(self.memory, left_out=left_out, failures=[], first=[])
        host = self._nodes[first[-1]].host
        return Judgement(True, judgement.code, f"{judgement.said}: it goes on without {host}, whose ranks always die first")

    def _next(self, now: float) -> None:
        """End the attempt; the next one begins once those that are left have come."""
        assignment = self.memory.assignment
        assert assignment is not None
        self._expected = self._staying(assignment) - set(self.memory.left_out)
        self._running, self._border, self._since = False, False, now

    # ---- answers

    def _answer(self, node: Node, knows: str) -> Message:
        if node.id in self.memory.left_out:
            return {"order": Order.REFUSE, "code": NO_PROGRESS, "said": "the run goes on without this machine"}
        news = {} if knows == self.memory.digest else {"memory": self.memory.as_dict()}
        if self.ended is not None:
            del self._nodes[node.id]
            return {**news, "order": Order.END, "code": self.ended, "said": self.why}
        assignment = self.memory.assignment
        if (self._running or self._adopting is not None) and assignment is not None and node.id in assignment.ids:
            return {**news, "order": Order.BORDER if self._border else Order.RUN}
        return {**news, "order": Order.WAIT}

    def _tell_lost(self, nodes: Sequence[NodeRanks]) -> None:
        names = ", ".join(each.said for each in nodes)
        self.tell("node_lost", f"{names} is lost: its launcher does not answer; the run goes on from what is saved")

    def _say(self, text: str) -> None:
        """Tell something once."""
        if text != self._told:
            self._told = text
            self.tell("", text)


def _is_lost(node: Node, now: float) -> bool:
    return now - node.heard > ANSWER_SECONDS or (node.gone is not None and now - node.gone > RECONNECT_SECONDS)
