"""Assignments of documents to ranks: whole, within capacity, near the bound, and beside an integer program."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.parallel.hybrid.assignment import HybridAssignment, Row, Shared, part_tokens
from meshloom.parallel.hybrid.cost import CostModel, least_time
from meshloom.parallel.hybrid.pipelined import filled
from meshloom.parallel.hybrid.planning import METHODS, assign

COSTS = CostModel(quadratic=1 / 45_600, linear=1.0)


def check(plan: HybridAssignment, lengths: list[int], ranks: int, capacity: int) -> None:
    """Every document once, whole or on each of its ranks; no row beyond its capacity; no circle of waiting ranks."""
    in_step = plan.lockstep or plan.stages > 1
    whole = Counter(document for rows in plan.rows for row in rows for document in row.whole)
    assert whole + Counter(each.document for each in plan.shared) == Counter(range(len(lengths)))
    waves = [each.wave for each in plan.shared]
    assert waves == sorted(waves) and all(1 <= each.ranks <= ranks > each.first for each in plan.shared)
    for rank, rows in enumerate(plan.rows):
        mine = [number for row in rows for number in row.shared]
        assert mine == [n for n, each in enumerate(plan.shared) if rank in each.members(ranks)]
        own_waves = [plan.wave(row) for row in rows if row.shared]
        assert len(set(own_waves)) == len(own_waves), "what a rank shares in a wave is in one row"
        for number, row in enumerate(rows):
            assert {plan.shared[n].wave for n in row.shared} <= {number if in_step else plan.wave(row)}
            parts = sum(part_tokens(lengths[plan.shared[n].document], plan.shared[n].ranks) for n in row.shared)
            assert parts + sum(lengths[n] for n in row.whole) <= capacity
        assert in_step or not rows[-1].shared, "a rank's last row is its own"
    assert not in_step or len({len(rows) for rows in plan.rows}) == 1
    timeline = plan.timeline(lengths, COSTS)
    assert all(timeline) and (plan.stages > 1 or plan.step_time(lengths, COSTS) == max(row[-1].ends for row in timeline))


@given(st.lists(st.integers(1, 400), max_size=40), st.integers(4, 9), st.sampled_from(sorted(METHODS)))
@settings(deadline=None, max_examples=200)
def test_every_document_is_dealt_once(lengths: list[int], ranks: int, method: str) -> None:
    plan = assign(lengths, ranks, 100, COSTS, method)
    if method != "static":
        check(plan, lengths, ranks, 100)
    assert max(plan.times(lengths, COSTS)) >= least_time(lengths, ranks, 100, COSTS) * (1 - 1e-12)


@given(st.lists(st.integers(1, 400), max_size=40), st.integers(4, 9), st.integers(2, 4), st.booleans())
@settings(deadline=None, max_examples=60)
def test_pipelines_share_in_rows_of_one_number(lengths: list[int], ranks: int, stages: int, together: bool) -> None:
    costs, method = filled(COSTS, 100), "lockstep" if together else "greedy"
    plan = assign(lengths, ranks, 100, costs, method, stages, lambda count: count % 3 == 0)
    check(plan, lengths, ranks, 100)
    assert plan.passes % 3 == 0 and plan.lockstep is together
    assert plan.step_time(lengths, costs) >= least_time(lengths, ranks, 100, costs) / stages * (1 - 1e-12)
    assert 0 <= plan.waiting(lengths, costs) < 1


def test_a_pipeline_is_as_slow_as_its_slowest_row() -> None:
    """By hand: rows of 3, 1 and 2, and of 1, 4 and 1, through two ranks; the first rows share a document of 2."""
    shared = (Shared(0, 0, 2),)
    rows = (Row((0,), (1,)), Row((), (2,)), Row((), (3,))), (Row((0,)), Row((), (4,)), Row((), (2,)))
    plan = HybridAssignment(rows, shared, stages=2)
    lengths, costs = [2, 2, 1, 2, 4], CostModel(0.0, 1.0)
    assert plan.step_time(lengths, costs) == ((3 + 4 + 1) + 4) / 2
    assert plan.waiting(lengths, costs) == 1 - (6 + 6) / (6 * 2 * 2)


def test_few_rows_are_best_where_all_are_filled() -> None:
    """Short documents fill 5 rows of each of 4 pipelines. Two long ones need all of them, and a row each."""
    lengths = [*[300] * 2, *[30] * 60]
    costs = filled(CostModel(quadratic=1 / 100, linear=1.0, row=5.0), 100)
    assert costs == CostModel(quadratic=1 / 100, linear=0.0, row=105.0)
    plan = assign(lengths, 4, 100, costs, stages=2)
    assert plan.passes == 7 and [each.ranks for each in plan.shared] == [4, 4]


@pytest.mark.parametrize("method", ["greedy", "lockstep"])
@pytest.mark.parametrize("costs", [CostModel(1.0, 0.0), CostModel(0.0, 0.0), CostModel(0.0, 0.0, row=3.0)])
def test_documents_are_dealt_where_tokens_alone_cost_nothing(costs: CostModel, method: str) -> None:
    """As of a user's module that counts only attention's FLOPs."""
    lengths = [150, 90, 60, *[20] * 9]
    plan = assign(lengths, 4, 100, costs, method)
    check(plan, lengths, 4, 100)
    if costs.quadratic and method == "lockstep":
        assert plan.step_time(lengths, costs) <= 1.3 * least_time(lengths, 4, 100, costs)


def fastest(lengths: list[int], ranks: int, capacity: int) -> float:
    """Time of the slowest rank in the best assignment to runs of ranks, by an integer program."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    choices = [
        (document, first, width)
        for document, length in enumerate(lengths)
        for width in range(-(-length // capacity), ranks + 1)
        for first in range(ranks - width + 1)
    ]
    once, load = np.zeros((len(lengths), len(choices) + 1)), np.zeros((ranks, len(choices) + 1))
    load[:, -1] = -1
    for column, (document, first, width) in enumerate(choices):
        once[document, column] = 1
        load[first : first + width, column] = COSTS.document(lengths[document]) / width
    solved = milp(
        [*np.zeros(len(choices)), 1],
        integrality=[*np.ones(len(choices)), 0],
        bounds=Bounds(0, [*np.ones(len(choices)), np.inf]),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(load, -np.inf, 0)],
    )
    assert solved.success
    return float(solved.fun)


