"""Agreement between the ranks of a save or restore: small messages through a key-value store, never a collective.

A process group must not be used from the background while the trainer communicates (both hang); a store may.

Messages to the coordinator, rank 0, go up a tree and are merged on the way, so that no rank waits for more than a few others.
The coordinator's answers are one key that all ranks wait for. Every wait blocks in the store. Who waits long
asks every few seconds whether some rank has aborted, since that rank's word may be held up behind a slow one's.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch._C._distributed_c10d import HashStore, Store

from .errors import CheckpointError

FAN_OUT = 8
"""Ranks of each level of the tree that send to the same rank: as many as a host usually has, so that it has one parent."""
ABORT_SECONDS = 5.0
"""Seconds of a wait between two looks for an abort."""
_MESSAGE, _ABORT = b"m", b"a"  # the first byte of every message
# Whoever waits longer for others waits a little longer in all, so that the rank that is nearest to a lost one names it.
PATIENCE_PER_LEVEL = 0.02  # as a part of the time-out
SECONDS_PER_LEVEL = 0.5
LEVELS = 7  # as of those who wait for everybody


def parent_of(rank: int) -> int:
    """Return the rank that this one sends to: its number with the last digit (base FAN_OUT) that is not zero set to zero."""
    step = 1
    while rank and rank % (step * FAN_OUT) == 0:
        step *= FAN_OUT
    return rank - rank // step % FAN_OUT * step


def children_of(rank: int, world_size: int) -> list[int]:
    """Return the ranks that send to this one, in order. Each stands for a run of ranks from its own number on."""
    found: list[int] = []
    step = 1
    while step < world_size and rank % (step * FAN_OUT) == 0:
        found += [child for child in range(rank + step, rank + step * FAN_OUT, step) if child < world_size]
        step *= FAN_OUT
    return found


@dataclass
class Control:
    """This process's rank among those that save together, and the store through which they exchange messages.

    The store must be fresh for each start of the processes: after an elastic restart wrap it in a PrefixStore named by the
    restart count, or the new ranks would read the dead ones' messages. Each round has a client of the store of its own, so
    that a wait there holds up nobody else.
    """

    rank: int
    world_size: int
    store: Store
    _begun: int = field(default=0, init=False)
    _remembered: list[Round] = field(default_factory=list["Round"], init=False)
    _idle: list[Store] = field(default_factory=list[Store], init=False)
    _lock: Any = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, f"rank {self.rank} of {self.world_size}"
        self.parent = parent_of(self.rank)
        self.children = children_of(self.rank, self.world_size)

    def begin(self, kind: str, timeout: float, key: str = "") -> Round:
        """The next agreement. All ranks must begin the same ones in the same order. key: the setting that `timeout` is."""
        with self._lock:
            self._begun += 1
            talk = Round(self, self._begun, kind, timeout, key)
            self._remembered.append(talk)
        return talk

    @property
    def left(self) -> int:
        """Number of the last round up to which this rank has left all."""
        with self._lock:
            return next((talk.number for talk in self._remembered if not talk.left), self._begun + 1) - 1

    def forget(self, left: int) -> None:
        """Delete what this rank wrote in rounds up to this number, which all ranks have left."""
        with self._lock:
            known = [talk for talk in self._remembered if talk.number <= left]
            del self._remembered[: len(known)]
        for talk in known:
            talk.delete(self.store)

    def lend(self) -> Store:
        """A client of the store for one round."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        store: Any = self.store  # its stub knows no clones
        return store.clone()  # connects, which may take long: nobody else waits for it

    def take_back(self, client: Store) -> None:
        """Keep a client for the next round."""
        with self._lock:
            self._idle.append(client)

    @classmethod
    def alone(cls) -> Control:
        """For one process."""
        return cls(0, 1, HashStore())


