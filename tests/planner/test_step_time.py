"""Predicted time held to closed forms and to its own bounds; rates are found again from the times that they predict."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshloom.checkpoint.config import CheckpointConfig
from meshloom.models.config import DecoderConfig
from meshloom.models.costs import parameter_count
from meshloom.models.mixture.config import ExpertsConfig
from meshloom.optim.optimizers.config import AdamWConfig
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.layout import Layout
from meshloom.planner.block_time import MIXTURE_LAUNCHES, BlockWork, block_time, host_seconds
from meshloom.planner.calibration import Attention, Collective, Measured, Product, block_errors, calibrated
from meshloom.planner.cluster import ClusterConfig, Rates, load_cluster
from meshloom.planner.cost import layout_cost
from meshloom.planner.kernel_time import HIDDEN, Kernels
from meshloom.planner.memory import Job, optimizer_bytes
from meshloom.planner.network import gradient_levels, group, group_of
from meshloom.planner.offload import OffloadAccount
from meshloom.planner.parameters import decoder_inventory
from meshloom.planner.prediction import Prediction
from meshloom.planner.software import COMPILED, EAGER
from meshloom.planner.step_time import HOST_UPDATE, HOST_WAIT, STEP, Step, step_time

SHAPE = DecoderConfig(dim=4096, layers=32, heads=32, kv_heads=8, ffn_dim=14336, vocabulary=128256)
H100 = load_cluster(["cluster=h100x512"])


def step(parallel: ParallelConfig, cluster: ClusterConfig = H100, ranks: int = 64, many: int = 8, policy: str = "full") -> Step:
    layout = Layout.plan(parallel, ranks)
    job = Job(8192, 1, many, "bf16", [policy] * SHAPE.layers, compiled=True)
    optimizer = optimizer_bytes(AdamWConfig())
    assert optimizer is not None
    cost = layout_cost(decoder_inventory(SHAPE), parallel, layout, job, optimizer)
    return Step(SHAPE, parallel, layout, job, cost, OffloadAccount(), cluster)


def ideal() -> ClusterConfig:
    """A cluster whose kernels reach their peaks at once, whose memory and network cost nothing."""
    free = {
        "half_area": 0.0,
        "half_width": 0.0,
        "half_length": 0.0,
        "tail": 0.0,
        "launch": 0.0,
        "jitter": 0.0,
        "contention": 0.0,
    }
    rates = Rates(
        **{**free, "products": 1.0, "attention": 1.0, "attention_backward": 1.0, "latency": 0.0, "network_latency": 0.0}
    )
    return replace(H100, rates=rates, bandwidth=1e12, link=1e12, nics=[replace(H100.nics[0], gbit=1e12)])


def test_an_ideal_step_takes_its_flops_at_the_peak() -> None:
    """2 FLOPs a parameter forward, 4 backward; attention's causal half once, and 2.5 times again (arXiv 2205.14135)."""
    found = step_time(step(ParallelConfig(zero=1), ideal(), ranks=8, policy="none"))
    tokens = 8 * 8192
    matrices = 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336)
    scores = 32 * 4 * 4096 * 8192 / 2
    assert found.parts["products"] == pytest.approx(6 * matrices * tokens / 989e12, rel=1e-6)
    assert found.parts["attention"] == pytest.approx(3.5 * scores * tokens / 989e12, rel=1e-6)
    assert found.parts["head and loss"] == pytest.approx(6 * 4096 * 128256 * tokens / 989e12, rel=1e-3)
    again = step_time(step(ParallelConfig(zero=1), ideal(), ranks=8, policy="full")).parts["recomputation"]
    read = matrices - 32 * 4096 * 14336  # no backward pass reads what a block ends with
    assert again == pytest.approx((2 * read + scores) * tokens / 989e12, rel=1e-6)


def test_a_step_takes_what_its_host_launches_it_in_if_that_is_longer() -> None:
    """Eight micro-batches of 32 blocks, 3 passes each and 4 with recomputation; eager blocks have a time of their own."""
    slow = replace(H100.rates, launch=0.1, launch_eager=0.2)
    for policy, passes in (("none", 3), ("selective", 3), ("full", 4)):
        plain = step(ParallelConfig(zero=1), replace(H100, rates=slow), ranks=8, policy=policy)
        assert step_time(plain).seconds == pytest.approx(8 * 32 * passes * 0.1 + STEP)
        eager = replace(plain, job=replace(plain.job, compiled=False))
        assert step_time(eager).seconds == pytest.approx(8 * 32 * passes * 0.2 + STEP)
        staged = step(ParallelConfig(zero=1, pp=8), replace(H100, rates=slow), ranks=8, policy=policy)
        layers = max(len(held) for rank in staged.cost.ranks for held in rank.layers)
        assert step_time(staged).seconds == pytest.approx(8 * layers * passes * 0.1 + STEP), "each launches its own"
    quick = step(ParallelConfig(zero=1), ranks=8, policy="none")
    assert HOST_WAIT not in step_time(quick).parts and step_time(quick).seconds > 8 * 32 * 3 * H100.rates.launch


