"""Identity of a run: an id, made when the run begins, that its checkpoints and folders carry.

A run that goes on from its own checkpoint keeps its id. Every other start makes a new one and notes its parent, the
checkpoint that it began from. So two runs in one folder are never taken for each other.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Parent:
    """The checkpoint of another run that a run began from."""

    id: str
    step: int


@dataclass(frozen=True)
class RunIdentity:
    """The id of a run. parent: the run that it branched off from; None if it began with fresh or imported weights."""

    id: str
    parent: Parent | None = None

    @classmethod
    def new(cls, parent: Parent | None = None) -> RunIdentity:
        """An identity that no other run has."""
        return cls(uuid.uuid4().hex, parent)

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> RunIdentity:
        """Take back what `as_dict` gave. Raises ValueError for an id that can't be part of a file's name."""
        parent = fields["parent"]
        if not re.fullmatch(r"\w[\w-]*", fields["id"]):
            raise ValueError(f"{fields['id']!r} is no id of a run")
        return cls(fields["id"], None if parent is None else Parent(parent["id"], parent["step"]))


UNNAMED = RunIdentity("unnamed")
"""Any run whose checkpoints were saved before runs had ids. It keeps this one when it goes on."""
