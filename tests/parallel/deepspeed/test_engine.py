"""The DeepSpeed engine trains as the PyTorch engine does, and its state goes from stage to stage and engine to engine.

DeepSpeed keeps fp32 masters, so these runs are held to the float64 oracle in fp32: TOLERANCE is 5e-6 relative on loss and
gradient norm of each of 5 steps. One rounding is 6e-8, both engines stay within 2e-6 (1e-7 in benchmarks/engine_parity.py), and
a mean of means in place of the mean over tokens is 3e-4 off in the loss and 1e-2 in the norm.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")

# Imported here so that the ranks, which are forked from this process, need not.
import deepspeed.runtime.bf16_optimizer
import deepspeed.runtime.zero.muon.original_muon
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401

from meshloom.data.batch import MicroBatch
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.deepspeed.optimizer import require_op
from meshloom.parallel.deepspeed.settings import DeepSpeedConfig
from meshloom.parallel.deepspeed.setup import import_deepspeed
from meshloom.parallel.gradient_noise import Measure
from support.compiling import counted_graphs
from support.deepspeed_runs import Arrays, asynchronous_io_is_built, ds, leg, snapshot, whole, zeros
from support.parity import Work, build, curves, equal_share, global_tokens, plain_curve, sample, share, step, train
from support.ranks import run_ranks

TOLERANCE = 5e-6


SHORT = {"precision": "fp32", "steps": 5}
TABLE = [
    *[(1, Work(ds(zero), micro=4, **SHORT)) for zero in (0, 1, 2, 3)],
    *[(2, Work(ds(zero), micro=1, **SHORT)) for zero in (0, 1, 2, 3)],
    *[(4, Work(ds(zero), micro=1, **SHORT)) for zero in (0, 1, 2, 3)],
    (4, Work(ParallelConfig(zero=3), micro=1, **SHORT)),
    *[(2, Work(ds(zero, offload="cpu"), micro=2, **SHORT)) for zero in (1, 2, 3)],
    (2, Work(ds(3, offload="cpu", offload_weights="cpu"), micro=2, **SHORT)),
    (4, Work(zeros(3, zero_hpz_partition_size=2), micro=1, **SHORT)),
    (2, Work(zeros(3, stage3_param_persistence_threshold=0, sub_group_size=1000), micro=2, **SHORT)),
    (2, Work(zeros(2, reduce_bucket_size=500, allgather_bucket_size=500), micro=2, **SHORT)),
    (2, Work(zeros(1, contiguous_gradients=False, overlap_comm=True, reduce_scatter=False), micro=2, **SHORT)),
    (2, Work(zeros(3, contiguous_gradients=False, overlap_comm=False, stage3_allgather_sequential=True), micro=2, **SHORT)),
    (2, Work(zeros(1, allgather_partitions=False, use_multi_rank_bucket_allreduce=False), micro=2, **SHORT)),
    (2, Work(zeros(2, overlap_comm=True, use_multi_rank_bucket_allreduce=False), micro=2, **SHORT)),
    (2, Work(zeros(2, reduce_scatter=False, ignore_unused_parameters=False), micro=2, **SHORT)),
    (2, Work(zeros(3, stage3_use_all_reduce_for_fetch_params=True, override_module_apply=False), micro=2, **SHORT)),
    (2, Work(zeros(3, reduce_scatter=False, load_from_fp32_weights=False), micro=2, **SHORT)),
    (2, Work(zeros(3, stage3_max_live_parameters=0, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0), **SHORT)),
    (2, Work(ds(3), micro=2, model=(("tied", True),), activation="full", **SHORT)),
    (2, Work(ds(1), micro=2, model=(("tied", True),), documents=True, **SHORT)),
    (2, Work(ds(1), micro=2, max_norm=100.0, **SHORT)),  # no gradient is so long
    (2, Work(ds(3), micro=4, activation="offload", **SHORT)),
    (2, Work(ds(3), micro=2, activation="selective", **SHORT)),
    (2, Work(ds(2), micro=2, model=(("mup_base", 8), ("mup_residual", 0.22)), activation="selective", **SHORT)),
]


def case(value: object) -> str:
    if not isinstance(value, Work):
        return str(value)
    axes = value.parallel
    words = [axes.engine, f"zero{axes.zero}", f"micro{value.micro}", axes.offload, axes.offload_weights, value.activation]
    words += [key for key, _ in value.model] + ["docs" * value.documents, "unclipped" * (value.max_norm == 100.0)]
    words += list(axes.deepspeed.config.get("zero_optimization", {}))
    return "-".join(word for word in words if word and word != "none")


@pytest.mark.parametrize(("ranks", "work"), TABLE, ids=case)
def test_losses_and_norms_are_those_of_a_bare_loop(ranks: int, work: Work) -> None:
    losses, norms = plain_curve(work)
    for rank_losses, rank_norms in run_ranks(ranks, curves, work):
        assert rank_losses == pytest.approx(losses, rel=TOLERANCE)
        assert rank_norms == pytest.approx(norms, rel=TOLERANCE)


@pytest.mark.parametrize(
    "parallel",
    [ds(1), ds(2), ds(3), *[ds(zero, offload="cpu") for zero in (1, 2, 3)], zeros(3, zero_hpz_partition_size=2)],
    ids=lambda axes: case(Work(axes)),
)
def test_bf16_with_fp32_masters_is_the_torch_engines(parallel: ParallelConfig) -> None:
    """With the batch cut alike both engines round in the same places: what differs is the order of fp32 sums. A gradient
    that was added up in bf16 somewhere would show as 1e-3 in the norm.
    """
    work = Work(parallel, precision="bf16", steps=4, micro=2)
    losses, norms = run_ranks(2, curves, replace(work, parallel=ParallelConfig(zero=3)))[0]
    for rank_losses, rank_norms in run_ranks(2, curves, work):
        assert rank_losses == pytest.approx(losses, rel=TOLERANCE)
        assert rank_norms == pytest.approx(norms, rel=TOLERANCE)


def start(rank: int, world_size: int, work: Work) -> Arrays:
    return snapshot(build(work, world_size))


@pytest.mark.parametrize(("ranks", "precision", "parallel"), [(1, "fp32", ds(0)), (2, "bf16", ds(1)), (3, "bf16", ds(3))])
def test_initial_weights_are_the_torch_engines(ranks: int, precision: str, parallel: ParallelConfig) -> None:
    expected = whole(run_ranks(1, start, Work(ParallelConfig(zero=0), precision="fp32")))
    found = whole(run_ranks(ranks, start, Work(parallel, precision=precision)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


ROUTES = {
    "across stages": [(2, ds(1)), (3, ds(3)), (1, ds(0)), (2, ds(2)), (2, ds(3, offload="cpu")), (2, ds(1, offload="cpu"))],
    "through a second copy of the weights": [
        (2, ds(1)),
        (4, zeros(3, zero_hpz_partition_size=2)),
        (2, zeros(3, stage3_param_persistence_threshold=500)),
        (1, ds(3, offload="cpu", offload_weights="cpu")),
    ],
    "across engines": [
        (4, ParallelConfig(zero=3)),
        (2, ds(1)),
        (4, ds(3, offload="cpu")),
        (2, ParallelConfig(zero=1)),
    ],
}


def take(
    route: list[tuple[int, ParallelConfig]],
    lr: float = 1e-2,
    model: tuple[tuple[str, Any], ...] = (),
    tolerance: float = TOLERANCE,
) -> None:
    """Train along a route, two steps in each place; every array must arrive as it left, and the curve be the oracle's."""
    steps = 2
    uninterrupted, _ = plain_curve(Work(samples=12, steps=steps * len(route), lr=lr, model=model))
    arrays: dict[str, torch.Tensor] | None = None
    counters: dict[str, float] = {}
    losses: list[float] = []
    for number, (ranks, parallel) in enumerate(route):
        place = {"samples": 12, "micro": 2, "steps": steps, "first_step": steps * number}
        work = Work(parallel, precision="fp32", lr=lr, model=model, **place)
        results = run_ranks(ranks, leg, work, arrays, counters)
        if arrays is not None:
            before = whole([result[0] for result in results])
            assert before.keys() == arrays.keys()
            assert all(torch.equal(before[key], arrays[key]) for key in arrays)
        arrays, counters = whole([result[1] for result in results]), results[0][2]
        losses += results[0][3]
    assert counters == {"step": steps * len(route)}
    assert losses == pytest.approx(uninterrupted, rel=tolerance)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
