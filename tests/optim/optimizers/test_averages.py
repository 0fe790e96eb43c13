"""AdEMAMix, schedule-free AdamW and FRUGAL beside outside implementations; and averages where they are evaluated and saved."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import pytorch_optimizer
import torch

from meshloom.optim.build import build_optimizer
from meshloom.optim.optimizers.config import AdamWConfig, AdEMAMixConfig, OptimConfig, ScheduleFreeConfig
from meshloom.optim.optimizers.frugal import choose_columns
from meshloom.optim.optimizers.frugal_config import FRUGALConfig
from meshloom.optim.optimizers.parameters import NamedParameter, Unsharded
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engine import Engine
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from support.models import decoder
from support.parity import Work, share, take_steps
from support.ranks import run_ranks
from support.settings import settings_of

RATES = (0.01, 0.02, 0.05, 0.05, 0.03, 0.05, 0.05)  # rising, as in a warm-up, and once lower than before
SHAPE = (5, 8)


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ours(config: OptimConfig, *, hidden: bool = True) -> tuple[torch.optim.Optimizer, torch.nn.Parameter]:
    held = torch.nn.Parameter(drawn(0))
    return build_optimizer(config, [NamedParameter("layers.0.w", held, SHAPE, hidden=hidden)], Unsharded()), held


def train(optimizer: torch.optim.Optimizer, held: torch.nn.Parameter, rates: Sequence[float] = RATES) -> None:
    for number, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        held.grad = drawn(1 + number)
        optimizer.step()


@pytest.mark.parametrize("rise", [None, 5])
def test_ademamix_is_the_published_one(rise: int | None) -> None:
    optimizer, held = ours(AdEMAMixConfig(betas=[0.8, 0.9], beta3=0.99, alpha=3.0, rise=rise))
    train(optimizer, held)
    other = torch.nn.Parameter(drawn(0))
    keys = {"betas": (0.8, 0.9, 0.99), "alpha": 3.0, "t_alpha_beta3": rise, "weight_decay": 0.1, "weight_decouple": True}
    train(pytorch_optimizer.AdEMAMix([other], foreach=False, **keys), other)
    torch.testing.assert_close(held.detach(), other.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("power", [0.0, 2.0])
def test_schedule_free_is_the_published_one(power: float) -> None:
    optimizer, held = ours(ScheduleFreeConfig(betas=[0.8, 0.9], step_power=power))
    train(optimizer, held)
    other = torch.nn.Parameter(drawn(0))
    outside = pytorch_optimizer.ScheduleFreeAdamW([other], betas=(0.8, 0.9), r=power, weight_decay=0.1, foreach=False)
    train(outside, other)
    torch.testing.assert_close(held.detach(), other.detach(), rtol=1e-12, atol=1e-14)
    outside.eval()
    torch.testing.assert_close(optimizer.state[held]["average"], other.detach(), rtol=1e-12, atol=1e-14)


def test_frugal_of_all_columns_is_adamw() -> None:
    optimizer, held = ours(FRUGALConfig(betas=[0.9, 0.95], period=1))
    train(optimizer, held)
    other = torch.nn.Parameter(drawn(0))
    train(torch.optim.AdamW([other], betas=(0.9, 0.95), weight_decay=0.1), other)
    torch.testing.assert_close(held.detach(), other.detach(), rtol=1e-12, atol=1e-14)


def test_frugal_takes_the_sign_in_all_other_columns() -> None:
    config = FRUGALConfig(period=3, interval=3, sign_scale=0.5, seed=4)
    optimizer, held = ours(config)
    train(optimizer, held)
    expected = drawn(0)
    for begin in range(0, len(RATES), config.interval):
        columns = choose_columns(4, begin // config.interval, SHAPE[1], config.period)
        assert [int(each) // 3 for each in columns] == [0, 1, 2]
        part = torch.nn.Parameter(expected[:, columns].clone())
        adamw = torch.optim.AdamW([part], betas=(0.9, 0.999), weight_decay=0.1)  # anew with each choice
        for number in range(begin, min(begin + config.interval, len(RATES))):
            adamw.param_groups[0]["lr"] = RATES[number]
            part.grad = drawn(1 + number)[:, columns]
            adamw.step()
            expected = (1 - 0.1 * RATES[number]) * expected - RATES[number] * 0.5 * drawn(1 + number).sign()
            expected[:, columns] = part.detach()
    torch.testing.assert_close(held.detach(), expected, rtol=1e-12, atol=1e-14)


def test_frugals_moments_begin_anew_where_the_first_gradient_is_absent() -> None:
    optimizer, held = ours(FRUGALConfig(betas=[0.9, 0.99], period=4, interval=2))
    train(optimizer, held, RATES[:2])
    assert optimizer.state[held]["exp_avg"].abs().min() > 0
    held.grad = None
    optimizer.step()
    held.grad = drawn(9)
    optimizer.step()
    expected = 0.1 * drawn(9)[:, choose_columns(0, 1, SHAPE[1], 4)]
    torch.testing.assert_close(optimizer.state[held]["exp_avg"], expected, rtol=1e-12, atol=0)


def test_frugals_columns_change_and_reach_all() -> None:
    choices = [choose_columns(0, number, 20, 4) for number in range(40)]
    assert {int(column) for columns in choices for column in columns} == set(range(20))
    assert not torch.equal(choices[0], choices[1])
    assert not torch.equal(choices[0], choose_columns(1, 0, 20, 4))


WORK = Work(samples=8, micro=1)


def engine_of(parallel: ParallelConfig, world_size: int, config: OptimConfig) -> Engine:
    mesh = Mesh.connect(Layout.plan(parallel, world_size), torch.device("cpu"))
    with torch.device("meta"):
        model = decoder(**WORK.llama())
    settings = settings_of(model, parallel, seed=7)
    return make_engine(model, mesh, functools.partial(build_optimizer, config), parallel, settings)


def evaluated(rank: int, world_size: int, layouts: Sequence[ParallelConfig]) -> list[tuple[list[float], list[float]]]:
    """By layout: losses of the averages, and of other engines with the saved weights; a step's loss with and without."""
    found: list[tuple[list[float], list[float]]] = []
    for parallel in layouts:
        work = replace(WORK, parallel=parallel, lr=0.02)
        engine, undisturbed = (engine_of(parallel, world_size, ScheduleFreeConfig()) for _ in range(2))
        for each in (engine, undisturbed):
            take_steps(each, work, range(3))
        batches = share(engine.mesh, work, 10_000).micro_batches
        losses = [float(engine.evaluate(batches).mean)]
        saved = {each.name: each.tensor for each in engine.fragments() if each.role == "weight"}
        for config in (AdamWConfig(), ScheduleFreeConfig()):  # the second as one that begins with imported weights
            other = engine_of(parallel, world_size, config)
            for fragment in other.fragments():
                fragment.tensor.copy_(saved[fragment.name])
            other.load_counters({})
            losses.append(float(other.evaluate(batches).mean))
        following = [take_steps(each, work, range(3, 4)).losses[0] for each in (engine, undisturbed)]
        found.append((losses, following))
    return found


def test_averages_are_what_is_evaluated_and_saved() -> None:
    layouts = [ParallelConfig(zero=zero) for zero in (0, 1, 3)]
    for found in run_ranks(2, evaluated, layouts):
        for (loss, *of_saved), (after, undisturbed) in found:
            assert of_saved == [loss, loss]
            assert after == undisturbed and abs(after - loss) > 1e-6
