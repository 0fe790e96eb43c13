"""The ranks' agreement on a plan: it is made anew where any rank does not have the one in force."""

from __future__ import annotations

import torch
from torch.distributed import HashStore

from meshloom.checkpoint.control import Control, Round
from meshloom.checkpoint.planner import FREE, NO_MEMORY, Planner
from meshloom.parallel.box import Box
from meshloom.parallel.fragment import Fragment


def rows(low: int, high: int) -> list[Fragment]:
    return [Fragment("w", "weight", (8, 2), Box((low, 0), (high - low, 2)), torch.zeros(high - low, 2))]


class Ranks:
    """Two planners, and their rounds."""

    def __init__(self) -> None:
        store = HashStore()
        self.controls = [Control(rank, 2, store) for rank in range(2)]
        self.planners = [Planner(), Planner()]

    def round(self, cut: int, adopts: tuple[int, ...] = (0, 1), notes: tuple[bytes, bytes] = (FREE, FREE)) -> bool:
        """One agreement in which rank 0 holds the rows before `cut` and rank 1 the others. Returns whether the plan is new."""
        talks: list[Round] = [control.begin("test", 5.0) for control in self.controls]
        held = rows(0, cut), rows(cut, 8)
        for planner, talk, mine, note in zip(self.planners, talks, held, notes, strict=True):
            planner.vote(talk, mine, note)
        _, new = self.planners[0].decide(talks[0])
        for rank in adopts if new else ():
            self.planners[rank].adopt(talks[rank])
        return new

    def agree(self, cut: int) -> bool:
        """Return whether each rank's file is the one that the coordinator will put into the manifest, for these boxes."""
        mine = [planner.layout for planner in self.planners]
        boxes = [layout.placed[0].box for layout in mine]
        return mine == self.planners[0].layouts and boxes == [Box((0, 0), (cut, 2)), Box((cut, 0), (8 - cut, 2))]


def test_a_plan_stands_until_a_rank_holds_something_else() -> None:
    ranks = Ranks()
    assert [ranks.round(cut) for cut in (4, 4, 4, 2, 2)] == [True, False, False, True, False]
    assert ranks.agree(2)


def test_rank_that_missed_the_plan_gets_it_in_the_next_round() -> None:
    """It gave up waiting for it; the coordinator, busy writing, has not yet heard of that and thinks that it stands."""
    ranks = Ranks()
    ranks.round(4)
    assert ranks.round(3, adopts=(0,))
    ranks.planners[1].forget()
    assert ranks.round(3)
    assert ranks.agree(3)


def test_rank_that_returns_to_an_older_plan_gets_it_again() -> None:
    ranks = Ranks()
    ranks.round(4)
    ranks.round(3, adopts=(0,))
    assert ranks.round(4)
    assert ranks.agree(4)


def test_plan_waits_for_memory_and_is_made_in_the_next_round() -> None:
    ranks = Ranks()
    assert not ranks.round(4, notes=(FREE, NO_MEMORY))
    assert ranks.round(4)
    assert ranks.agree(4)
