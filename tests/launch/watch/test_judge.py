"""The rank that keeps a run waiting: told from heartbeats alone, for situations whose culprit is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshloom.launch.watch.judge import (
    ENDED_SECONDS,
    ENDED_STEPS,
    FIRST_SECONDS,
    NAMED_SECONDS,
    NAMED_STEPS,
    SAVE_MARGIN,
    STOPPED_SECONDS,
    STORAGE_SECONDS,
    UNKNOWN_SECONDS,
    RankState,
    describe,
    judge,
    with_missing,
)
from meshloom.parallel.heartbeat import Phase

USUAL: dict[str, Any] = {"usual": 0.1, "longest": 0.1, "step_usual": 1.0}
NAMED = NAMED_STEPS + NAMED_SECONDS
STOPPED = NAMED_STEPS + STOPPED_SECONDS


def state(rank: int, phase: Phase, age: float, step: int = 7, micro_batch: int = 0, **more: Any) -> RankState:
    return RankState(rank, f"node{rank // 2}", 100 + rank, phase, step, micro_batch, age, **{**USUAL, **more})


def ranks(culprit: RankState, *others: RankState) -> list[RankState]:
    return sorted([culprit, *others], key=lambda each: each.rank)


WAITING = [state(0, Phase.EXCHANGE, 40.0), state(2, Phase.EXCHANGE, 40.5)]
SITUATIONS = {
    "stopped, though others are behind it": (state(1, Phase.UPDATE, 6.0, state="T"), [state(0, Phase.EXCHANGE, 5.9)]),
    "stopped while others still beat": (state(1, Phase.BACKWARD, 6.0, state="T"), [state(0, Phase.FORWARD, 0.2)]),
    "its host does not answer": (state(3, Phase.FORWARD, 41.0, state=""), [state(0, Phase.FORWARD, 41.0)]),
    "in an earlier step": (state(1, Phase.EVALUATION, 41.0, step=6), WAITING),
    "in an earlier part of the step": (state(1, Phase.DATA, 601.0), WAITING),
    "at the same part, where others exchange": (state(1, Phase.BACKWARD, 41.0, micro_batch=2), WAITING),
    "by its stack, where all are in the same pass": (
        state(1, Phase.FORWARD, 41.0, collective=False),
        [state(0, Phase.FORWARD, 40.0, collective=True), state(2, Phase.FORWARD, 40.0, collective=True)],
    ),
    "by its stack, where its own could not be read": (
        state(1, Phase.FORWARD, 41.0, collective=None),
        [state(0, Phase.FORWARD, 40.0, collective=True), state(2, Phase.FORWARD, 40.0, collective=True)],
    ),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_rank_that_others_wait_for_is_blamed(name: str) -> None:
    culprit, others = SITUATIONS[name]
    found = judge(ranks(culprit, *others))
    assert found is not None and found.blamed == [culprit] and found.waiting == others and found.ends
    told = describe(found)
    assert f"rank {culprit.rank} ({culprit.host}, pid {culprit.pid})" in told
    assert culprit.phase.word in told.partition(";")[0] and f"{culprit.age:.1f} s" in told


def test_where_nothing_tells_all_are_named() -> None:
    alike = [state(rank, Phase.FORWARD, 50.0) for rank in range(6)]
    found = judge(alike)
    assert found is not None and found.blamed == alike and not found.waiting
    assert "rank 3 (" in describe(found) and "2 more ranks" in describe(found)


@pytest.mark.parametrize(
    ("culprit", "named", "ended"),
    [
        (state(1, Phase.DATA, 0.0, state="T"), STOPPED, STOPPED),
        (state(1, Phase.SAVE, 0.0, state="T", longest=90.0), STOPPED, STOPPED),
        (state(1, Phase.SAVE, 0.0), NAMED, ENDED_STEPS + STORAGE_SECONDS),
        (state(1, Phase.SAVE, 0.0, longest=9.0), 9 * NAMED_STEPS + NAMED_SECONDS, 9 * ENDED_STEPS + STORAGE_SECONDS),
        (state(1, Phase.SAVE, 0.0, longest=0.0), FIRST_SECONDS, 600.0),
        (state(1, Phase.EVALUATION, 0.0), NAMED, ENDED_STEPS + ENDED_SECONDS),
        (state(1, Phase.EVALUATION, 0.0, longest=9.0), 9 * NAMED_STEPS + NAMED_SECONDS, 9 * ENDED_STEPS + ENDED_SECONDS),
        (state(1, Phase.EVALUATION, 0.0, longest=0.0), NAMED, 600.0),
        (state(1, Phase.FORWARD, 0.0), NAMED, ENDED_STEPS + ENDED_SECONDS),
        (state(1, Phase.FORWARD, 0.0, usual=8.0), 8 * NAMED_STEPS + NAMED_SECONDS, 8 * ENDED_STEPS + ENDED_SECONDS),
        (state(1, Phase.FORWARD, 0.0, usual=0.0), NAMED, 600.0),
        (state(1, Phase.FORWARD, 0.0, compiles=True), NAMED, 600.0),
        (state(1, Phase.FORWARD, 0.0, state="D"), NAMED, 600.0),
        (state(1, Phase.DATA, 0.0), NAMED, ENDED_STEPS + STORAGE_SECONDS),
        (
            state(1, Phase.DATA, 0.0, usual=0.1, longest=20.0),
            20 * NAMED_STEPS + NAMED_SECONDS,
            20 * ENDED_STEPS + STORAGE_SECONDS,
        ),
        (state(1, Phase.DATA, 0.0, longest=0.0), NAMED, 600.0),
        (state(1, Phase.DATA, 0.0, step_usual=None), UNKNOWN_SECONDS, 600.0),
        (state(1, Phase.DATA, 0.0, step_usual=None, state="T"), STOPPED, STOPPED),
        (state(1, Phase.DATA, 0.0, step_usual=100.0), 100 * NAMED_STEPS + NAMED_SECONDS, 600.0),
    ],
)
def test_limits_are_learned(culprit: RankState, named: float, ended: float) -> None:
    def at(age: float) -> bool | None:
        found = judge([replace(culprit, age=age), state(0, Phase.EXCHANGE, age, step=8)])
        return None if found is None else found.ends

    assert at(named - 0.1) is None
    assert at(named + 0.1) is (named == ended)
    assert at(ended + 0.1) is True and (at(ended - 0.1) is not True)


def test_a_limit_of_the_users_own_holds() -> None:
    silent = [state(1, Phase.DATA, 12.5), state(0, Phase.EXCHANGE, 12.5)]
    assert [found.ends for limit in (12.0, 13.0) if (found := judge(silent, limit)) is not None] == [True, False]


@pytest.mark.parametrize(
    "patient", [{"phase": Phase.SAVE, "longest": 0.0}, {"phase": Phase.HOOKS}, {"compiles": True}, {"usual": 0.0}]
)
def test_the_users_limit_spares_what_has_no_usual_time(patient: dict[str, Any]) -> None:
    culprit = replace(state(1, Phase.BACKWARD, 500.0), **patient)
    found = judge([culprit, state(0, Phase.EXCHANGE, 500.0, step=8)], 12.0)
    assert found is not None and not found.ends and found.limit == 600.0
    later = judge([replace(culprit, age=601.0), state(0, Phase.EXCHANGE, 601.0, step=8)], 12.0)
    assert later is not None and later.ends


def test_a_slow_hook_is_spared_whoever_is_blamed() -> None:
    """In HOOKS before the update rank 0 seems to be ahead of ranks that already update, and wait for it there."""
    found = judge([state(0, Phase.HOOKS, 200.0), state(1, Phase.UPDATE, 200.0)])
    assert found is not None and not found.ends


def test_a_phase_without_a_usual_time_is_named_after_half_of_the_timeout() -> None:
    for age, named in ((299.0, False), (301.0, True)):
        found = judge([state(0, Phase.HOOKS, age), state(1, Phase.EXCHANGE, age, step=8)])
        assert (found is not None) is named


def test_a_users_limit_does_not_cut_a_save_that_takes_longer() -> None:
    silent = [state(0, Phase.SAVE, 200.0, longest=30.0), state(1, Phase.EXCHANGE, 200.0, step=8)]
    assert [found.limit for limit in (12.0, 500.0) if (found := judge(silent, limit)) is not None] == [420.0, 500.0]


def test_one_of_those_that_save_is_blamed_if_the_others_wait_for_it() -> None:
    writes, waits = (state(rank, Phase.SAVE, 200.0, collective=rank == 1) for rank in range(2))
    found = judge([writes, waits])
    assert found is not None and found.blamed == [writes] and found.ends
    assert judge([replace(writes, longest=0.0, age=61.0), replace(waits, age=61.0)]) is not None  # the first save


@pytest.mark.parametrize("longest", [0.0, 20.0, 70.0])
@pytest.mark.parametrize("collective", [None, True])
def test_a_save_is_spared_as_long_as_it_may_still_give_up_by_itself(longest: float, collective: bool | None) -> None:
    """However short parallel.timeout is: what bounds a save is checkpoint.timeout."""
    learned = 10 * longest + STORAGE_SECONDS if longest else 600.0 * SAVE_MARGIN
    limit = min(600.0 * SAVE_MARGIN, learned)
    for age in (limit - 1, limit + 1):
        writes, waits = (state(rank, Phase.SAVE, age, longest=longest, collective=collective) for rank in range(2))
        found = judge([replace(writes, collective=False), waits], timeout=60.0, save_timeout=600.0)
        assert found is not None and [each.rank for each in found.blamed] == [0] and found.ends is (age > limit)


def test_ranks_that_evaluate_alike_have_until_the_timeout() -> None:
    for collective, ends in ((False, False), (True, True)):
        others = [state(rank, Phase.EVALUATION, 80.0, collective=collective) for rank in range(1, 4)]
        found = judge([state(0, Phase.EVALUATION, 80.0, collective=False), *others])
        assert found is not None and found.ends is ends


def test_tasks_are_bounded_by_the_timeout_alone_if_one_waits_for_another() -> None:
    alike = [state(rank, Phase.TASKS, 5000.0, collective=False) for rank in range(4)]
    assert judge(alike) is None  # all tokenise, or take a mean over many draws
    for age, ends in ((500.0, False), (601.0, True)):
        found = judge([state(0, Phase.TASKS, age, collective=False), state(1, Phase.TASKS, age, collective=True)])
        assert found is not None and [each.rank for each in found.blamed] == [0] and found.ends is ends


@pytest.mark.parametrize("phase", [Phase.DATA, Phase.SAVE])
def test_storage_that_is_slow_for_all_ranks_is_no_ranks_fault(phase: Phase) -> None:
    for age, ends in ((590.0, False), (601.0, True)):
        found = judge([state(rank, phase, age, collective=False) for rank in range(3)])
        assert (found is not None and found.ends) is (ends and phase is Phase.DATA)


def test_islands_wait_for_a_slow_link_as_long_as_it_takes() -> None:
    """And for one that is behind, which may only be named, as long as others of its own may wait for it."""
    assert judge([state(rank, Phase.OUTER, 3000.0) for rank in range(2)]) is None
    for age, ends in ((500.0, False), (601.0, True)):
        found = judge([state(0, Phase.OUTER, age), state(1, Phase.BACKWARD, age, step=5)])
        assert found is not None and [each.rank for each in found.blamed] == [1] and found.ends is ends


def test_a_host_without_news_is_no_fault_while_others_go_on() -> None:
    lost = state(3, Phase.FORWARD, 90.0, state="")
    assert judge([lost, state(0, Phase.EXCHANGE, 5.0)]) is None
    assert judge([lost, state(0, Phase.END, 90.0)]) is None  # the run is done
    assert judge([state(3, Phase.END, 90.0, state=""), state(0, Phase.EXCHANGE, 0.5)]) is None
    assert judge([replace(lost, age=20.0), state(0, Phase.EXCHANGE, 20.0)]) is None
    named = judge([replace(lost, age=35.0), state(0, Phase.EXCHANGE, 35.0)])
    assert named is not None and not named.ends and [each.rank for each in named.blamed] == [3]
    saves = judge([lost, state(0, Phase.SAVE, 90.0)])
    assert saves is not None and not saves.ends


def test_a_rank_that_joins_waits_for_those_that_have_not_begun() -> None:
    joining = state(0, Phase.JOIN, 40.0, step=0, step_usual=None)
    others = [state(1, Phase.START, 60.0, step=0, step_usual=None), joining]
    assert judge(others) is None  # importing may take a while
    late = [replace(each, age=400.0) for each in others]
    found = judge(late)
    assert found is not None and [each.rank for each in found.blamed] == [1] and not found.ends
    assert judge(with_missing([joining], 2)) is None
    found = judge(with_missing([replace(joining, age=400.0)], 2))
    assert found is not None and "rank 1 has not begun for 400.0 s; waiting for it: rank 0 in join" in describe(found)
    assert with_missing(late, 2) == sorted(late, key=lambda each: each.rank)


def test_a_run_with_an_ended_or_a_debugged_rank_is_not_judged() -> None:
    for letter in "XZt":
        assert judge([state(1, Phase.BACKWARD, 900.0, state=letter), state(0, Phase.EXCHANGE, 900.0)]) is None


def test_nobody_is_blamed_while_the_run_goes_on() -> None:
    assert judge([]) is None
    assert judge([state(0, Phase.HOOKS, 50.0), state(1, Phase.DATA, 0.3)]) is None  # rank 0 draws, and rank 1 goes on
    assert judge([state(0, Phase.END, 900.0, step=9)]) is None
    for phase in (Phase.START, Phase.SAVE):  # all do the same, and nobody waits for another
        assert judge([state(rank, phase, 5000.0) for rank in range(2)]) is None
    found = judge([state(0, Phase.SAVE, 700.0), state(1, Phase.EXCHANGE, 700.0, step=8)])
    assert found is not None and [each.rank for each in found.blamed] == [0] and found.ends