def test_state_moves_bitwise_and_the_curve_goes_on(route: list[tuple[int, ParallelConfig]]) -> None:
    take(route)


@pytest.mark.skipif(not asynchronous_io_is_built(), reason="DeepSpeed's async_io has not been built on this machine")
def test_state_on_nvme_moves_bitwise_and_the_curve_goes_on(tmp_path: Path) -> None:
    """Shards under 1 MiB stay in memory, so this model is wider than the others, and its fp32 losses of either engine are
    2e-6 from float64 after a few steps. Several sub-groups; and with DeepSpeed's reading and writing ahead.
    """
    import_deepspeed("cpu")
    require_op("AsyncIOBuilder", "", "")  # here, so that the ranks find it loaded
    nvme = {"offload": "nvme", "offload_path": str(tmp_path)}
    ahead = {"pipeline_read": True, "pipeline_write": True}
    groups = DeepSpeedConfig(config={"zero_optimization": {"sub_group_size": 300_000, "offload_optimizer": ahead}})
    route = [
        (2, ds(2)),
        (2, ds(3, **nvme)),
        (2, ds(3, deepspeed=groups, **nvme)),
        (1, ds(3, offload_weights="nvme", **nvme)),
        (2, ds(1)),
    ]
    take(route, lr=1e-3, model=(("dim", 192), ("ffn_dim", 512)), tolerance=1e-5)


