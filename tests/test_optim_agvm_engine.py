"""AGVM in the engine: halves of accumulated gradients under every ZeRO stage, without a change to the gradient itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from meshloom.config.compose import Composer
from meshloom.config.parallel import ParallelConfig
from meshloom.data.batch import GlobalBatch, MicroBatch, deal
from meshloom.models.llama import Llama
from meshloom.optim.adamw import AdamW
from meshloom.optim.agvm import AGVM
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from meshloom.trainer.validate import run_problems
from parity import Work, sample
from ranks import run_ranks


def scales(
    rank: int, world_size: int, parallel: ParallelConfig, modulated: bool, micro: int = 1
) -> tuple[list[float], dict[str, float]]:
    """Losses of six steps at a constant rate, AGVM measuring before each but the first; and the scales that it came to."""
    mesh = Mesh.connect(Layout.plan(parallel, world_size), torch.device("cpu"))
    work = Work()

    def optimizer(parameters: Any, shards: Any) -> torch.optim.Optimizer:
        if modulated:
            return AGVM(parameters, shards, lr=0.01, interval=1, smoothing=0.8)
        return AdamW(parameters, shards, lr=0.01)

    with torch.device("meta"):
        model = Llama(**work.llama())
    engine = make_engine(model, mesh, optimizer, seed=7, precision="fp64", parallel=parallel)
    losses: list[float] = []
    for number in range(6):
        shares = deal(GlobalBatch(number * 16, 16), mesh.data_rank, mesh.layout.data_size, micro)
        batches = [MicroBatch.collate([sample(index) for index in indices]) for indices in shares]
        tokens = mesh.sum(torch.tensor(float(sum(batch.valid_tokens for batch in batches)), dtype=torch.float64))
        losses.append(float(engine.accumulate(batches, tokens).mean))
        engine.clip(0.5, engine.gradient_norm())
        engine.update(0.01)
        engine.zero_grad()
    return losses, {name: value for name, value in engine.counters().items() if name.startswith("scale.")}


LAYOUTS = [
    ParallelConfig(zero=0),
    ParallelConfig(zero=1),
    ParallelConfig(zero=2),
    ParallelConfig(zero=3),
    ParallelConfig(zero=3, replicate=2),
]


def test_every_stage_measures_and_trains_alike() -> None:
    """Four ranks hold the same halves under every ZeRO stage; the scales move and the losses with them, alike to rounding."""
    first, *others = [run_ranks(4, scales, layout, True) for layout in LAYOUTS]
    plain = run_ranks(4, scales, LAYOUTS[0], False)[0][0]
    losses, reached = first[0]
    assert max(abs(scale - 1) for scale in reached.values()) > 0.05
    assert losses[:2] == pytest.approx(plain[:2], rel=1e-12), "the first update is AdamW's"
    assert losses[5] != pytest.approx(plain[5], rel=1e-6)
    for results in [first, *others]:
        for other_losses, other in results:
            assert other_losses == pytest.approx(losses, rel=1e-9)
            assert other == pytest.approx(reached, rel=1e-9)


def test_one_rank_with_the_same_halves_agrees() -> None:
    """Samples 0–7 are the first half on one rank; on two ranks with shares of 8 the first halves are 0–3 and 8–11."""
    alone = run_ranks(1, scales, ParallelConfig(zero=3), True, 8)[0]
    again = run_ranks(1, scales, ParallelConfig(zero=0), True, 4)[0]
    assert alone[0] == pytest.approx(again[0], rel=1e-9) and alone[1] == pytest.approx(again[1], rel=1e-9)


def test_what_cannot_be_halved_is_refused() -> None:
    config = (
        Composer()
        .compose(
            ["recipe=quickstart", "data=synthetic", "model.vocabulary=64", "optim=agvm", "batch.samples=8", "batch.micro=8"]
        )
        .config
    )
    assert [problem.key for problem in run_problems(config, 1)] == ["batch.micro"]
    config.parallel.pp, config.batch.micro = 2, 1
    assert "optim" in [problem.key for problem in run_problems(config, 2)]
