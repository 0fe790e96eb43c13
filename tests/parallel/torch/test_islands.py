"""Local updating through the trainer's own loop, beside a bare PyTorch loop with a model for each island, in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from meshloom.optim.local.config import SYNCHRONOUS, LocalConfig
from meshloom.optim.optimizers.own_arrays import RUN
from meshloom.parallel.box import Box
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.fragment import Fragment
from meshloom.parallel.torch.islands import of_first_island
from meshloom.parallel.torch.travel import Header, mean_loss
from support.islands import Curve, Spoilt, plain_islands, trained_islands
from support.parity import Work, plain_run
from support.ranks import run_ranks

TOLERANCE, ROUNDED = 1e-9, 2e-3
"""The second where differences travel in fewer bits than the oracle's."""
ROUND = LocalConfig(islands=2, inner_steps=3)
"""DiLoCo."""
LATE = replace(ROUND, inner_steps=4, delay=2, mix=0.5)
METHODS = {
    "DiLoCo": ROUND,
    "local SGD": replace(ROUND, lr=1.0, momentum=0.0, nesterov=False),
    "CO2, one round late": replace(ROUND, lr=1.0, momentum=0.2, nesterov=False, delay=3),
    "DiLoCo in bf16": replace(ROUND, dtype="bf16"),
    "DiLoCo in int8": replace(ROUND, dtype="int8"),
    "in fragments": replace(ROUND, fragments=2),
    "in fragments, late, mixed": replace(ROUND, fragments=2, inner_steps=4, delay=1, mix=0.5),
    "late, ended a step after a round": LATE,
    "late, ended as a mean arrives": replace(LATE, lr=1.0, momentum=0.0, nesterov=False),
}
STEPS = {"late, ended a step after a round": 5, "late, ended as a mean arrives": 6}
WORK = Work(ParallelConfig(zero=1), micro=2, steps=8, samples=7, lr=2e-3)
"""Two micro-batches for each of two islands. CO2 and fragments end while differences are under way, too."""
ALONE = ParallelConfig(zero=1)
CASES: dict[int, dict[tuple[str, str], ParallelConfig]] = {
    2: {(method, "one rank each"): ALONE for method in METHODS},
    4: {
        **{(method, "ZeRO-1"): ALONE for method in ("CO2, one round late", "in fragments, late, mixed")},
        ("in fragments, late, mixed", "ZeRO-0"): ParallelConfig(zero=0),
        ("DiLoCo", "ZeRO-3"): ParallelConfig(zero=3),
        ("DiLoCo", "tp 2"): ParallelConfig(tp=2, zero=1),
    },
}
"""Number of ranks, in two islands → (method, layout of an island)."""


def work_of(method: str) -> Work:
    return replace(WORK, local=METHODS[method], steps=STEPS.get(method, WORK.steps))


@cache
def oracle(method: str) -> list[Curve]:
    """The curves of all islands."""
    return plain_islands(work_of(method))


def difference(expected: Curve, found: Curve) -> float:
    """Return the largest relative difference of a loss."""
    pairs = list(zip([*expected.losses, expected.evaluated], [*found.losses, found.evaluated], strict=True))
    pairs += zip(expected.joint_losses, found.joint_losses, strict=False)  # what arrives at the end has no row
    return max(abs(one - other) / one for one, other in pairs)


@pytest.mark.parametrize("ranks", CASES)
def test_islands_train_as_models_joined_by_pytorchs_sgd(ranks: int) -> None:
    """And all islands hold the same outer weights to the bit, in whatever they travel."""
    cases = CASES[ranks]
    works = [replace(work_of(method), parallel=parallel) for (method, _), parallel in cases.items()]
    results = run_ranks(ranks, trained_islands, works)
    worst = {
        (name, island): difference(oracle(name[0])[island], found)
        for at, name in enumerate(cases)
        for island, found in (rank[at] for rank in results)
    }
    limits = {case: ROUNDED if METHODS[case[0]].dtype in ("bf16", "int8") else TOLERANCE for case in cases}
    assert {name: each for name, each in worst.items() if not each < limits[name[0]]} == {}
    assert [len({rank[at][1].evaluated for rank in results}) for at in range(len(cases))] == [1] * len(cases)


