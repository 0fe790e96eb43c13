"""Knowledge of every machine of a run, so that any can lead it: events so far, and the machines that take part."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from xxhash import xxh3_64_hexdigest

from ..watch.attempts import Attempt


@dataclass(frozen=True)
class NodeRanks:
    """A machine in an attempt: its id, its name, and its ranks, which follow one another."""

    id: str
    host: str
    first_rank: int
    processes: int

    @property
    def said(self) -> str:
        """Its name and ranks, in words."""
        last = self.first_rank + self.processes - 1
        return f"{self.host} (rank {last})" if self.processes == 1 else f"{self.host} (ranks {self.first_rank} to {last})"


@dataclass(frozen=True)
class Assignment:
    """One start of the processes on several machines.

    number  of the attempt, counted from 0
    nodes   the machines, in the order of their ranks
    host    address and port where the ranks' own store is, on the machine of rank 0
    words   overrides of the command line for this number of machines
    term    of the leader that began it
    """

    number: int
    nodes: Sequence[NodeRanks]
    host: str
    port: int
    words: Sequence[str] = ()
    term: int = 0

    @property
    def ids(self) -> list[str]:
        """The ids of its machines."""
        return [node.id for node in self.nodes]

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return sum(node.processes for node in self.nodes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Assignment:
        """Read the plain values that `dataclasses.asdict` gives."""
        nodes = [NodeRanks(**row) for row in values["nodes"]]
        return cls(values["number"], nodes, values["host"], values["port"], values["words"], values["term"])


@dataclass(frozen=True)
class Memory:
    """Events of a run.

    launch      the name of this launch; "": none yet
    assignment  the newest; None: none yet
    failures    attempts that have failed by themselves; one that ended with a lost machine is none
    first       the machine of the rank that failed first, in each of them
    left_out    machines that the run goes on without
    """

    launch: str = ""
    assignment: Assignment | None = None
    failures: Sequence[Attempt] = ()
    first: Sequence[str] = ()
    left_out: Sequence[str] = ()

    @property
    def number(self) -> int:
        """Number of the newest attempt; -1 before the first."""
        return -1 if self.assignment is None else self.assignment.number

    @functools.cached_property
    def digest(self) -> str:
        """A digest of it all: who knows it need not be told."""
        return xxh3_64_hexdigest(json.dumps(self.as_dict()).encode())

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Memory:
        """Read what `as_dict` has given."""
        assignment = None if values["assignment"] is None else Assignment.from_dict(values["assignment"])
        failures = [Attempt(**row) for row in values["failures"]]
        return cls(values["launch"], assignment, failures, values["first"], values["left_out"])
