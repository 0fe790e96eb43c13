"""Deal a step whose gradient's noise is measured worker by worker, so that each worker's gradient can be told.

The workers are the micro-batches of samples that a run without hybrid data parallelism has (`data/assignment.py`). The ranks
are cut into groups of neighbours, as small as can hold a worker in one row each. A group deals the documents of one worker
after another to its ranks, which run their rows together: they add up a worker's gradient while they compute it, so no rank may
be in another row. Each group has a worker in every turn, the dearest in the first: workers of a turn cost about the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from itertools import count as naturals

from ...data.assignment import WorkerRows
from .assignment import HybridAssignment, Row, Shared
from .cost import CostModel
from .lockstep import SHARING, fewest_rows, first_fast, plans_of_rows
from .planning import assign

SENT = 2048
"""Charge for a row: tokens that a rank computes while it sends its gradient once, in bf16 at 50 GB/s and 400 TFLOP/s."""

Deal = Callable[[Sequence[int], int], HybridAssignment]
"""Deal documents of these lengths to so many ranks, which run their rows together."""


@dataclass(frozen=True)
class WorkerPlan:
    """The plan of a measured step.

    plan    all ranks run as many rows, those of a group each at the same time
    groups  how the rows of a group's ranks make up workers, by group
    """

    plan: HybridAssignment
    groups: tuple[WorkerRows, ...]

    @property
    def workers(self) -> int:
        """The number of workers in the batch."""
        return sum(len(group.own) for group in self.groups)

    def rows_of(self, rank: int) -> WorkerRows:
        """Tell how the rows of a rank make up workers."""
        return self.groups[rank // self.groups[0].ranks]


def deal_by_worker(
    lengths: Sequence[int],
    cost: Sequence[float],
    workers: Sequence[Sequence[int]],
    ranks: int,
    capacity: int,
    deal: Deal,
    can_run: Callable[[int], bool],
) -> WorkerPlan:
    """Deal documents of these lengths to `ranks` ranks, in rows of at most `capacity` tokens.

    cost: of each document; workers: by worker, its documents
    can_run: whether a step may have this number of rows, to which it is filled up
    """
    most = max(sum(lengths[document] for document in documents) for documents in workers)
    together = ranks_of_worker(most, len(workers), ranks, capacity)
    groups = ranks // together
    whole: dict[tuple[int, int], tuple[int, ...]] = {}  # by rank and row
    shared: list[Shared] = []
    turns: list[list[int | None]] = [[] for _ in range(groups)]
    owned = _dealt_to_groups([sum(cost[document] for document in documents) for documents in workers], groups)
    rows = 0
    for turn in range(-(-len(workers) // groups)):
        here = {group: workers[own[turn]] for group, own in enumerate(owned) if turn < len(own)}
        plans = {group: deal([lengths[each] for each in documents], together) for group, documents in here.items()}
        passes = max(plan.passes for plan in plans.values())
        for group, plan in plans.items():
            documents, begin = here[group], group * together
            assert all(each.first + each.ranks <= together for each in plan.shared), "a ring leaves its group"
            shared += (
                replace(each, document=documents[each.document], first=begin + each.first, wave=rows + each.wave)
                for each in plan.shared
            )
            for rank, own in enumerate(plan.rows):
                for at, row in enumerate(own):
                    whole[begin + rank, rows + at] = tuple(documents[document] for document in row.whole)
            turns[group] += [turn] * plan.passes
        rows += passes
        for told in turns:
            told += [None] * (rows - len(told))
    filled = next(n for n in naturals(rows) if can_run(n))
    shared.sort(key=lambda each: (each.wave, each.first, each.document))
    held: dict[tuple[int, int], list[int]] = {}
    for number, each in enumerate(shared):
        for rank in each.members(ranks):
            held.setdefault((rank, each.wave), []).append(number)

    def row_of(rank: int, number: int) -> Row:
        return Row(tuple(held.get((rank, number), ())), whole.get((rank, number), ()))

    made = tuple(tuple(row_of(rank, number) for number in range(filled)) for rank in range(ranks))
    padded = [(*each, *[None] * (filled - rows)) for each in turns]
    told = (WorkerRows(together, tuple(own), each) for own, each in zip(owned, padded, strict=True))
    return WorkerPlan(HybridAssignment(made, tuple(shared), lockstep=True), tuple(told))


def deal_worker(lengths: Sequence[int], ranks: int, capacity: int, costs: CostModel, stages: int = 1) -> HybridAssignment:
    """Deal the documents of one worker to ranks that run their rows together, in as few rows as hold them.

    Each row sends the whole gradient once, and a second one keeps the sum so far. So the plan with more rows is taken only
    where it is clearly faster after a charge for each. stages: as `assign`
    """
    usual = assign(lengths, ranks, capacity, costs, "lockstep", stages)
    if ranks == 1:  # nothing is sent
        return usual
    fewest = [fewest_rows(lengths, ranks, capacity)]
    few = plans_of_rows(lengths, ranks, capacity, costs.documents(lengths), fewest, [*SHARING, (0.02, 0.0)])
    plans = chain((replace(plan, stages=stages) for plan in few), [usual])
    return first_fast(plans, lambda plan: plan.step_time(lengths, costs) + SENT * costs.linear * plan.passes, 0.0)


def _dealt_to_groups(cost: Sequence[float], groups: int) -> list[list[int]]:
    """Deal workers of these costs to groups, one each in turn: the dearest that is left to the group with the least so far."""
    order = sorted(range(len(cost)), key=lambda worker: (-cost[worker], worker))
    owned: list[list[int]] = [[] for _ in range(groups)]
    load = [0.0] * groups
    for first in range(0, len(order), groups):
        lightest = sorted(range(groups), key=lambda group: (load[group], group))
        for group, worker in zip(lightest, order[first : first + groups], strict=False):
            owned[group].append(worker)
            load[group] += cost[worker]
    return owned


def ranks_of_worker(tokens: int, workers: int, ranks: int, capacity: int) -> int:
    """Return how many ranks share a worker: as few as hold it in one row each, and as many as leave no rank without one.

    tokens: of the largest worker; workers: in the batch. It divides `ranks`, and is all of them if not even they hold it so.
    """
    enough = (n for n in range(1, ranks) if not ranks % n and n * capacity >= tokens and n * workers >= ranks)
    return next(enough, ranks)
