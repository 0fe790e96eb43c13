"""The plan in force on this rank, and how all ranks agree that it still holds or on a new one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from ...parallel.fragment import Fragment
from ..control import Round
from ..digest import text_digest
from ..errors import CheckpointError
from .description import Declaration, Description, declare, join
from .gathering import ChangeGathering, Note
from .plan import NO_FILE, NOTHING, SavePlan

# What a rank says beside what it holds: nothing is in the way; the disk is still at an earlier save; no memory is free.
FREE, DISK_BUSY, NO_MEMORY = "free", "disk busy", "no memory"
NO_PLAN = ""
NO_STEP = 0
"""Of a vote before the first save."""


class Planner:
    """Keeps the plan from save to save. Ranks vote with a digest of what they hold; it is described only when it changed.

    A rank also says which plan it has: one that gave up a save before it got that save's plan must not go on with an older one.
    """

    def __init__(self, host: int | None = None) -> None:
        """host: a number of this rank's host, where ranks of a host share a file."""
        self._host = host
        self.layout = NO_FILE
        self._plan = NO_PLAN  # digest of the description that `layout` was derived from
        self._declarations: tuple[Declaration, ...] = ()
        self._identity: list[Any] = []
        self._mine = b""  # the declarations, described
        self._gathering = ChangeGathering(_join)
        # The coordinator's: the plan of the whole, and the digest of the description that it was made from.
        self._made = NO_PLAN
        self.whole = NOTHING

    def vote(self, talk: Round, fragments: Sequence[Fragment], obstacle: str, step: int = NO_STEP) -> Note:
        """Send what this rank and those that it sends for hold, of which step, and what is in the way of another snapshot.

        Returns the ballot, which is complete on the coordinator. Raises CheckpointError where ranks hold different steps.
        """
        self._declare(fragments, talk.control.rank)
        note = {"plan": self._plan, "step": step, "obstacles": {} if obstacle == FREE else {obstacle: talk.control.rank}}
        return self._gathering.gather(talk, "vote", self._mine, {**note, "left": talk.control.left}, _fold)

    def decide(self, ballot: Note) -> bytes | None:
        """The coordinator's part: the description that all ranks need, or None where the plan in force stands.

        None is made where memory is missing. Raises CheckpointError where the ranks' boxes leave a hole.
        """
        if NO_MEMORY in ballot["obstacles"]:
            return None
        wanted = text_digest(self._gathering.joined)
        if wanted == self._made == ballot["plan"]:
            return None
        if wanted != self._made:
            self.whole = SavePlan.of(Description.decode(self._gathering.joined))
            self._made = wanted
        return self._gathering.joined

    def adopt(self, description: bytes, rank: int) -> None:
        """Derive this rank's share of a new plan from the description of all ranks' state."""
        self.layout = SavePlan.of(Description.decode(description)).lay_out(rank, self._declarations)
        self._plan = text_digest(description)

    def forget(self) -> None:
        """After a failure it is not known who has what: tell everything again, and make the next plan from scratch."""
        self._gathering.forget()
        self._plan = self._made = NO_PLAN

    def _declare(self, fragments: Sequence[Fragment], rank: int) -> None:
        identity = [(f.name, f.role, f.global_shape, f.box, f.splits, f.tensor.dtype) for f in fragments]
        if identity != self._identity or not self._mine:
            self._declarations = declare(fragments)
            self._mine = Description.of(self._declarations, rank, self._host).encode()
            self._identity = identity


def _join(messages: Sequence[bytes]) -> bytes:
    return messages[0] if len(messages) == 1 else join([Description.decode(message) for message in messages]).encode()


def _fold(notes: list[Note]) -> Note:
    """The ballot of several ranks: the plan that all have, who is the first with an obstacle, and what all have left.

    Raises CheckpointError where they save different steps: a checkpoint of both would be of neither.
    """
    steps = sorted({note["step"] for note in notes})
    if len(steps) > 1:
        raise CheckpointError(f"ranks save different steps at once: {', '.join(map(str, steps))}")
    plan = functools.reduce(lambda one, other: one if one == other else NO_PLAN, (note["plan"] for note in notes))
    obstacles: dict[str, int] = {}
    for note in notes:
        for obstacle, rank in note["obstacles"].items():
            obstacles.setdefault(obstacle, rank)
    return {"plan": plan, "step": steps[0], "obstacles": obstacles, "left": min(note["left"] for note in notes)}