@pytest.mark.parametrize(("began", "resumed"), [(ds(1), ds(3)), (ds(3), ds(2)), (ds(2), ds(1, offload="cpu"))])
def test_training_on_in_another_stage_changes_nothing(began: ParallelConfig, resumed: ParallelConfig) -> None:
    """Not only is the state the same, so are the bf16 weights made from it: stale ones would show as 1e-3.

    Between stages 1 and 2 no bit differs; stage 3 lays the elements out otherwise, and Adam's vectorised loop rounds the
    odd one at another place.
    """
    work = Work(began, precision="bf16", micro=2, max_norm=None, steps=4)
    straight = whole([result[1] for result in run_ranks(2, leg, work, None, {})])
    first = run_ranks(2, leg, replace(work, steps=2), None, {})
    arrays, counters = whole([result[1] for result in first]), first[0][2]
    second = run_ranks(2, leg, replace(work, parallel=resumed, steps=2, first_step=2), arrays, counters)
    found = whole([result[1] for result in second])
    assert found.keys() == straight.keys()
    for key in straight:
        torch.testing.assert_close(found[key], straight[key], rtol=1e-6, atol=1e-9, msg=key)


def dropped_gradient(rank: int, world_size: int, work: Work) -> tuple[list[float], list[float]]:
    """A curve with a gradient thrown away before each step, whose number of micro-batches changes from step to step."""
    engine = build(work, world_size)
    losses, norms = [], []
    for number in range(work.steps):
        batches = equal_share([MicroBatch.collate([sample(1000 + rank)])] * 3, world_size)
        engine.accumulate(batches, torch.tensor(1.0, dtype=torch.float64))
        engine.zero_grad()
        loss, norm = step(engine, replace(work, micro=(1, 4, 2)[number % 3]), number)
        losses.append(loss)
        norms.append(norm)
    module, mesh = weakref.ref(engine.module), engine.mesh
    del engine
    mesh.release()
    gc.collect()
    assert module() is None or work.parallel.zero == 3, "the next engine would stand beside this one"
    return losses, norms