def test_a_host_that_updates_launches_nothing_meanwhile() -> None:
    """Its update of 40 bytes a parameter, and the disk, come after the passes that it launched: nothing hides the other."""
    slow = replace(H100, rates=replace(H100.rates, launch=0.1))
    plain = step(ParallelConfig(zero=1), slow, ranks=8, policy="none")
    away = OffloadAccount(disk_read=10**9, disk_written=10**9)
    host = replace(plain, parallel=replace(plain.parallel, offload="cpu"), away=away)
    expected = 8 * 32 * 3 * 0.1 + 40 * parameter_count(SHAPE) / 8 / HOST_UPDATE + 8 * 2e9 / (slow.disk * 1e9) + STEP
    assert step_time(host).seconds == pytest.approx(expected, rel=1e-3)


def test_eager_blocks_and_mixtures_cost_the_host_more() -> None:
    """An eager block has 2.5 times the kernels of a compiled one, a mixture's 1.4 times those of a dense one."""
    rates, dense = H100.rates, SHAPE.block(0)
    mixed = replace(SHAPE, experts=ExpertsConfig(count=8, top_k=2, ffn_dim=1024)).block(0)
    compiled = host_seconds(dense, "none", COMPILED, rates)
    assert compiled == pytest.approx(3 * rates.launch)
    assert host_seconds(dense, "none", EAGER, rates) == pytest.approx(2.5 * compiled)
    other = replace(COMPILED, launches=EAGER.launches)  # of another program, which has no rate of its own
    assert host_seconds(dense, "none", other, rates) == pytest.approx(2.5 * compiled)
    for software in (COMPILED, EAGER):
        alike = [host_seconds(block, "full", software, rates) for block in (mixed, dense)]
        assert alike[0] / alike[1] == pytest.approx(MIXTURE_LAUNCHES) and MIXTURE_LAUNCHES > 1


def test_a_step_that_waits_for_its_host_keeps_the_wide_band() -> None:
    """Calibration launches a bare block, and a step's host has hooks, loss and update to launch, too."""
    measured = replace(H100, gpus=1, calibrated=True)
    quick = step(ParallelConfig(zero=1), measured, ranks=1, policy="none")
    waiting = replace(quick, cluster=replace(measured, rates=replace(measured.rates, launch=1.0)))
    assert [Prediction(each, 8, 1e9).band for each in (quick, waiting)] == [0.10, 0.25]


def test_an_even_pipeline_waits_as_the_closed_form_says() -> None:
    """(p − 1) / (v · m) of the ideal time (arXiv 2104.04473); here the head makes the last stage the busiest."""
    for schedule, chunks, most in (("1f1b", 1, 7 / 32), ("interleaved", 2, 7 / 64)):
        parallel = ParallelConfig(pp=8, zero=1, schedule=schedule, stages_per_rank=chunks if chunks > 1 else None)
        parts = step_time(step(parallel, ideal(), ranks=8, many=32)).parts
        busy = sum(parts.values()) - parts["pipeline bubble"]
        assert 0.5 * most < parts["pipeline bubble"] / busy < 1.1 * most
    bound = step_time(step(parallel, ideal(), ranks=8, many=32), simulated=False)
    assert "pipeline bubble" not in bound.parts and bound.seconds == pytest.approx(busy)


def test_each_cost_in_time_is_a_part_of_its_own() -> None:
    plain = step_time(step(ParallelConfig(zero=3)))
    assert {"products", "attention", "pointwise", "recomputation", "update", "contention", "slowest rank"} <= plain.parts.keys()
    tensor = step_time(step(ParallelConfig(zero=3, tp=8)))
    slow = step_time(step(ParallelConfig(zero=3, tp=8), replace(H100, link=45.0)))
    assert slow.parts["tensor exchange"] == pytest.approx(10 * tensor.parts["tensor exchange"], rel=0.3)
    narrow = step_time(step(ParallelConfig(zero=3), replace(H100, nics=[replace(H100.nics[0], gbit=10.0)])))
    assert narrow.parts["gradient reduction"] > 10 * plain.parts["gradient reduction"]
    assert narrow.seconds > plain.seconds and narrow.beside["weight gathering"] > 0
    assert step_time(replace(step(ParallelConfig(zero=3)), length=512.0)).parts["attention"] < plain.parts["attention"] / 3
    ring = step_time(step(ParallelConfig(zero=3, cp=8), replace(H100, link=20.0))).parts["context exchange"]
    assert ring > step_time(step(ParallelConfig(zero=3, cp=8))).parts["context exchange"] > 0
    slow = replace(H100, link=0.01)  # beside messages nothing else counts
    direct, handed = (
        step_time(step(ParallelConfig(zero=3, cp=8, ring_direct=most), slow)).parts["context exchange"] for most in (8, 7)
    )
    assert handed / direct == pytest.approx((1 + 0.75 + 2 * 8 / 7) / (1 + 2), rel=1e-3), "keys, and a sum in fp32"


