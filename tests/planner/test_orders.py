"""Pipeline orders made without torch, held to those of torch's own schedule classes."""

from __future__ import annotations

import pytest

from meshloom.parallel.config import SCHEDULES, ParallelConfig
from meshloom.parallel.pipeline.stages import legal_micro_batches, stage_count
from meshloom.planner.orders import pipeline_order, repeated
from meshloom.planner.timeline import Costs, peak, simulate
from support.torch_orders import torch_order


@pytest.mark.parametrize("chunks", [None, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_orders_are_torchs(schedule: str, chunks: int | None) -> None:
    if chunks and schedule not in ("interleaved", "zb"):
        pytest.skip("it has a fixed number of stages")
    compared = 0
    for pp in (2, 3, 4):
        parallel = ParallelConfig(pp=pp, schedule=schedule, stages_per_rank=chunks)
        for count in filter(lambda n: legal_micro_batches(parallel, n), range(1, 14)):
            assert pipeline_order(parallel, count) == torch_order(parallel, count), (pp, count)
            compared += 1
    assert compared > 15


def test_a_number_that_a_schedule_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match="1f1b on 4 ranks can't run 3 micro-batches"):
        pipeline_order(ParallelConfig(pp=4), 3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_more_rounds_only_repeat_the_middle(schedule: str) -> None:
    """Forty rounds keep as much alive as four; and every further round takes as long as the one before."""
    parallel = ParallelConfig(pp=3, schedule=schedule)
    costs = [Costs(1.0, 1.5, 0.5)] * stage_count(parallel)

    def length(count: int) -> float:
        return simulate(pipeline_order(parallel, count), costs, hop=0.1).length

    few, many = repeated(parallel, 60, least=4), 60
    assert few == (60 if schedule == "gpipe" else 12)
    for short, long in zip(pipeline_order(parallel, few), pipeline_order(parallel, many), strict=True):
        assert peak(short, lambda _: 1.0) == peak(long, lambda _: 1.0)
    assert length(12) + (length(12) - length(9)) / 3 * 48 == pytest.approx(length(60), rel=1e-9 if schedule != "gpipe" else 1)
