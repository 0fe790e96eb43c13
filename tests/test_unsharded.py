"""One process without FSDP2 trains as one process with it, and its low-precision weights never lag behind their masters."""

from __future__ import annotations

import pytest
import torch

from meshloom.config.parallel import ParallelConfig
from meshloom.data.batch import MicroBatch
from meshloom.parallel.torch_engine import TorchEngine
from meshloom.parallel.unsharded import MasterWeights
from parity import Work, build, curves, sample, train
from ranks import run_ranks

FSDP = ParallelConfig(zero=2, offload="cpu")  # the one layout of a single process that still goes through FSDP2


@pytest.mark.parametrize("model", [(), (("tied", True),)], ids=["untied", "tied"])
@pytest.mark.parametrize("micro", [8, 3], ids=["one micro-batch", "three"])
def test_bf16_losses_are_those_of_fsdp(micro: int, model: tuple[tuple[str, bool], ...]) -> None:
    settings = {"micro": micro, "precision": "bf16", "model": model}
    ((losses, norms),) = run_ranks(1, curves, Work(ParallelConfig(zero=0), **settings))  # type: ignore[arg-type]
    ((expected, expected_norms),) = run_ranks(1, curves, Work(FSDP, **settings))  # type: ignore[arg-type]
    assert losses == pytest.approx(expected, rel=1e-6)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert len(set(losses)) == len(losses), "the weights change"


def written_to(rank: int, world_size: int) -> tuple[float, float, float, set[str]]:
    engine, *_ = train(Work(precision="bf16", steps=2), world_size)
    assert isinstance(engine, TorchEngine)
    batch = [MicroBatch.collate([sample(index) for index in range(4)])]
    before = float(engine.evaluate(batch).mean)
    kept = {fragment.name: fragment.tensor.clone() for fragment in engine.fragments() if fragment.role == "weight"}
    dtypes = {str(fragment.tensor.dtype) for fragment in engine.fragments()}
    for fragment in engine.fragments():
        if fragment.role == "weight":
            fragment.tensor.zero_()
    without = float(engine.evaluate(batch).mean)
    for fragment in engine.fragments():
        if fragment.role == "weight":
            fragment.tensor.copy_(kept[fragment.name])
    return before, without, float(engine.evaluate(batch).mean), dtypes


def test_what_a_checkpoint_writes_is_computed_with() -> None:
    ((before, without, after, dtypes),) = run_ranks(1, written_to)
    assert dtypes == {"torch.float32"}
    assert without == pytest.approx(torch.tensor(61.0).log().item(), rel=1e-6)  # all weights 0: a uniform guess
    assert before == after != without


def test_several_passes_are_summed_in_fp32_and_one_keeps_its_dtype() -> None:
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    weights = MasterWeights({"w": weight})
    master = weights.masters["w"]
    master.data.fill_(1.0)
    weights.begin(narrow=False)
    for step in (256.0, 1.0, 1.0):
        (weight * step).sum().backward()
    assert master.grad is not None and master.grad.dtype == torch.float32
    assert master.grad.tolist() == [258.0] * 3  # bf16 has no number between 256 and 258: 256 + 1 + 1 would stay at 256
    assert weight.grad is None
    master.grad = None
    weights.begin(narrow=True)
    weight.sum().backward()
    assert master.grad is not None and master.grad.dtype == torch.bfloat16


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