@pytest.mark.parametrize(
    "parallel", [ds(0), ds(1), ds(3), ds(2, offload="cpu"), ds(3, offload="cpu")], ids=lambda axes: case(Work(axes))
)
def test_dropped_gradient_leaves_nothing_and_passes_may_change(parallel: ParallelConfig) -> None:
    work = Work(parallel, precision="fp32", steps=3)
    losses, norms = plain_curve(work)
    for rank_losses, rank_norms in run_ranks(2, dropped_gradient, work):
        assert rank_losses == pytest.approx(losses, rel=TOLERANCE)
        assert rank_norms == pytest.approx(norms, rel=TOLERANCE)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_batch_that_does_not_divide_is_filled_with_blanks(zero: int) -> None:
    """Three micro-batches on two ranks: the second has one, and a blank in whose pass it gathers weights with the first."""
    work = Work(ds(zero), micro=2, samples=5, precision="fp32", steps=3)
    losses, norms = plain_curve(work)
    for rank_losses, rank_norms in run_ranks(2, curves, work):
        assert rank_losses == pytest.approx(losses, rel=TOLERANCE)
        assert rank_norms == pytest.approx(norms, rel=TOLERANCE)


def evaluated(rank: int, world_size: int, work: Work) -> tuple[float, float, float]:
    engine, _, _ = train(work, world_size)
    loss = engine.evaluate([MicroBatch.collate([sample(100 + rank), sample(200 + rank)])])
    return float(loss.mean), float(loss.tokens), step(engine, work, work.steps)[0]


@pytest.mark.parametrize(("ranks", "parallel"), [(2, ds(3)), (4, zeros(3, zero_hpz_partition_size=2))])
def test_evaluation_between_steps(ranks: int, parallel: ParallelConfig) -> None:
    work = Work(precision="fp32", steps=2)
    expected = run_ranks(ranks, evaluated, replace(work, parallel=ParallelConfig(zero=3)))[0]
    for found in run_ranks(ranks, evaluated, replace(work, parallel=parallel)):
        assert found == pytest.approx(expected, rel=TOLERANCE)


def moments(rank: int, world_size: int, work: Work) -> tuple[float, float, int, float]:
    engine = build(work, world_size, measures=True)
    mine = share(engine.mesh, work, 0)
    engine.accumulate(mine, global_tokens(engine.mesh, mine), Measure.SQUARES)
    engine.gradient_norm()
    found = engine.gradient_moments(work.samples)
    assert found is not None and engine.gradient_moments(work.samples) is None
    statistics = found.read()
    return statistics.worker_square, statistics.batch_square, statistics.workers, statistics.worker_samples


@pytest.mark.parametrize(("ranks", "parallel"), [(2, ds(0)), (4, ds(2)), (2, ds(3))])
def test_gradient_statistics_are_the_torch_engines(ranks: int, parallel: ParallelConfig) -> None:
    work = Work(ParallelConfig(zero=0), micro=2, precision="fp64")
    expected = run_ranks(1, moments, work)[0]
    for found in run_ranks(ranks, moments, replace(work, parallel=parallel, precision="fp32")):
        assert found == pytest.approx(expected, rel=TOLERANCE)


def compiled(rank: int, world_size: int, work: Work) -> tuple[list[float], list[float], int]:
    """Losses and norms with compiled blocks, and how many graphs there were. What runs them is PyTorch without optimisation."""
    with counted_graphs("eager") as counter:
        losses, norms = curves(rank, world_size, work)
    return losses, norms, counter.frame_count


@pytest.mark.parametrize(
    "parallel", [ds(1), ds(3), ds(3, offload="cpu", offload_weights="cpu")], ids=lambda axes: case(Work(axes))
)
def test_blocks_are_compiled_whole(parallel: ParallelConfig) -> None:
    """As many graphs as under the torch engine: DeepSpeed's hooks break none, and the losses are the oracle's."""
    work = Work(parallel, precision="fp32", steps=3, micro=2, compile=True)
    losses, norms = plain_curve(replace(work, compile=False))
    expected = run_ranks(2, compiled, replace(work, parallel=ParallelConfig(zero=3)))[0][2]
    for rank_losses, rank_norms, graphs in run_ranks(2, compiled, work):
        assert rank_losses == pytest.approx(losses, rel=TOLERANCE)
        assert rank_norms == pytest.approx(norms, rel=TOLERANCE)
        assert 0 < graphs <= expected
