"""The ranks' agreement on a plan: it is made anew where any rank does not have the one in force."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import HashStore

from meshloom.checkpoint.control import Control, Round
from meshloom.checkpoint.errors import CheckpointError
from meshloom.checkpoint.planning.planner import FREE, NO_MEMORY, Planner
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

    def round(self, cut: int, adopts: tuple[int, ...] = (0, 1), notes: tuple[str, str] = (FREE, FREE)) -> bool:
        """One agreement in which rank 0 holds the rows before `cut` and rank 1 the others. Returns whether the plan is new."""
        talks: list[Round] = [control.begin("test", 5.0) for control in self.controls]
        held = rows(0, cut), rows(cut, 8)
        self.planners[1].vote(talks[1], held[1], notes[1])  # the coordinator comes last: it waits for the others
        description = self.planners[0].decide(self.planners[0].vote(talks[0], held[0], notes[0]))
        for rank in adopts if description else ():
            self.planners[rank].adopt(description or b"", rank)
        return description is not None

    def agree(self, cut: int) -> bool:
        """Return whether each rank writes what it holds, and the coordinator's part of the manifest says so."""
        boxes = [planner.layout.placed[0].box for planner in self.planners]
        whole = self.planners[0].whole
        (array,) = whole.arrays.values()
        told = [box for _, box in whole.tilings[array.tiling].parts(4, array.turn)]
        return boxes == told == [Box((0, 0), (cut, 2)), Box((cut, 0), (8 - cut, 2))]


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


def test_ranks_that_save_different_steps_are_refused() -> None:
    """A checkpoint of both would be of neither, and their shapes do not tell."""
    ranks = Ranks()
    talks = [control.begin("test", 5.0) for control in ranks.controls]
    ranks.planners[1].vote(talks[1], rows(4, 8), FREE, step=3)
    with pytest.raises(CheckpointError, match="different steps at once: 3, 4"):
        ranks.planners[0].vote(talks[0], rows(0, 4), FREE, step=4)


def test_plan_waits_for_memory_and_is_made_in_the_next_round() -> None:
    ranks = Ranks()
    assert not ranks.round(4, notes=(FREE, NO_MEMORY))
    assert ranks.round(4)
    assert ranks.agree(4)
