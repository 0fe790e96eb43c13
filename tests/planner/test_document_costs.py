"""Costs of documents by a cluster's rates: closed forms, and the planner's own times of blocks at lengths that fit nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshloom.config.problems import ConfigError
from meshloom.launch.planning import resolve_plan
from meshloom.models.config import DecoderConfig
from meshloom.models.mixture.config import ExpertsConfig
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.hybrid.cost import CostModel, decoder_flops
from meshloom.parallel.layout import Layout
from meshloom.planner.block_time import BlockWork, block_time
from meshloom.planner.cluster import ClusterConfig, Rates, load_cluster
from meshloom.planner.document_costs import document_costs
from meshloom.planner.kernel_time import Kernels
from meshloom.planner.memory import Job
from meshloom.planner.network import group, group_of
from meshloom.planner.software import COMPILED, EAGER
from meshloom.planner.step_time import ends_time
from meshloom.trainer.hybrid import hidden_copies, hybrid_dealer
from support.configs import problems_of

SHAPE = DecoderConfig(dim=4096, layers=32, heads=32, kv_heads=8, ffn_dim=14336, vocabulary=128256)
H100 = load_cluster(["cluster=h100x64"])
ROW = 32768
HYBRID = ["recipe=quickstart", "data.document_mask=true", "data.packing=bestfit", "parallel.zero=1", "parallel.hdp=greedy"]


def costs(shape: DecoderConfig, cluster: ClusterConfig = H100, policy: str = "none") -> CostModel:
    parallel = ParallelConfig(zero=1)
    job = Job(ROW, 1, 1, "bf16", [policy] * shape.layers, compiled=True)
    return document_costs(shape, parallel, Layout.plan(parallel, 64), job, cluster)


def test_an_ideal_cluster_costs_its_flops() -> None:
    """6 FLOPs a parameter; of attention the causal half, 3.5 times (arXiv 2205.14135)."""
    free = dict.fromkeys(("half_area", "half_width", "half_length", "tail", "launch"), 0.0)
    rates = Rates(**free, products=1.0, attention=1.0, attention_backward=1.0)
    found = costs(SHAPE, replace(H100, rates=rates, bandwidth=1e12))
    parameters = 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336) + 4096 * 128256
    assert found.linear == pytest.approx(6 * parameters / 989e12, rel=1e-3)
    assert found.quadratic == pytest.approx(3.5 * 32 * 4 * 4096 / 2 / 989e12, rel=1e-6) and found.row == 0.0


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("experts", [None, ExpertsConfig(count=8, top_k=2, ffn_dim=1024)])
def test_a_row_of_documents_takes_the_time_of_its_blocks(policy: str, experts: ExpertsConfig | None) -> None:
    shape = SHAPE if experts is None else replace(SHAPE, experts=experts)
    found, kernels, layout = costs(shape, policy=policy), Kernels(H100, "bf16"), Layout.plan(ParallelConfig(zero=1), 64)
    groups = group_of(H100, layout, "tp"), group_of(H100, layout, "cp")
    ends = ends_time(shape, 1, kernels, ROW, first=True, last=True)
    for length in (512, 8192, ROW):
        work = BlockWork(ROW, length, policy, False, False, ParallelConfig(zero=1), COMPILED, *groups)
        block = block_time(shape.block(0), work, kernels)
        passes = [(32, block.forward), (32, block.to_input), (32, block.to_weight)]
        passes += [(1, ends.forward), (1, ends.to_input), (1, ends.to_weight)]
        expected = sum(times * sum(parts.values()) for times, parts in passes)
        assert sum(found.documents([length] * (ROW // length))) + found.row == pytest.approx(expected, rel=1e-9)


def test_experts_of_documents_are_those_of_the_run() -> None:
    """A run whose blocks are not compiled multiplies shared experts again, and kernels of experts compute little again."""
    shape = replace(SHAPE, experts=ExpertsConfig(count=8, top_k=2, shared=1, ffn_dim=1024))
    parallel, alone = ParallelConfig(zero=1), group(H100, 1, 1, 1)
    for compiled, fused in ((False, False), (True, True)):
        job = Job(ROW, 1, 1, "bf16", ["full"] * shape.layers, compiled=compiled, fused_experts=fused)
        found = document_costs(shape, parallel, Layout.plan(parallel, 64), job, H100)
        kernels, software = Kernels(H100, "bf16"), COMPILED if compiled else EAGER
        work = BlockWork(ROW, ROW, "full", False, False, parallel, software, alone, alone, None, fused, compiled)
        block, ends = block_time(shape.block(0), work, kernels), ends_time(shape, 1, kernels, ROW, first=True, last=True)
        passes = [(32, block.forward), (32, block.to_input), (32, block.to_weight)]
        passes += [(1, ends.forward), (1, ends.to_input), (1, ends.to_weight)]
        expected = sum(times * sum(parts.values()) for times, parts in passes)
        assert found.document(ROW) + found.row == pytest.approx(expected, rel=1e-9)


def test_layers_with_a_window_cost_what_they_see() -> None:
    shape = replace(SHAPE, layer_types=["sliding", "full"], sliding_window=1024)
    found, whole = costs(shape), costs(SHAPE)
    assert found.quadratic == pytest.approx(whole.quadratic / 2)
    assert found.windows == ((1024, pytest.approx(whole.quadratic / 2)),)
    assert found.document(1000) == pytest.approx(whole.document(1000), rel=1e-6)


def test_a_run_deals_by_the_cluster_that_it_names() -> None:
    shape = replace(SHAPE, layers=2, dim=64, heads=4, kv_heads=2, ffn_dim=128, vocabulary=300)
    layout, flops = Layout(zero=1, shard=4), decoder_flops(shape)
    config = resolve_plan([*HYBRID, "launch.nproc=4"]).config
    estimated = hybrid_dealer(config, layout, shape, flops)
    named = replace(config, parallel=replace(config.parallel, hdp_costs="h100"))
    dealer = hybrid_dealer(named, layout, shape, flops)
    assert dealer.costs(4096).row > 0 and dealer.costs(4096) != estimated.costs(4096) and dealer.flops == estimated.flops


def test_a_run_keeps_on_the_host_what_the_cluster_hides() -> None:
    layout = Layout(zero=1, shard=4)
    config = resolve_plan([*HYBRID, "launch.nproc=4", "precision=bf16"]).config
    assert hidden_copies(config, layout, SHAPE) is None
    config = replace(config, parallel=replace(config.parallel, hdp_costs="h100", hdp_offload=True))
    rule = hidden_copies(config, layout, SHAPE)
    assert rule is not None and rule.rate == H100.host_link * 1e9
    short, long = rule.share((4, 0, 64)), rule.share((4, 1, 131072, 0, 4))
    assert 0.02 < short < 0.3 and 2 * short < long <= 1
    small = hidden_copies(config, layout, replace(SHAPE, vocabulary=256))
    assert small is not None and small.costs == rule.costs, "embedding and head hide no copies"
    assert rule.host_bytes == H100.host_memory * 2**30 / 2 / 4 / 4, "half for what is pinned, 4 times what is kept, by 4 ranks"


def test_a_host_that_holds_no_block_is_refused_by_key() -> None:
    config = resolve_plan([*HYBRID, "launch.nproc=4", "precision=bf16"]).config
    parallel = replace(config.parallel, hdp_costs="h100", hdp_offload=True, hdp_tokens=2**30)
    with pytest.raises(ConfigError, match=r"parallel\.hdp_offload"):
        hidden_copies(replace(config, parallel=parallel), Layout(zero=1, shard=4), SHAPE)


def test_a_cluster_that_is_not_there_is_refused_by_key() -> None:
    assert "no 'nowhere'" in problems_of(4, *HYBRID, "parallel.hdp_costs=nowhere")["parallel.hdp_costs"]
    assert "only hybrid" in problems_of(1, "recipe=quickstart", "parallel.hdp_costs=h100")["parallel.hdp_costs"]
