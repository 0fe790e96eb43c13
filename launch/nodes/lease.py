"""The lease of a leader: a counter in the run's folder. It moves as long as the leader lives, whoever can reach it.

A machine that can't reach the leader can't tell a dead one from a cut network. The counter tells: nobody takes over while
it moves.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

from .refusals import read_refusals
from .terms import Terms

RENEW_SECONDS = 0.5
"""Time between two renewals of a lease."""
LEASE_SECONDS = 5.0
"""A lease that was not renewed for so long is over."""
REFUSED_SECONDS = 1.5
"""The same where the machine that led refuses connections: its agent is gone."""


class LeaseKeeper:
    """Renews a term's lease until it is released. A thread of its own, so that a slow folder delays no answer.

    over      whether another machine leads by now
    apart     hosts that can't reach this leader, if `looks`
    refusals  who does not take part and why, if `looks`
    looks     whether to look for these: while no attempt runs
    """

    def __init__(self, terms: Terms, number: int, say: Callable[[str], None]) -> None:
        """number: of the term; say: prints a sentence without waiting for it."""
        self._terms, self._number, self._say = terms, number, say
        self._stop = threading.Event()
        self._renewed = time.monotonic()
        self.over = self.looks = False
        self.apart: Sequence[str] = ()
        self.refusals: Sequence[str] = ()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()

    @property
    def valid(self) -> bool:
        """True while nobody can have taken over: no newer term was there a moment ago, and the lease moves."""
        return not self.over and time.monotonic() - self._renewed < LEASE_SECONDS

    def release(self) -> None:
        """Give the lease up, so that others need not wait until it is over. Say so if the folder does not take it."""
        self.stop()
        try:
            self._terms.release(self._number)
        except OSError as error:
            self._say(f"{self._terms.folder}: the lease can't be given up ({error})")

    def stop(self) -> None:
        """Renew the lease no more."""
        self._stop.set()
        self._thread.join(RENEW_SECONDS)  # a write that hangs is not waited for

    def _renew(self) -> None:
        count, said = 0, False
        while not self._stop.is_set():
            count += 1
            began = time.monotonic()
            try:
                if self._terms.is_over(self._number):
                    self.over = True
                    return
                self._terms.renew(self._number, count)
                self._renewed = began
                if self.looks:
                    self.apart, self.refusals = self._terms.apart(self._number), read_refusals(self._terms.folder)
            except OSError as error:
                if not said:
                    self._say(f"{self._terms.folder}: the leader can't renew its lease ({error}), and tries again")
                said = True
            self._stop.wait(RENEW_SECONDS)


class LeaseWatch:
    """One machine's view of the newest term's lease, by its own clock: clocks of machines are never compared.

    moves  whether the counter has moved since this machine looked first
    """

    def __init__(self) -> None:
        self.moves = False
        self._seen: tuple[int, int] | None = None
        self._since = 0.0

    def still(self, number: int, count: int | None, now: float) -> float:
        """Return for how many seconds the lease has not moved; infinity if it was given up.

        number: of the term; count: of its lease, None if it was given up; now: seconds of a clock that never goes back
        """
        if count is None:
            self.moves = False
            return math.inf
        seen = (number, count)
        if seen != self._seen:
            self.moves = self._seen is not None and self._seen[0] == number
            self._seen, self._since = seen, now
        return now - self._since
