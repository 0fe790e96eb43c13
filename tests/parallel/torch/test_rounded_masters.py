"""Masters that exist only during an update: beside fp32 ones, and equal in every bit on layouts with equal gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from meshloom.optim.build import build_optimizer
from meshloom.optim.optimizers.config import AdamWConfig, LionConfig, OptimConfig
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engine import Engine
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from support.models import decoder
from support.parity import Work, take_steps
from support.ranks import run_ranks
from support.settings import settings_of

WORK = Work(samples=8, micro=4, precision="bf16", max_norm=None)
STEP = 1e-5  # a fiftieth of the spacing of bf16 numbers about 0.07


def engine_of(zero: int, tp: int, world_size: int, masters: str, config: OptimConfig) -> Engine:
    parallel = ParallelConfig(zero=zero, tp=tp)
    mesh = Mesh.connect(Layout.plan(parallel, world_size), torch.device("cpu"))
    with torch.device("meta"):
        model = decoder(**WORK.llama())
    settings = settings_of(model, parallel, precision="bf16", seed=7, masters=masters)
    return make_engine(model, mesh, functools.partial(build_optimizer, config), parallel, settings)


def weights(engine: Engine) -> torch.Tensor:
    held = [each.tensor.flatten().double() for each in engine.fragments() if each.role in ("weight", "weight_remainder")]
    half = len([each for each in engine.fragments() if each.role == "weight_remainder"])
    return torch.cat(held) if not half else torch.cat(held[half:]) + torch.cat(held[:half])


def moved(rank: int, world_size: int, kinds: Sequence[str]) -> dict[str, torch.Tensor]:
    """By kind of masters, how far steps of equal size have moved each weight; and the losses."""
    found: dict[str, torch.Tensor] = {}
    for kind in kinds:
        engine = engine_of(0, 1, world_size, kind, LionConfig(lr=STEP, weight_decay=0.0))
        before = weights(engine).clone()
        take_steps(engine, replace(WORK, lr=STEP, steps=20), range(20))
        found[kind] = weights(engine) - before
        stored = [parameter.tensor for parameter in engine.weights.local.values()]  # type: ignore[attr-defined]
        sizes = {weight.untyped_storage().size() for weight in stored}
        assert (sizes == {0}) == (kind != "full"), "masters have memory during updates alone"
    return found


def test_steps_below_the_spacing_are_not_lost() -> None:
    (found,) = run_ranks(1, moved, ["full", "bf16_stochastic", "bf16_kahan"])
    full, chance, kahan = (found[kind] for kind in ("full", "bf16_stochastic", "bf16_kahan"))
    assert float(full.abs().mean()) > 3 * STEP
    # Gradients differ by rounding, and now and then their signs: most weights have moved alike.
    assert float((kahan - full).abs().median()) < STEP and abs(float((kahan * full).sum() / (full * full).sum()) - 1) < 0.2
    assert abs(float((chance * full).sum() / (full * full).sum()) - 1) < 0.3


def bits(rank: int, world_size: int, kind: str) -> list[dict[str, torch.Tensor]]:
    """The weights after steps under ZeRO-0, under ZeRO-1, and under ZeRO-0 with a new engine in the middle."""
    found: list[dict[str, torch.Tensor]] = []
    config = AdamWConfig(lr=0.01, fused=False)
    for zero, resumed in ((0, False), (1, False), (0, True)):
        engine = engine_of(zero, 1, world_size, kind, config)
        take_steps(engine, WORK, range(2))
        if resumed:
            fresh = engine_of(zero, 1, world_size, kind, config)
            fresh.prepare_restore()
            saved = {each.key: each.tensor.clone() for each in engine.fragments()}
            for fragment in fresh.fragments():
                fragment.tensor.copy_(saved[fragment.key])
            fresh.load_counters(engine.counters())
            engine = fresh
        take_steps(engine, WORK, range(2, 4))
        counted = [int(each.tensor) for each in engine.fragments() if each.role == "run"]
        assert counted == ([5] if kind == "bf16_stochastic" else []), "the initial values' rounding, and each update's"
        whole = {}
        for each in engine.fragments():
            if each.role == "weight":
                whole[each.name] = torch.zeros(each.global_shape, dtype=torch.bfloat16)
                whole[each.name][each.box.slices()] = each.tensor
                if zero:
                    torch.distributed.all_reduce(whole[each.name])
        found.append(whole)
    return found


def test_bits_are_equal_on_zero_0_and_1_and_after_a_restore() -> None:
    for kind in ("bf16_stochastic", "bf16_kahan"):
        for first, *others in run_ranks(2, bits, kind):
            for other in others:
                assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)
