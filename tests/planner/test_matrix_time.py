"""Times of updates of whole matrices: how much is computed, by whom, and what travels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from meshloom.launch.plan_cluster import predict
from meshloom.launch.planning import make_plan, plan_of, resolve_plan
from meshloom.optim.optimizers import parameters
from meshloom.optim.optimizers.matrix_config import (
    AdafactorConfig,
    APOLLOConfig,
    GaLoreConfig,
    MatrixOptimConfig,
    MuonConfig,
    SOAPConfig,
)
from meshloom.optim.optimizers.newton_schulz import orthogonalize
from meshloom.optim.optimizers.newton_schulz_forms import cost as multiplications
from meshloom.optim.optimizers.parameters import NamedParameter, Unsharded
from meshloom.optim.optimizers.soap import SOAP
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.layout import Layout
from meshloom.parallel.matrix_plan import choose_owners
from meshloom.planner import matrix_time
from meshloom.planner.cluster import load_cluster
from meshloom.planner.kernel_time import Kernels
from meshloom.planner.matrix_time import MatrixWork, busiest, matrix_parts
from meshloom.planner.network import Group, group, level_groups, matrix_levels
from meshloom.planner.step_time import STEP
from support.plans import seconds

EXACT = load_cluster(["cluster=h100", "cluster.rates.half_area=0", "cluster.rates.products=1", "cluster.bandwidth=1.0e+9"])
"""Products at their peak and memory without end: seconds are FLOPs."""


def counted_flops(config: MatrixOptimConfig, shape: tuple[int, int]) -> float:
    """FLOPs of products that the planner counts for one matrix."""
    kernels = Kernels(EXACT, "fp32")
    return matrix_time.matrix_seconds(config, shape, kernels) * EXACT.peak("fp32")


def test_newton_schulz_is_counted_to_the_flop() -> None:
    for shape in ((8, 24), (24, 8), (16, 16)):
        for steps in (5, 7):
            with FlopCounterMode(display=False) as counter:
                orthogonalize([torch.randn(shape)], steps)
            assert counted_flops(MuonConfig(ns_steps=steps), shape) == pytest.approx(counter.get_total_flops(), rel=1e-6)
            assert 2 * multiplications(*shape, steps) == counter.get_total_flops(), "owners are chosen by it"


def test_soap_is_counted_to_the_flop_but_for_its_decomposition() -> None:
    """Between turns, and with a side that is too long to be rotated."""
    for most, shape in ((100, (16, 24)), (20, (16, 24))):
        config = SOAPConfig(max_dim=most, interval=10**9)
        weight = torch.nn.Parameter(torch.randn(shape))
        optimizer = SOAP(config, [NamedParameter("layers.0.w", weight, shape, True, 1.0, hidden=True)], Unsharded())
        for _ in range(2):
            weight.grad = torch.randn(shape)
            optimizer.step()
        weight.grad = torch.randn(shape)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        assert counted_flops(config, shape) == pytest.approx(counter.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 3, 8, 64])
def test_matrices_are_dealt_as_the_run_deals_them(ranks: int) -> None:
    """Every rank holds a part of every matrix."""
    kinds = ((5.0, 9, (5, 1)), (3.0, 14, (3, 1)), (1.0, 7, (1, 1)))
    costs = [cost for cost, count, _ in kinds for _ in range(count)]
    owners = choose_owners(costs, [range(ranks)] * len(costs))
    loads: Counter[int] = Counter()
    for owner, cost in zip(owners, costs, strict=True):
        loads[owner] += round(cost)
    assert sum(shape[0] * count for shape, count in busiest(kinds, ranks).items()) == max(loads.values())


def test_waves_are_as_large_as_the_runs() -> None:
    assert matrix_time.WAVE == parameters.WAVE


def test_ranks_share_the_work_and_pay_for_the_way() -> None:
    cluster = load_cluster(["cluster=h100x16"])
    work = MatrixWork(MuonConfig(), {(4096, 4096): 64, (14336, 4096): 96}, 1)
    alone = matrix_parts(work, Kernels(cluster, "fp32"), [group(cluster, 1)], "bf16", work.elements)
    assert "matrix exchange" not in alone
    eight = matrix_parts(replace(work, ranks=8), Kernels(cluster, "fp32"), [group(cluster, 8)], "bf16", work.elements / 8)
    assert eight["matrix update"] == pytest.approx(alone["matrix update"] / 8, rel=1e-6), "64 and 96 are divided by 8"
    sixteen = matrix_parts(replace(work, ranks=16), Kernels(cluster, "fp32"), [group(cluster, 16)], "bf16", work.elements / 16)
    assert sixteen["matrix update"] == pytest.approx(alone["matrix update"] / 16, rel=1e-6)
    assert sixteen["matrix exchange"] > eight["matrix exchange"], "half of it leaves the node"


def test_results_come_back_to_every_copy() -> None:
    """Each of 16 ranks has all matrices and gets all results, a host each from the other once; it sends a part."""
    cluster = load_cluster(["cluster=h100x16"])
    work = MatrixWork(MuonConfig(ns_steps=0), {(4096, 4096): 64}, 16)
    inside, between = level_groups(cluster, (8, 2), 1, 16)
    size, all_ranks = 2 * 64 * 4096**2, group(cluster, 16)  # bytes in bf16, a sixteenth of which is a wave of a rank

    def exchange(levels: Sequence[Group], held: float) -> float:
        return matrix_parts(work, Kernels(cluster, "fp32"), levels, "bf16", held)["matrix exchange"]

    assert exchange([all_ranks], work.elements / 16) == pytest.approx(2 * all_ranks.exchange(size / 16))
    assert exchange([all_ranks], work.elements) == pytest.approx(all_ranks.exchange(size / 16) + all_ranks.exchange(size))
    there = inside.exchange(size / 16) + between.exchange(size / 16)
    assert exchange([inside, between], work.elements) == pytest.approx(
        there + inside.exchange(size) + between.exchange(size / 8)
    )


def test_matrices_pay_for_every_level() -> None:
    """On 16 GPUs, 8 a node, all that a rank has to send crosses 7 / 8 of the links and then half of the network."""
    cluster = load_cluster(["cluster=h100x16"])
    layout = Layout.plan(ParallelConfig(zero=3), 16)
    levels = matrix_levels(ParallelConfig(zero=3), layout, 8)
    assert levels == (8, 2) and matrix_levels(ParallelConfig(zero=3, gradient_exchange="direct"), layout, 8) == (16,)
    stages = ParallelConfig(zero=1, pp=3)
    assert matrix_levels(stages, Layout.plan(stages, 24), 6) == (8,), "one stage is 6 + 2 ranks, another 4 + 4"
    inside, between = level_groups(cluster, levels, 1, 16)
    size, link = 1e9, cluster.link * 1e9 * cluster.rates.link
    assert inside.exchange(size) == pytest.approx(7 / 8 * size / link + 7 * cluster.rates.latency)
    own = cluster.node_network * cluster.rates.network / 8
    assert between.exchange(size) == pytest.approx(size / 2 / own + cluster.rates.network_latency)


def test_a_plan_has_the_parts_of_its_optimizer() -> None:
    words = ["recipe=llama_1b", "batch.samples=64", "batch.micro=4", "trainer.activation=none", "launch.nproc=8"]
    adamw = make_plan(words)
    assert adamw.model.groups
    times = {name: seconds_of([*words, f"optim={name}"]) for name in ("adamw", "muon", "soap", "apollo", "galore", "adafactor")}
    assert times["soap"] > times["galore"] > times["adafactor"] and times["soap"] > times["muon"] > times["adamw"]
    assert seconds(adamw) == pytest.approx(times["adamw"])


def test_each_rank_updates_its_copy_where_weights_are_whole() -> None:
    """Under ZeRO-0 each of 8 GPUs updates all that is no matrix, and moves the momentum of all matrices."""
    words = ["recipe=llama_1b", "batch.samples=64", "batch.micro=4", "launch.nproc=8", "optim=muon"]
    sharded, whole = (parts_of([*words, f"parallel.zero={zero}"]) for zero in (1, 0))
    assert whole["update"] - STEP == pytest.approx(8 * (sharded["update"] - STEP), rel=0.01)
    kernels, matrices = Kernels(load_cluster(["cluster=h200x8"]), "fp32"), 16 * (2 * 2048 * (2048 + 512) + 3 * 2048 * 8192)
    moved = kernels.pointwise(30 * 7 / 8 * matrices)
    assert whole["matrix update"] - sharded["matrix update"] == pytest.approx(moved, rel=0.01)


def parts_of(words: list[str]) -> Mapping[str, float]:
    """Seconds of a step by part."""
    config = resolve_plan(words).config
    return predict(plan_of(config, ()), config, load_cluster(["cluster=h200x8"])).time.parts


def seconds_of(words: list[str]) -> float:

    config = resolve_plan(words).config
    return predict(plan_of(config, ()), config, load_cluster(["cluster=h200x8"])).seconds


@pytest.mark.parametrize("config", [APOLLOConfig(rank=8), GaLoreConfig(rank=8, interval=10**9), AdafactorConfig()])
def test_projections_cost_their_rank(config: MatrixOptimConfig) -> None:
    found = counted_flops(config, (16, 64))
    products = {"apollo": 1, "galore": 2, "adafactor": 0}[config.name]
    assert found == pytest.approx(products * 2 * 8 * 16 * 64, rel=1e-3, abs=1)