SPOILT = Spoilt(island=1, step=2, factor=-30.0)
MEDIAN = replace(ROUND, islands=3, aggregate="geometric_median")
SPOILT_CASES: dict[int, list[tuple[LocalConfig, ParallelConfig]]] = {
    3: [(MEDIAN, ALONE), (replace(MEDIAN, aggregate="mean"), ALONE), (replace(MEDIAN, fragments=2), ALONE)],
    6: [(MEDIAN, ParallelConfig(tp=2, zero=1)), (MEDIAN, ParallelConfig(zero=0))],
}
"""Number of ranks, in three islands → (method, layout of an island)."""


@pytest.mark.parametrize("ranks", SPOILT_CASES)
def test_an_island_of_wrong_weights_breaks_the_mean_and_not_the_median(ranks: int) -> None:
    """It is that of the whole differences by Newton's method, also where ranks hold parts of them."""
    works = [replace(WORK, local=local, parallel=parallel, steps=6) for local, parallel in SPOILT_CASES[ranks]]
    results = run_ranks(ranks, trained_islands, works, SPOILT)
    good = plain_islands(replace(WORK, local=MEDIAN, steps=6))[0].evaluated
    for at, work in enumerate(works):
        expected = plain_islands(work, spoilt=SPOILT)
        limit = (
            TOLERANCE if work.local.aggregate == "geometric_median" else 1e-6
        )  # losses of broken weights are ill-conditioned
        for island, found in (rank[at] for rank in results):
            assert difference(expected[island], found) < limit, work
        worse = expected[0].evaluated / good
        assert 0.99 < worse < 1.01 if work.local.aggregate == "geometric_median" else worse > 2


def test_one_step_of_sgd_averaged_is_synchronous_training() -> None:
    """Each island divides its loss by its own tokens, and the mean is weighted by them: together that is rule R2's loss."""
    one = LocalConfig(islands=2, inner_steps=1, lr=1.0, momentum=0.0, nesterov=False)
    work = replace(WORK, local=one, sgd=True, lr=0.5, max_norm=None)
    synchronous = plain_run(replace(work, local=SYNCHRONOUS)).losses
    for ((_, found),) in run_ranks(2, trained_islands, [work]):
        assert found.evaluated == pytest.approx(synchronous[-1], rel=TOLERANCE)
        assert found.joint_losses == pytest.approx(synchronous[: len(found.joint_losses)], rel=TOLERANCE)
        assert len(found.joint_losses) == work.steps - 1  # no row comes after the last exchange


def test_a_loss_that_is_no_number_does_not_hide_those_of_other_islands() -> None:
    rows = [Header(5.0, loss=8.0, loss_tokens=4.0), Header(9.0, loss=math.nan, loss_tokens=9.0), Header(6.0, True, 12.0, 6.0)]
    assert mean_loss(torch.cat([each.row() for each in rows])) == 2.0
    assert mean_loss(rows[1].row()) is mean_loss(Header(0.0).row()) is None


def test_islands_that_a_checkpoint_lacks_begin_with_the_state_of_the_first() -> None:
    """But with no weights of its own, nor what it had sent."""

    def read(name: str, role: str) -> str:
        whole = torch.zeros(2)
        return of_first_island(Fragment(name, role, (2,), Box((0,), (2,)), whole), 2).key

    assert [read("w", "exp_avg@1"), read("w", "exp_avg@2"), read("w", "exp_avg")] == ["exp_avg@1/w", "exp_avg/w", "exp_avg/w"]
    assert [read("w", f"{role}@2") for role in ("island_weight", "difference")] == ["island_weight@2/w", "difference@2/w"]
    assert read("lbfgs@3", RUN) == f"{RUN}/lbfgs"