@pytest.mark.parametrize("seed", range(6))
def test_greedy_is_near_an_integer_program(seed: int) -> None:
    random = Random(seed)
    lengths = [*(random.randrange(20_000, 120_000) for _ in range(2)), *(random.randrange(500, 12_000) for _ in range(10))]
    best = fastest(lengths, 4, 32_768)
    found = max(assign(lengths, 4, 32_768, COSTS).times(lengths, COSTS))
    assert least_time(lengths, 4, 32_768, COSTS) <= best * (1 + 1e-6)
    assert best * (1 - 1e-6) <= found <= 1.12 * best


def test_lockstep_shares_no_more_than_pays() -> None:
    """Of plans within 1 % the one with fewer messages is chosen: the fastest of these shares among 240 ranks, for 0.7 %."""
    random, costs = Random(0), CostModel(1 / 45_600, 1.0, 512)
    lengths = [int(min(60_000, random.lognormvariate(8, 1.5))) + 1 for _ in range(40)]
    assert sum(each.ranks for each in assign(lengths, 8, 16_384, costs, "lockstep").shared) == 20


def test_static_groups_as_many_ranks_as_the_longest_needs() -> None:
    plan = assign([250, 50, 100], 8, 100, COSTS, "static")
    assert [(each.first, each.ranks) for each in plan.shared] == [(0, 4)] * 3  # 3 ranks hold it; 4 divides 8


def test_a_document_beyond_all_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="401 tokens is longer than 4 rows of 100"):
        assign([401], 4, 100, COSTS)
