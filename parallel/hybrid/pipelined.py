"""Deal documents to pipelines: every row is filled up to the same number of positions, as the stages' messages have one shape.

A row then costs its positions whatever is in it, so that few rows are best, and what is left to balance is attention. The ranks
of a stage run the passes of their rows in an order that follows from the number of rows alone. So all pipelines have as many
rows, and those that share a document hold it in rows of the same number: then no rank waits for one that waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count as naturals

from .assignment import BLANK, HybridAssignment
from .cost import CostModel, least_time
from .lockstep import fewest_rows, first_fast, plans_of_rows

TRIED = (0.5, 0.75, 1.0)
"""Numbers of rows that a plan begins with, over the fewest that hold the tokens. Documents that fit into none get new ones."""
PIPELINED_SHARING = ((1.0, 1.0), (0.25, 0.0), (0.1, 0.0))
"""Ways of sharing that are tried, as `lockstep.SHARING`."""


def pipelined(
    lengths: Sequence[int],
    ranks: int,
    capacity: int,
    costs: CostModel,
    stages: int,
    can_run: Callable[[int], bool],
    *,
    together: bool,
) -> HybridAssignment:
    """Deal documents to `ranks` pipelines of `stages` ranks each, in rows of `capacity` positions.

    costs     of filled rows (`filled`)
    can_run   whether the pipeline's schedule can run this number of rows
    together  whether ranks meet in every row, whatever is in it: tokens travel to the ranks of their experts
    """
    least = fewest_rows(lengths, ranks, capacity)
    cost = costs.documents(lengths)
    plans = plans_of_rows(
        lengths, ranks, capacity, cost, sorted({max(1, round(part * least)) for part in TRIED}), PIPELINED_SHARING
    )
    legal = (replace(_legal(plan, can_run), lockstep=together, stages=stages) for plan in plans)
    slowest = costs.row + max(cost, default=0.0) / ranks
    bound = (least_time(lengths, ranks, capacity, costs) + (stages - 1) * slowest) / stages
    return first_fast(legal, lambda plan: plan.step_time(lengths, costs), bound)


def filled(costs: CostModel, capacity: int) -> CostModel:
    """Return the costs where every row has `capacity` positions: linear ones are the row's, not its documents'."""
    return replace(costs, linear=0.0, row=costs.row + costs.linear * capacity)


def _legal(plan: HybridAssignment, can_run: Callable[[int], bool]) -> HybridAssignment:
    """Fill a plan up with blank rows to a number that the schedule can run."""
    blank = next(n for n in naturals(plan.passes) if can_run(n)) - plan.passes
    return replace(plan, rows=tuple((*rows, *[BLANK] * blank) for rows in plan.rows))
