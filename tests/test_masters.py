"""Weights that lie whole beside their masters train as FSDP2's do, and never lag behind them."""

from __future__ import annotations

import pytest
import torch

from meshloom.config.parallel import ParallelConfig
from meshloom.data.batch import MicroBatch
from meshloom.parallel.torch_engine import TorchEngine
from parity import Work, build, curves, sample, train
from ranks import run_ranks

FSDP = ParallelConfig(zero=2, offload="cpu")  # goes through FSDP2 on any number of ranks, one included


@pytest.mark.parametrize("model", [(), (("tied", True),)], ids=["untied", "tied"])
@pytest.mark.parametrize("micro", [8, 3], ids=["one micro-batch", "three"])
def test_bf16_losses_of_one_rank_are_those_of_fsdp(micro: int, model: tuple[tuple[str, bool], ...]) -> None:
    settings = {"micro": micro, "precision": "bf16", "model": model}
    ((losses, norms),) = run_ranks(1, curves, Work(ParallelConfig(zero=0), **settings))  # type: ignore[arg-type]
    ((expected, expected_norms),) = run_ranks(1, curves, Work(FSDP, **settings))  # type: ignore[arg-type]
    assert losses == pytest.approx(expected, rel=1e-6)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert len(set(losses)) == len(losses), "the weights change"


def curves_of(rank: int, world_size: int, works: list[Work]) -> list[tuple[list[float], list[float]]]:
    return [curves(rank, world_size, work) for work in works]


@pytest.mark.parametrize(("micro", "tolerance"), [(4, 1e-6), (1, 1e-3)], ids=["one micro-batch", "several"])
def test_bf16_losses_of_two_ranks_are_those_of_fsdp(micro: int, tolerance: float) -> None:
    """Two gradients have one sum in fp32, however they are sent; more are added up in another order than ZeRO-2's."""
    layouts = [ParallelConfig(zero=2), ParallelConfig(zero=0), ParallelConfig(zero=1)]
    works = [Work(layout, micro=micro, precision="bf16", model=(("tied", True),)) for layout in layouts]
    (expected, expected_norms), *others = run_ranks(2, curves_of, works)[0]
    for losses, norms in others:
        assert losses == pytest.approx(expected, rel=tolerance)
        assert norms == pytest.approx(expected_norms, rel=10 * tolerance)


def written_to(rank: int, world_size: int) -> tuple[float, float, float, set[str]]:
    engine, *_ = train(Work(ParallelConfig(zero=1), precision="bf16", steps=2), world_size)
    assert isinstance(engine, TorchEngine)
    batch = [MicroBatch.collate([sample(index) for index in range(4)])]
    before = float(engine.evaluate(batch).mean)
    kept = {fragment.name: fragment.tensor.clone() for fragment in engine.fragments() if fragment.role == "weight"}
    dtypes = {str(fragment.tensor.dtype) for fragment in engine.fragments()}
    for fragment in engine.fragments():
        if fragment.role == "weight":
            fragment.tensor.zero_()
    engine.load_counters(engine.counters())  # as every restore does at its end
    without = float(engine.evaluate(batch).mean)
    for fragment in engine.fragments():
        if fragment.role == "weight":
            fragment.tensor.copy_(kept[fragment.name])
    engine.load_counters(engine.counters())
    return before, without, float(engine.evaluate(batch).mean), dtypes


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_a_checkpoint_writes_is_computed_with(ranks: int) -> None:
    for before, without, after, dtypes in run_ranks(ranks, written_to):
        assert dtypes == {"torch.float32"}
        assert without == pytest.approx(torch.tensor(61.0).log().item(), rel=1e-6)  # all weights 0: a uniform guess
        assert before == after != without


def summed(rank: int, world_size: int, steps: list[list[float]], one_pass: bool) -> list[tuple[float, str]]:
    """Every weight's gradient when the micro-batches of each rank bring these, the same for all elements."""
    engine = build(Work(ParallelConfig(zero=1), precision="bf16"), world_size)
    assert isinstance(engine, TorchEngine) and engine._masters is not None
    mine = steps[rank]
    engine._masters.begin(len(mine), one_pass)
    for number, step in enumerate(mine):
        engine._masters.expect(last=number == len(mine) - 1)
        torch.stack([(parameter * step).sum() for parameter in engine.module.parameters()]).sum().backward()
    engine._masters.complete()
    gradients = [master.grad for master in engine._masters.masters.values() if master.numel()]
    assert all(parameter.grad is None for parameter in engine.module.parameters())
    assert all(gradient is not None for gradient in gradients)
    return [
        (float(value), str(gradient.dtype)) for gradient in gradients if gradient is not None for value in gradient.unique()
    ]


def test_several_passes_are_summed_in_fp32_and_one_keeps_its_dtype() -> None:
    # bf16 has no number between 256 and 258: there 256 + 1 + 1 would stay at 256.
    (one,) = run_ranks(1, summed, [[256.0, 1.0, 1.0]], True)
    assert set(one) == {(258.0, "torch.float32")}
    (one,) = run_ranks(1, summed, [[1.0]], True)
    assert set(one) == {(1.0, "torch.bfloat16")}
    (one,) = run_ranks(1, summed, [[1.0]], False)
    assert set(one) == {(1.0, "torch.float32")}
    for rank in run_ranks(2, summed, [[256.0], [1.0]], True):
        assert set(rank) == {(257.0, "torch.float32")}
    for rank in run_ranks(2, summed, [[256.0, 1.0], [256.0, 2.0]], True):
        assert set(rank) == {(515.0, "torch.float32")}


def moments(rank: int, world_size: int, parallel: ParallelConfig) -> tuple[float, float]:
    from meshloom.parallel.moments import Measure

    engine = build(Work(parallel, precision="bf16"), world_size, measures=True)
    batches = [MicroBatch.collate([sample(index) for index in (first, first + 1)]) for first in (0, 2)]
    engine.accumulate(batches, torch.tensor(float(sum(b.valid_tokens for b in batches))), Measure.PROJECTIONS)
    engine.gradient_norm()
    found = engine.gradient_moments(4)
    assert found is not None
    statistics = found.read()
    assert statistics.projection_square is not None
    return statistics.worker_square, statistics.projection_square


def test_gradient_moments_are_those_of_fsdp() -> None:
    (plain,) = run_ranks(1, moments, ParallelConfig(zero=0))
    (fsdp,) = run_ranks(1, moments, FSDP)
    assert plain == pytest.approx(fsdp, rel=1e-5)
