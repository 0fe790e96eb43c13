"""Agreement between the ranks of a save or restore: small messages through a key-value store, never a collective.

A process group must not be used from the background while the trainer communicates (both hang); a store may.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from torch._C._distributed_c10d import HashStore, Store

from .errors import CheckpointError

POLL_SHORTEST = 0.001
POLL_LONGEST = 0.05


@dataclass
class Control:
    """This process's rank among those that save together, and the store through which they exchange messages.

    The store must be fresh for each start of the processes: after an elastic restart wrap it in a PrefixStore named by the
    restart count, or the new ranks would read the dead ones' messages. Give a clone of the trainer's TCPStore, so that
    a wait here does not hold up a wait there.
    """

    rank: int
    world_size: int
    store: Store
    _rounds: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, f"rank {self.rank} of {self.world_size}"

    def begin(self, kind: str, timeout: float, key: str = "") -> Round:
        """The next agreement. All ranks must begin the same ones in the same order. key: the setting that `timeout` is."""
        self._rounds += 1
        return Round(self, f"{self._rounds}-{kind}", timeout, key)

    @classmethod
    def alone(cls) -> Control:
        """For one process."""
        return cls(0, 1, HashStore())


class Round:
    """One agreement among all ranks, under a name that all of them use in the same order.

    Every wait ends early with CheckpointError when some rank has called `abort`, or after `timeout` seconds.
    """

    def __init__(self, control: Control, name: str, timeout: float, key: str = "") -> None:
        self.control = control
        self.timeout = timeout
        self._limit = f"{timeout:g} s" + (f" ({key})" if key else "")
        self._prefix = f"checkpoint/{name}"
        self._written: list[str] = []

    def send(self, topic: str, payload: bytes = b"") -> None:
        """Send this rank's message on a topic to the coordinator."""
        self._set(f"{topic}/{self.control.rank}", payload)
        counter = f"{self._prefix}/{topic}/count"
        if self.control.store.add(counter, 1) == self.control.world_size:
            self._written.append(counter)
            self._set(f"{topic}/all", b"")

    def gather(self, topic: str) -> list[bytes]:
        """Gather the messages of all ranks on a topic, in rank order. Called by the coordinator; waits until all have sent."""
        self._wait(f"{topic}/all", topic)
        return [self.control.store.get(f"{self._prefix}/{topic}/{rank}") for rank in range(self.control.world_size)]

    def broadcast(self, topic: str, payload: bytes) -> None:
        """Broadcast the coordinator's message on a topic to all ranks."""
        self._set(topic, payload)

    def receive(self, topic: str) -> bytes:
        """Wait for the coordinator's message on a topic."""
        self._wait(topic, topic)
        return self.control.store.get(f"{self._prefix}/{topic}")

    def abort(self, reason: str) -> None:
        """End this round for every rank. The first reason stands."""
        if not self.control.store.check([f"{self._prefix}/abort"]):
            self._set("abort", f"rank {self.control.rank}: {reason}".encode())

    def leave(self) -> None:
        """Say that this rank will read nothing more of this round."""
        self.send("left")

    def forget(self) -> bool:
        """Delete what this rank wrote if all ranks have left; return whether they have. The last one leaves nothing."""
        store, last, forgotten = self.control.store, f"{self._prefix}/left/all", f"{self._prefix}/forgotten"
        if not store.check([last]):
            return False
        for key in self._written:
            if key != last:
                store.delete_key(key)
        if store.add(forgotten, 1) == self.control.world_size:
            store.delete_key(last)
            store.delete_key(forgotten)
        return True

    def _set(self, key: str, payload: bytes) -> None:
        store: Any = self.control.store  # its stub knows text values only
        store.set(f"{self._prefix}/{key}", payload)
        self._written.append(f"{self._prefix}/{key}")

    def _wait(self, key: str, topic: str) -> None:
        store = self.control.store
        full, abort = f"{self._prefix}/{key}", f"{self._prefix}/abort"
        deadline = time.monotonic() + self.timeout
        pause = POLL_SHORTEST
        while not store.check([full]):
            if store.check([abort]):
                raise CheckpointError(store.get(abort).decode())
            if time.monotonic() > deadline:
                who = f"rank {self.control.rank}"
                raise CheckpointError(f"{who}: no answer on “{topic}” within {self._limit}{self._absent(topic)}")
            time.sleep(pause)
            pause = min(pause * 1.5, POLL_LONGEST)

    def _absent(self, topic: str) -> str:
        """Name the ranks that have sent nothing, for the message of a time-out."""
        ranks = range(self.control.world_size)
        absent = [rank for rank in ranks if not self.control.store.check([f"{self._prefix}/{topic}/{rank}"])]
        if not absent or len(absent) == self.control.world_size:
            return ""
        shown = ", ".join(map(str, absent[:16])) + (", …" if len(absent) > 16 else "")
        return f"; missing: rank {shown}"
