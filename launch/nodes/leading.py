"""The leader's part of a machine: a server in front of a `Leader`, and the lease of its term."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ...trainer.watch.incidents import Incident, IncidentLog
from ..watch.attempts import Judgement
from ..watch.failures import Failure
from ..watch.supervisor import record_judgement, tell_judgement
from .admission import is_stranger, refusal
from .announcer import Announcer
from .leader import Leader, Order
from .lease import LeaseKeeper
from .memory import Memory
from .part import Part
from .terms import Term, Terms
from .wire import ANSWER_SECONDS, Message, Server

TICK_SECONDS = 0.05
"""Time between two looks, while machines hear of the end."""


class Leading:
    """Answers machines. Nothing that it does while one waits touches the disk or the terminal.

    term  what it leads; None: nothing yet
    port  where it listens
    """

    def __init__(self, part: Part, memory: Memory, announcer: Announcer, incidents: IncidentLog, terms: Terms) -> None:
        self._part, self._announcer, self._incidents, self._terms = part, announcer, incidents, terms
        self._lock = threading.Lock()
        self._leader = Leader(part.rules, self._tell, self._judged, memory)
        self._server = Server(self._hear, self._lost)
        self._lease: LeaseKeeper | None = None
        self._lacking: float | None = None
        self._begun = threading.Event()
        self.term: Term | None = None
        self.port = self._server.port

    @property
    def busy(self) -> bool:
        """True until the attempt has ended on all machines."""
        return self._leader.busy

    @property
    def deposed(self) -> bool:
        """True once another machine has taken this one for lost, and leads."""
        return self._lease is not None and self._lease.over

    @property
    def apart(self) -> Sequence[str]:
        """The hosts that can't reach this machine, as far as it looks for them: while no attempt runs."""
        return () if self._lease is None else self._lease.apart

    @property
    def lacks_machines(self) -> bool:
        """True while fewer machines are here than the run needs."""
        return self._leader.lacks_machines

    def lacks_machines_for(self, seconds: float) -> bool:
        """Return whether that has been so for a while, as far as calls of this method saw it."""
        now = time.monotonic()
        self._lacking = (self._lacking or now) if self.lacks_machines else None
        return self._lacking is not None and now - self._lacking > seconds

    def begin(self, term: Term, before: str = "", *, lost: bool = True) -> None:
        """Lead the term that was claimed. Machines that have found it already are answered from now on.

        before, lost: see `Leader.take_over`; "": nobody has led the run before, as far as this machine knows
        """
        lease = self._lease = LeaseKeeper(self._terms, term.number, self._say)
        with self._lock:
            self._leader.term, self._leader.leads = term.number, lambda: lease.valid
            if before:
                self._leader.take_over(before, lost=lost)
            self.term = term
        self._begun.set()

    def tick(self) -> None:
        """Decide what is due by now."""
        with self._lock:
            if self._lease is not None:
                self._lease.looks, self._leader.missing = not self._leader.busy, self._lease.refusals
            self._leader.tick(time.monotonic())

    def wait_until_told(self) -> None:
        """Wait until every machine has heard of the end."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while self._leader.ended is not None and not self._leader.told and time.monotonic() < deadline:
            time.sleep(TICK_SECONDS)
            self.tick()
        if self._leader.ended is not None and self.term is not None:
            if self._lease is not None:
                self._lease.stop()
                self._lease = None
            try:
                self._terms.end(self.term, self._leader.ended)
            except OSError as error:
                print(f"{self._terms.folder}: how the run has ended can't be written ({error})", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Listen no more, and give the lease up."""
        self._server.close()
        self._begun.set()  # or requests that came too early would still wait
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _hear(self, message: Message) -> Message:
        self._begun.wait(ANSWER_SECONDS / 2)  # others find a term's file as soon as it is claimed
        term = self.term
        if term is None or is_stranger(message, term):
            led = "nothing" if term is None else f"term {term.number} of {term.run}, {self._part.output_dir}"
            return {"order": Order.STRANGER, "said": f"its machine leads {led}"}
        with self._lock:
            if told := refusal(message, self._part, term):
                return self._leader.refuse(told)
            return self._leader.hear(message, time.monotonic())

    def _lost(self, machine: str) -> None:
        with self._lock:
            self._leader.lost(machine, time.monotonic())

    def _tell(self, kind: str, text: str) -> None:
        self._say(text)
        if kind:
            incident = Incident(kind, text)
            self._announcer.tell(lambda: self._incidents.write(incident))

    def _say(self, text: str) -> None:
        self._announcer.tell(lambda: print(text, file=sys.stderr, flush=True))

    def _judged(self, memory: Memory, first: Failure | None, judgement: Judgement) -> None:
        self._announcer.tell(lambda: tell_judgement(first, judgement))
        folder, failures = Path(self._part.output_dir), list(memory.failures)
        self._announcer.tell(lambda: record_judgement(folder, failures, first, judgement))