class Round:
    """One agreement among all ranks, in steps that all of them take in the same order.

    A step is either a message up the tree (`send` and `collect`) or one down to all (`broadcast` and `receive`). Every wait
    ends with CheckpointError when some rank has called `abort`, whose word goes up to the coordinator and from there to
    all, and also lies where whoever waits long looks for it; or after `timeout` seconds.
    """

    def __init__(self, control: Control, number: int, kind: str, timeout: float, key: str = "") -> None:
        self.control = control
        self.number = number
        self.timeout = timeout
        self.left = False
        self._key = key
        self._prefix = f"checkpoint/{number}-{kind}"
        self._client: Store | None = None
        self._sent = self._collected = self._told = self._heard = 0
        self._aborted = ""
        self._written: list[str] = []  # keys that nobody deletes on reading them
        self._up: list[str] = []  # keys that the reader deletes, if it comes to read them

    def send(self, payload: bytes = b"") -> None:
        """Send this rank's message to its parent; the coordinator has none."""
        if self.control.rank:
            key = f"up/{self.control.rank}/{self._sent}"
            self._up.append(key)
            self._set(key, _MESSAGE + payload)
        self._sent += 1

    def collect(self, topic: str) -> list[bytes]:
        """Wait for the next message of each child, in order. topic: for the message of a time-out."""
        deadline = self._deadline(1 + len(self.control.children) // FAN_OUT)
        found: list[bytes] = []
        for child in self.control.children:
            key = f"up/{child}/{self._collected}"
            sends_for_others = children_of(child, self.control.world_size)
            absent = f"; missing: rank {child}" + (", or one that it sends for" if sends_for_others else "")
            found.append(self._wait(key, topic, deadline, absent))
            self._delete(key)
        self._collected += 1
        return found

    def broadcast(self, payload: bytes) -> None:
        """Send the coordinator's message to all ranks."""
        key = f"down/{self._told}"
        self._written.append(key)
        self._set(key, _MESSAGE + payload)
        self._told += 1

    def receive(self, topic: str) -> bytes:
        """Wait for the coordinator's next message. topic: for the message of a time-out."""
        payload = self._wait(f"down/{self._heard}", topic, self._deadline(LEVELS), "")
        self._heard += 1
        return payload

    def agree(self, topic: str, mine: bytes, merge: Callable[[list[bytes]], bytes], decide: Callable[[bytes], bytes]) -> bytes:
        """One message of each rank up, merged on the way in the ranks' order, and the coordinator's answer down."""
        merged = merge([mine, *self.collect(topic)]) if self.control.children else mine
        self.send(merged)
        if self.control.rank == 0:
            self.broadcast(decide(merged))
        return self.receive(topic)

    def post(self, name: str, payload: bytes) -> None:
        """Leave a message for those that fetch it, once they know that it is there."""
        self._written.append(name)
        self._set(name, payload)

    def fetch(self, name: str) -> bytes:
        """Fetch a message that is there."""
        return self._store().get(f"{self._prefix}/{name}")

    def abort(self, reason: str) -> None:
        """End this round for every rank. The first reason stands."""
        if self._aborted:
            return
        self._aborted = reason if reason.startswith("rank ") else f"rank {self.control.rank}: {reason}"
        message = _ABORT + self._aborted.encode()
        key = f"up/{self.control.rank}/{self._sent}" if self.control.rank else f"down/{self._told}"
        self._written.append(key)
        self._set(key, message)
        self._written.append("abort")
        if not self._store().check([f"{self._prefix}/abort"]):
            self._set("abort", self._aborted.encode())

    def leave(self) -> None:
        """This rank reads nothing more of this round."""
        self.left = True
        client, self._client = self._client, None
        if client is not None:
            self.control.take_back(client)

    def delete(self, store: Store) -> None:
        """Delete what this rank wrote and nobody has deleted. For rounds that all ranks have left."""
        for key in [*self._written, *(self._up if self._aborted else ())]:
            store.delete_key(f"{self._prefix}/{key}")

    def _deadline(self, level: int) -> float:
        return time.monotonic() + self.timeout * (1 + PATIENCE_PER_LEVEL * level) + SECONDS_PER_LEVEL * level

    def _store(self) -> Store:
        if self._client is None:
            self._client = self.control.lend()
        return self._client

    def _set(self, key: str, payload: bytes) -> None:
        store: Any = self._store()  # its stub knows text values only
        store.set(f"{self._prefix}/{key}", payload)

    def _delete(self, key: str) -> None:
        self._store().delete_key(f"{self._prefix}/{key}")

    def _wait(self, key: str, topic: str, deadline: float, absent: str) -> bytes:
        store, full = self._store(), f"{self._prefix}/{key}"
        limit = max(0.001, deadline - time.monotonic())
        self._client = None  # until it has answered: one that is given up may be in the middle of something
        if not _await_key(store, full, limit, self._raise_if_aborted):
            self._raise_if_aborted()  # before a rank is blamed that only was slower
            said = f"{self.timeout:g} s" + (f" ({self._key})" if self._key else "")
            raise CheckpointError(f"rank {self.control.rank}: no answer on “{topic}” within {said}{absent}")
        self._client = store
        payload = store.get(full)
        if payload[:1] == _ABORT:
            raise CheckpointError(payload[1:].decode())
        return payload[1:]

    def _raise_if_aborted(self) -> None:
        """Raise CheckpointError if some rank has aborted this round."""
        key, client = f"{self._prefix}/abort", self.control.lend()
        try:
            reason = client.get(key).decode() if client.check([key]) else ""
        except RuntimeError:
            return  # the store is gone: who waits there says so
        self.control.take_back(client)
        if reason:
            raise CheckpointError(reason)


def _await_key(store: Store, key: str, limit: float, look: Callable[[], None]) -> bool:
    """Wait in the store until it has a key; return whether it came in time. look: raises what ends the wait before

    Another thread does the waiting, while this one looks up now and then: waits in slices would have the store log a warning
    at the end of each. And a signal (Ctrl-C) would find nobody in the interpreter while the main thread is in the store.
    """
    if store.check([key]):
        return True
    outcome: list[bool | BaseException] = []
    over = threading.Event()

    def wait() -> None:
        try:
            outcome.append(_blocked(store, key, limit))
        except BaseException as error:
            outcome.append(error)
        over.set()

    threading.Thread(target=wait, name="checkpoint-wait", daemon=True).start()
    while not over.wait(ABORT_SECONDS):
        look()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _blocked(store: Store, key: str, limit: float) -> bool:
    begun = time.monotonic()
    try:
        store.wait([key], datetime.timedelta(seconds=limit))
    except RuntimeError:  # the stores differ in the class that a time-out has
        if time.monotonic() - begun < 0.9 * limit:
            raise  # the store is gone
        with contextlib.suppress(RuntimeError):
            return store.check([key])
        return False
    return True
