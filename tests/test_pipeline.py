"""Pipelines by every schedule give the losses, norms and gradients of a bare loop in one process, in float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from meshloom.config.parallel import ParallelConfig
from meshloom.data.batch import MicroBatch
from meshloom.parallel.pipeline.stages import SCHEDULES
from parity import Work, build, curves, gradients, plain_curve, sample, step
from ranks import run_ranks

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
CASES: dict[tuple[str, int], list[Work]] = {  # (what they have in common, ranks) → cases that share their processes
    **{(schedule, 4): [work(schedule, zero=3), work(schedule, 4, zero=1, layers=8, model=TIED)] for schedule in SCHEDULES},
    ("every ZeRO stage", 4): [work("1f1b", zero=zero) for zero in (0, 1, 2)],
    ("every schedule, ten steps", 2): [work(schedule, zero=0, steps=10) for schedule in SCHEDULES],
    ("many stages per rank", 2): [
        work("interleaved", layers=8, stages_per_rank=4),
        work("zb", layers=8, stages_per_rank=4),
        work("zb", stages_per_rank=1),
    ],
    ("stages by hand, larger and uneven numbers of micro-batches", 2): [
        work("1f1b", layers=5, stage_layers=[1, 4]),
        work("1f1b", micro=2),
        work("interleaved", samples=3),
        work("zbv", samples=2),
    ],
    ("hybrid sharding", 8): [work("1f1b", replicate=2, steps=2), work("zb", zero=1, replicate=2, steps=2)],
    ("documents", 2): [work("1f1b", documents=True, steps=2), work("zbv", documents=True, steps=2)],
    ("activations", 2): [
        *[work("interleaved", activation=policy, steps=2) for policy in ("selective", "full", "offload")],
        *[work("zb", activation=policy, steps=2) for policy in ("full", "offload")],
    ],
}


def all_curves(rank: int, world_size: int, cases: list[Work]) -> list[tuple[list[float], list[float]]]:
    return [curves(rank, world_size, case) for case in cases]


@pytest.mark.parametrize(("ranks", "cases"), [pytest.param(key[1], cases, id=key[0]) for key, cases in CASES.items()])
def test_losses_and_norms_are_those_of_a_bare_loop(ranks: int, cases: list[Work]) -> None:
    expected = [plain_curve(case) for case in cases]
    for found in run_ranks(ranks, all_curves, cases):
        for case, (losses, norms), (rank_losses, rank_norms) in zip(cases, expected, found, strict=True):
            assert rank_losses == pytest.approx(losses, rel=TOLERANCE), case
            assert rank_norms == pytest.approx(norms, rel=TOLERANCE), case


@pytest.mark.parametrize(("schedule", "tied"), zip(SCHEDULES, itertools.cycle([False, True])))
def test_gradients_of_every_parameter_agree(schedule: str, tied: bool) -> None:
    case = work(schedule, betas=(0.0, 0.0), max_norm=None, model={"tied": tied})
    alone = dataclasses.replace(case, parallel=ParallelConfig(zero=0))
    whole = {key.split(" ")[0]: tensor for key, (_, tensor) in run_ranks(1, gradients, alone)[0].items()}
    seen: dict[str, int] = {}
    for found in run_ranks(4, gradients, case):
        for key, ((_shape, box), tensor) in found.items():
            name = key.split(" ")[0]
            seen[name] = seen.get(name, 0) + tensor.numel()
            torch.testing.assert_close(tensor, whole[name][box.slices()], rtol=1e-9, atol=1e-13)
    assert seen == {name: tensor.numel() for name, tensor in whole.items()}, "every element once"


def changing(rank: int, world_size: int, case: Work) -> list[float]:
    """Steps of different numbers of micro-batches, with an evaluation of uneven ones in between."""
    engine = build(case, world_size)
    curve: list[float] = []
    for number, samples in enumerate((8, 16, 8, 24)):
        curve.append(step(engine, dataclasses.replace(case, samples=samples), number)[0])
        at = [[90, 91, 92], [93], [94, 95]]
        batches = [MicroBatch.collate([sample(index) for index in indices]) for indices in at]
        curve.append(float(engine.evaluate(batches).mean))
    return curve


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_number_of_micro_batches_may_change_and_evaluation_changes_nothing(schedule: str) -> None:
    case = work(schedule, model=TIED)
    alone = dataclasses.replace(case, parallel=ParallelConfig(zero=0))
    (expected,) = run_ranks(1, changing, alone)
    for curve in run_ranks(2, changing, case):
        assert curve == pytest.approx(expected, rel=TOLERANCE)


def stored_buffers(rank: int, world_size: int, case: Work) -> int:
    engine = build(case, world_size)
    step(engine, case, 0)
    assert engine._pipeline is not None and engine._pipeline._built is not None
    stages = engine._pipeline._built[1]._stages
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
