"""Steps that are dealt worker by worker: every document once, in a row of its own worker's, on the ranks of one group."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.data.assignment import any_number
from meshloom.parallel.hybrid.assignment import HybridAssignment
from meshloom.parallel.hybrid.by_worker import WorkerPlan, deal_by_worker, deal_worker, ranks_of_worker
from meshloom.parallel.hybrid.cost import CostModel
from meshloom.parallel.hybrid.planning import assign

COSTS = CostModel(1.0, 50.0, row=20.0)


def dealt(workers: list[list[int]], ranks: int, capacity: int, step: int = 1) -> tuple[WorkerPlan, list[int], list[int]]:
    """Deal documents of these lengths, by worker. Returns the plan, and the lengths and the workers of the documents."""
    lengths = [length for documents in workers for length in documents]
    owners = [worker for worker, documents in enumerate(workers) for _ in documents]
    numbers = [[n for n, owner in enumerate(owners) if owner == worker] for worker in range(len(workers))]

    def deal(lengths: list[int], ranks: int) -> HybridAssignment:
        return deal_worker(lengths, ranks, capacity, COSTS)

    can_run = any_number if step == 1 else partial(_multiple, step)
    return deal_by_worker(lengths, COSTS.documents(lengths), numbers, ranks, capacity, deal, can_run), lengths, owners


def _multiple(step: int, passes: int) -> bool:
    return passes % step == 0


WORKERS = st.lists(st.lists(st.integers(1, 24), max_size=5), min_size=2, max_size=9).filter(any)


@given(WORKERS, st.integers(1, 8), st.integers(24, 60), st.integers(1, 3))
@settings(deadline=None, max_examples=150)
def test_each_row_is_of_one_worker_and_each_worker_of_one_group(
    workers: list[list[int]], ranks: int, capacity: int, step: int
) -> None:
    found, lengths, owners = dealt(workers, ranks, capacity, step)
    plan, size = found.plan, found.groups[0].ranks
    assert plan.lockstep and size * len(found.groups) == ranks
    assert {len(rows) for rows in plan.rows} == {len(each.turns) for each in found.groups} == {plan.passes}
    assert not plan.passes % step
    seen: list[int] = []
    for rank, rows in enumerate(plan.rows):
        told = found.rows_of(rank)
        own = told.own
        turns = [turn for turn in told.turns if turn is not None]
        assert turns == sorted(turns) and sorted(set(turns)) == list(range(len(own))), "workers one after another, each whole"
        for number, (row, turn) in enumerate(zip(rows, told.turns, strict=True)):
            parts = [plan.shared[each] for each in row.shared]
            assert all(each.wave == number and rank in each.members(ranks) for each in parts)
            assert all(each.first // size == (each.first + each.ranks - 1) // size for each in parts), "one group"
            held = [*row.whole, *(each.document for each in parts)]
            assert not held if turn is None else {owners[document] for document in held} <= {own[turn]}
            tokens = sum(lengths[each] for each in row.whole) + sum(-(-lengths[e.document] // e.ranks) for e in parts)
            assert tokens <= capacity
            seen += [*row.whole, *(each.document for each in parts if each.first == rank)]
    assert sorted(seen) == list(range(len(lengths)))
    assert sorted(worker for group in found.groups for worker in group.own) == list(range(len(workers)))


def test_as_few_ranks_share_a_worker_as_hold_it_and_none_is_left_without() -> None:
    assert [ranks_of_worker(tokens, 8, 8, 32) for tokens in (32, 33, 65, 129, 300)] == [1, 2, 4, 8, 8]
    assert [ranks_of_worker(32, workers, 12, 32) for workers in (12, 11, 5, 4, 2)] == [1, 2, 3, 3, 6]
    assert ranks_of_worker(65, 7, 7, 32) == 7, "a group of three would leave one rank over"


def test_documents_are_shared_inside_a_group_alone() -> None:
    found, _, _ = dealt([[40, 8], [40, 3, 3], [30, 16], [40]], 4, 24)
    assert found.groups[0].ranks == 2 and {each.ranks for each in found.plan.shared} == {2}
    assert {each.first for each in found.plan.shared} == {0, 2}


def test_workers_of_a_turn_cost_about_the_same() -> None:
    lengths = [3, 20, 24, 5, 9, 8]
    found, _, _ = dealt([[length] for length in lengths], 2, 24)
    assert [[lengths[worker] for worker in group.own] for group in found.groups] == [[24, 8, 3], [20, 9, 5]]


def test_a_worker_takes_one_row_where_another_planner_takes_many() -> None:
    """Each row sends the whole gradient, which the planner of ordinary steps does not count."""
    lengths, costs = [65_536, 30_000, *[300] * 118], CostModel(1.0, 1000.0, row=512_000.0)
    usual, found = assign(lengths, 4, 36_864, costs, "lockstep"), deal_worker(lengths, 4, 36_864, costs)
    assert usual.passes == 11 and found.passes == 1
    assert found.step_time(lengths, costs) < 1.01 * usual.step_time(lengths, costs)


@pytest.mark.parametrize(("linear", "several"), [(1e-4, True), (100.0, False)])
def test_more_rows_are_taken_where_they_save_more_than_they_send(linear: float, several: bool) -> None:
    """Squares of 6 and 5: shared in a row each they take 30.5, and in one row 43."""
    assert (deal_worker([6, 5], 2, 62, CostModel(1.0, linear)).passes > 1) == several
