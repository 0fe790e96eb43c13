"""Pipelines by every schedule give the losses, norms and gradients of a bare loop in one process, in float64."""

from __future__ import annotations

import pytest

from meshloom.config.parallel import ParallelConfig
from parity import Work, curves, plain_curve
from ranks import run_ranks

TOLERANCE = 1e-9
LAYERS = (("layers", 8),)


def pipeline(schedule: str, pp: int = 2, **settings: object) -> ParallelConfig:
    return ParallelConfig(pp=pp, schedule=schedule, **settings)  # type: ignore[arg-type]


TABLE = [
    (2, Work(pipeline(schedule, zero=0), samples=8, micro=1, steps=3, model=LAYERS))
    for schedule in ("gpipe", "1f1b", "interleaved", "zb", "zbv", "dualpipev")
]


@pytest.mark.parametrize(("ranks", "work"), TABLE)
def test_losses_and_norms_are_those_of_a_bare_loop(ranks: int, work: Work) -> None:
    losses, norms = plain_curve(work)
    for rank_losses, rank_norms in run_ranks(ranks, curves, work):
        assert rank_losses == pytest.approx(losses, rel=TOLERANCE)
        assert rank_norms == pytest.approx(norms, rel=TOLERANCE)