def test_a_ring_of_queries_sends_what_they_take() -> None:
    """Per query head of 128 elements: keys and values three times, or queries, outputs and gradients, and three numbers."""
    slow, head = replace(H100, link=0.01), 128 * 2
    for kv_heads, keys, queries in ((32, 6 * head, 5 * head + 12), (8, 6 * head / 4, 5 * head + 12)):
        shape = replace(SHAPE, kv_heads=kv_heads)
        times = [
            step_time(replace(step(ParallelConfig(zero=3, cp=8, ring_exchange=moved), slow), model=shape)).parts
            for moved in ("keys", "queries")
        ]
        assert times[1]["context exchange"] / times[0]["context exchange"] == pytest.approx(queries / keys, rel=1e-3)


def test_the_last_results_of_a_ring_are_hidden_by_nothing() -> None:
    """Of long documents computation hides all others: outputs and log-sum-exps of queries, gradients of queries or keys."""
    kernels, tokens = Kernels(replace(ideal(), link=450.0), "bf16"), 32768
    for moved, forward, backward in (("keys", 0, 2 * 1024 * 2), ("queries", 4096 * 2 + 32 * 4, 4096 * 2)):
        parallel = ParallelConfig(zero=3, cp=8, ring_exchange=moved)
        groups = [group_of(kernels.cluster, Layout.plan(parallel, 64), axis) for axis in ("tp", "cp")]
        work = BlockWork(tokens, 8.0 * tokens, "none", False, False, parallel, COMPILED, *groups)
        found = block_time(SHAPE.block(0), work, kernels)
        for parts, back in ((found.forward, forward), (found.to_input, backward)):
            expected = pytest.approx(tokens * back / groups[1].bandwidth, rel=1e-3, abs=1e-9)
            assert parts.get("context exchange", 0.0) == expected


def test_gradients_cross_the_network_as_their_exchange_says() -> None:
    """By hand, 8 GPUs a node: a GPU has its own share of the cards, and in levels an eighth of the elements, twice as wide."""
    quick = replace(H100, rates=replace(H100.rates, latency=0.0, network_latency=0.0), link=1e12)

    def seconds(kind: str, many: int) -> float:
        found = step_time(step(ParallelConfig(zero=1, gradient_exchange=kind), quick, ranks=64, many=many))
        return found.parts["gradient reduction"] + found.beside["gradient reduction"]

    share = 400e9 / 8 * quick.rates.network
    parameters = parameter_count(SHAPE)
    for many, width in ((1, 2), (8, 4)):
        assert seconds("direct", many) == pytest.approx(width * parameters * 56 / 64 / share, rel=2e-3)
        assert seconds("hierarchical", many) == pytest.approx(4 * parameters / 8 * 7 / 8 / share, rel=2e-3)
        assert seconds("auto", many) == seconds("hierarchical", many)


def test_exchange_is_direct_where_hosts_cut_copies_in_several_ways() -> None:
    """Of four copies on six GPUs each, the first is on one node of eight, and the second on two."""

    def levels(replicate: int, ranks: int) -> tuple[int, ...]:
        parallel = ParallelConfig(zero=1, replicate=replicate)
        return gradient_levels(parallel, Layout.plan(parallel, ranks), 8)

    assert levels(4, 24) == (6,)
    assert levels(2, 24) == (4, 3)  # both have eight on one node and four on another
    assert levels(2, 32) == (8, 2)


def test_checkpoints_cost_what_passes_do_not_hide() -> None:
    """12 bytes of state a parameter over 8 GPUs at 25 GB/s; the disk of a node takes what its 8 GPUs write."""
    plain = step(ParallelConfig(zero=3), ranks=8)
    every = CheckpointConfig(every=10)
    assert "checkpoints" not in step_time(replace(plain, saving=every)).parts, "the passes hide it"
    size = 12 * parameter_count(SHAPE) / 8
    slow = replace(plain, cluster=replace(H100, host_link=0.5))
    passes = step_time(slow).seconds - step_time(slow).parts["update"]
    found = step_time(replace(slow, saving=every)).parts["checkpoints"]
    assert found == pytest.approx((size / 0.5e9 - passes) / 10, rel=1e-3)
    sync = step_time(replace(plain, saving=CheckpointConfig(every=10, mode="sync"))).parts["checkpoints"]
    assert sync == pytest.approx((size / (H100.host_link * 1e9) + 8 * size / 2e9) / 10, rel=1e-3)
    assert "checkpoints" not in step_time(replace(slow, saving=CheckpointConfig(every=0))).parts


