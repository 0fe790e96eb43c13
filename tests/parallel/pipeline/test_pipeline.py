"""Pipelines beside the parity table: changing numbers of micro-batches, evaluation, buffers, sums in fp32."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest

from meshloom.data.batch import MicroBatch
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.pipeline.run import EVALUATED_AT_ONCE
from meshloom.parallel.pipeline.stages import SCHEDULES
from support.parity import Work, build, curves, sample, step
from support.ranks import run_ranks

TOLERANCE = 1e-9


def work(schedule: str, pp: int = 2, *, layers: int = 4, model: dict[str, object] | None = None, **settings: object) -> Work:
    """Work on a pipeline; what isn't a field of `Work` goes to the parallel config."""
    fields = {field.name for field in dataclasses.fields(Work)}
    of_work = {key: value for key, value in settings.items() if key in fields}
    axes = {key: value for key, value in settings.items() if key not in fields}
    parallel = ParallelConfig(pp=pp, schedule=schedule, **axes)  # type: ignore[arg-type]
    shape = (("layers", layers), *(model or {}).items())
    return Work(**{"steps": 3, "parallel": parallel, "model": shape, **of_work})  # type: ignore[arg-type]


TIED: dict[str, object] = {"tied": True}


def all_curves(rank: int, world_size: int, cases: list[Work]) -> list[tuple[list[float], list[float]]]:
    return [curves(rank, world_size, case) for case in cases]


def changing(rank: int, world_size: int, case: Work) -> list[float]:
    """Steps of different numbers of micro-batches, with an evaluation of uneven ones in between, more than pass at once."""
    engine = build(case, world_size)
    curve: list[float] = []
    for number, samples in enumerate((4, 8, 4, 12)):
        curve.append(step(engine, dataclasses.replace(case, samples=samples), number)[0])
        at = [[90, 91, 92], [93], [94, 95], *([index] for index in range(96, 103))]
        assert len(at) > EVALUATED_AT_ONCE * 2
        batches = [MicroBatch.collate([sample(index) for index in indices]) for indices in at]
        curve.append(float(engine.evaluate(batches).mean))
    return curve


@cache
def changing_alone() -> list[float]:
    """The same in one process, where there is no schedule."""
    (expected,) = run_ranks(1, changing, dataclasses.replace(work("1f1b", model=TIED), parallel=ParallelConfig(zero=0)))
    return expected


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_micro_batches_may_change_and_evaluation_is_pure(schedule: str) -> None:
    case = work(schedule, model=TIED)
    expected = changing_alone()
    for curve in run_ranks(2, changing, case):
        assert curve == pytest.approx(expected, rel=TOLERANCE)


def stored_buffers(rank: int, world_size: int, case: Work) -> int:
    engine = build(case, world_size)
    step(engine, case, 0)
    pipeline = engine._step._pipeline
    assert pipeline._built is not None
    stages = pipeline._built[1]._stages
    infos = [info for stage in stages for table in (stage.args_recv_info, stage.grad_recv_info) for info in table.values()]
    buffers = [getattr(part, "buffer", None) for info in infos for part in info]
    return sum(buffer is not None and not buffer.is_meta for buffer in buffers)


def test_no_receive_buffer_outlives_its_micro_batch() -> None:
    for schedule in ("interleaved", "zbv"):
        assert run_ranks(2, stored_buffers, work(schedule)) == [0, 0]


def test_gradients_of_bf16_weights_are_summed_in_fp32() -> None:
    """As in one process: else the halves of a zero-bubble backward pass show 6e-3 in the norm after four steps."""
    cases = [work(schedule, precision="bf16", steps=4) for schedule in SCHEDULES]
    ((alone, norms),) = run_ranks(1, curves, dataclasses.replace(cases[0], parallel=ParallelConfig(zero=0)))
    for found in run_ranks(2, all_curves, cases):
        for case, (rank_losses, rank_norms) in zip(cases, found, strict=True):
            assert rank_losses == pytest.approx(alone, rel=1e-6), case
            assert rank_norms == pytest.approx(norms, rel=1e-6), case