def test_calibration_finds_the_rates_that_made_the_times() -> None:
    truth = replace(
        H100.rates, products=0.7, half_area=2e6, attention=0.5, attention_backward=0.4, memory=0.8, link=0.7, latency=5e-6,
        network=0.6, network_latency=2e-5, speed=0.9,
    )  # fmt: skip
    kernels = Kernels(replace(H100, rates=replace(truth, speed=1.0)), "bf16")
    real = replace(H100, rates=truth)
    sizes = [(rows, out, 4096) for rows in (1024, 8192, 32768) for out in (2048, 14336)]
    # What products hide of their traffic, their measured times do not show.
    products = [Product(*size, kernels.product(*size)) for size in sizes]
    attention = [
        Attention(1e12, width, length, backward, kernels.attention(1e12, width, length, backward=backward))
        for width in (64, 128) for length in (2048, 32768) for backward in (False, True)
    ]  # fmt: skip
    collectives = [
        Collective(ranks, nodes, size, group(real, ranks).gather(size))
        for ranks, nodes in ((8, 1), (32, 4)) for size in (2**20, 2**26, 2**30)
    ]  # fmt: skip
    alone = group(H100, 1)
    work = BlockWork(8192, 8192, "none", False, False, ParallelConfig(), COMPILED, alone, alone)

    def predicted(cluster: ClusterConfig) -> float:
        times = block_time(SHAPE.block(0), work, Kernels(cluster, "bf16"))
        return sum(sum(parts.values()) for parts in (times.forward, times.to_input, times.to_weight))

    measured = Measured(
        "bf16", products, attention, [3.35e12 * 0.8], [25e9], collectives, [(predicted, predicted(real))],
        {True: 3 * 2e-3, False: 3 * 1e-3},
    )  # fmt: skip
    found = calibrated(H100, measured)
    assert HIDDEN < 1 and found.calibrated and found.band == 0.10
    for kept, bands in ((collectives[:3], (0.10, 0.10, 0.25)), ([], (0.10, 0.25, 0.25))):  # one GPU, one node, many
        less = calibrated(H100, replace(measured, collectives=kept))
        assert tuple(replace(less, gpus=gpus).band for gpus in (1, 8, 512)) == bands
    exchanges = ("link", "latency", "network", "network_latency")
    for name in ("products", "half_area", "attention", "attention_backward", "memory", *exchanges, "speed"):
        assert getattr(found.rates, name) == pytest.approx(getattr(truth, name), rel=0.02), name
    assert (found.rates.launch, found.rates.launch_eager) == (pytest.approx(2e-3), pytest.approx(1e-3))
    assert block_errors(found, measured) == [pytest.approx(0.0, abs=0.01)]


def test_kernels_of_experts_compute_little_again() -> None:
    """Of three products an expert all are, by kernels one by one the last, and by kernels between compiled blocks none."""
    kernels, alone = Kernels(ideal(), "bf16"), group(ideal(), 1, 1, 1)
    block = replace(SHAPE, experts=ExpertsConfig(count=8, top_k=2, ffn_dim=1024)).block(0)

    def again(fused: bool, compiled: bool) -> float:
        work = BlockWork(8192, 8192, "selective", False, False, ParallelConfig(), COMPILED, alone, alone, None, fused, compiled)
        found = block_time(block, work, kernels)
        return found.to_input["recomputation"] / found.forward["experts"]

    assert again(False, True) == pytest.approx(1, rel=0.01)
    assert again(True, False) == pytest.approx(1 / 3, rel=0.01)
    assert again(True, True) == pytest.approx(0, abs=0.01)


def test_shared_experts_as_wide_as_the_stream_are_counted_once() -> None:
    alone = group(ideal(), 1, 1, 1)
    work = BlockWork(8192, 8192, "none", False, False, ParallelConfig(), COMPILED, alone, alone)
    seconds: list[float] = []
    for shared in (0, 1):
        block = replace(SHAPE, experts=ExpertsConfig(count=8, top_k=2, shared=shared, ffn_dim=SHAPE.dim)).block(0)
        seconds.append(block_time(block, work, Kernels(ideal(), "bf16")).forward["experts"])
    assert seconds[1] - seconds[0] == pytest.approx(2 * 8192 * 3 * SHAPE.dim**2 / 989e12, rel=1e-3)
