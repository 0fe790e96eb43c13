"""The account of a rank's memory under DeepSpeed and with offloading, against what such a rank holds."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from meshloom.models.costs import parameter_count
from meshloom.optim.optimizers.adamw import AdamW
from meshloom.optim.optimizers.config import AdamWConfig
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.deepspeed.settings import DeepSpeedConfig
from meshloom.parallel.layout import Layout
from meshloom.planner import deepspeed_memory, offload
from meshloom.planner.built_model import model_inventory, tried_optimizer
from meshloom.planner.cost import RankCost, layout_cost
from meshloom.planner.engines import engine_cost
from meshloom.planner.memory import Job
from meshloom.planner.offload import OffloadAccount, describe, pinned
from support.models import decoder
from support.parity import SEQ_LEN, Work, build, share, step
from support.ranks import run_ranks

MODEL = (("dim", 96), ("ffn_dim", 256))
SMALL = {
    "reduce_bucket_size": 60_000,
    "allgather_bucket_size": 60_000,
    "sub_group_size": 30_000,
    "stage3_param_persistence_threshold": 0,
}
LARGEST = 96 * 256


def account(
    parallel: ParallelConfig, precision: str, micro_batches: int, ranks: int, shape: tuple[tuple[str, int], ...] = MODEL
) -> tuple[int, RankCost, OffloadAccount]:
    """Parameters of the model, and what a plan says of a rank."""
    with torch.device("meta"):
        model = decoder(**Work(model=shape).llama())
    job = Job(SEQ_LEN, 1, micro_batches, precision, ["none"] * model.config.layers, compiled=False)
    layout = Layout.plan(parallel, ranks)
    make = lambda parameters, shards: AdamW(AdamWConfig(), parameters, shards)  # noqa: E731
    inventory = model_inventory(model, parallel.tp)
    rank = layout_cost(inventory, parallel, layout, job, tried_optimizer(make)).ranks[0]
    return parameter_count(model.config), *engine_cost(rank, inventory, parallel, layout, job)


def held(rank: int, world_size: int, work: Work) -> int:
    """Bytes of all tensors that are alive between two steps, each storage once, but those that were there before."""
    before = storages()  # held, so that none of their addresses is given to another
    engine = build(work, world_size)
    for number in range(2):
        step(engine, work, number)
    gc.collect()  # a step's gradients may hang on a circle, for as long as Python likes
    return sum(storage.nbytes() for address, storage in storages().items() if address not in before)


def storages() -> dict[int, torch.UntypedStorage]:
    """Every tensor's storage, by address. The compiler's kinds of tensor, which earlier tests leave, have none."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in gc.get_objects():
        if type(tensor) in (torch.Tensor, torch.nn.Parameter, DTensor) and tensor.device.type == "cpu":
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            storage = getattr(tensor, "ds_tensor", tensor).untyped_storage()
            found[storage.data_ptr()] = storage
    return found


NOTHING: dict[str, str] = {}
BOTH = {"offload": "cpu", "offload_weights": "cpu"}


@pytest.mark.parametrize(
    ("precision", "zero", "away", "resting"),
    [
        # resting: bytes per parameter of gradient that stay between steps, of those in the account
        ("fp32", 0, NOTHING, 0.0),
        ("fp32", 1, NOTHING, 0.0),
        ("fp32", 2, NOTHING, 0.0),
        ("fp32", 3, NOTHING, 4.0 / 2),
        ("fp32", 2, {"offload": "cpu"}, 0.0),
        ("fp32", 3, {"offload": "cpu"}, 0.0),
        ("bf16", 1, NOTHING, 4.0),
        ("bf16", 2, NOTHING, 0.0),
        ("bf16", 3, NOTHING, 4.0 / 2),
        ("bf16", 1, {"offload": "cpu"}, 0.0),
        ("bf16", 2, {"offload": "cpu"}, 0.0),
        ("bf16", 3, {"offload": "cpu"}, 0.0),
        ("bf16", 3, BOTH, 0.0),
    ],
)
def test_a_rank_holds_what_the_account_says(
    monkeypatch: pytest.MonkeyPatch, precision: str, zero: int, away: dict[str, str], resting: float
) -> None:
    """GPU and host are one here, and nothing is locked in memory: what both hold is counted together, between two steps."""
    pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")
    monkeypatch.setattr(deepspeed_memory, "pinned", lambda size: size)
    keys = DeepSpeedConfig(config={"zero_optimization": SMALL})
    parallel = ParallelConfig(engine="deepspeed", zero=zero, deepspeed=keys, **away)  # type: ignore[arg-type]
    count, cost, elsewhere = account(parallel, precision, 2, 2)
    unit = 2 if precision == "bf16" else 4
    whole = cost.gathered if zero < 3 else 0  # under stage 3 only while they are used
    said = cost.weights + whole + (cost.optimizer or 0) + elsewhere.host + resting * count
    if zero == 3:
        said += 4 * SMALL["reduce_bucket_size"]
    elif away:
        said += unit * LARGEST  # for gradients on their way to the host
    found = sum(run_ranks(2, held, Work(parallel, precision=precision, model=MODEL, micro=2))) / 2
    # Of a parameter that is added up on the host, both ranks may hold a part and so a buffer.
    assert found == pytest.approx(said, rel=0.02 if (precision, zero, bool(away)) == ("fp32", 2, True) else 2e-3)


def kept_in_step(rank: int, world_size: int, work: Work) -> tuple[int, int]:
    """Bytes, between the last backward pass and the update, of hpZ's second copy and of parameters that stay gathered."""
    engine = build(work, world_size)
    step(engine, work, 0)
    engine.accumulate(share(engine.mesh, work, work.samples), torch.tensor(100.0, dtype=torch.float64))
    parameters = list(engine.module.parameters())
    copies = [getattr(parameter, "ds_secondary_tensor", None) for parameter in parameters]
    second = sum(copy.nbytes for copy in copies if copy is not None)
    held = {parameter.data_ptr() for parameter in parameters} - {parameter.ds_tensor.data_ptr() for parameter in parameters}
    return second, sum(parameter.nbytes for parameter in parameters if parameter.data_ptr() in held)


@pytest.mark.parametrize(
    ("ranks", "keys"),
    [
        (2, {}),
        (4, {"zero_hpz_partition_size": 2}),
        (2, {"stage3_param_persistence_threshold": 10_000}),
        (2, {"stage3_param_persistence_threshold": 10_000, "stage3_model_persistence_threshold": 20_000}),
        (1, {"stage3_param_persistence_threshold": 10_000}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_weights_that_stay_gathered_are_in_the_account(ranks: int, keys: dict[str, int]) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")

    def of(settings: dict[str, int]) -> tuple[ParallelConfig, RankCost]:
        zero = {**SMALL, "stage3_max_live_parameters": 0, **settings}
        parallel = ParallelConfig(engine="deepspeed", zero=3, deepspeed=DeepSpeedConfig(config={"zero_optimization": zero}))
        return parallel, account(parallel, "bf16", 2, ranks, deep)[1]

    deep = (*MODEL, ("layers", 6))  # all of it is never gathered at once
    (parallel, cost), (_, without) = of(keys), of({})
    second, gathered = run_ranks(ranks, kept_in_step, Work(parallel, precision="bf16", model=deep, micro=2))[0]
    assert (cost.weights - without.weights, cost.gathered - without.gathered) == (second, gathered)


def most_gradient(rank: int, world_size: int, work: Work) -> int:
    """Bytes of parameters' gradients that lie beside them when they are to be reduced."""
    engine: Any = build(work, world_size)
    inner, found = engine._engine, [0]
    reduce = inner.allreduce_gradients

    def watched(*arguments: Any, **settings: Any) -> Any:
        kept = [(p.grad, getattr(p, "grad_accum", None)) for p in inner.module.parameters()]
        found.append(sum(tensor.nbytes for both in kept for tensor in both if tensor is not None))
        return reduce(*arguments, **settings)

    inner.allreduce_gradients = watched
    step(engine, work, 0)
    return max(found)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_offloading_zero_1_sums_whole_gradients_on_the_gpu(precision: str) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")
    keys = DeepSpeedConfig(config={"zero_optimization": SMALL})
    parallel = ParallelConfig(engine="deepspeed", zero=1, offload="cpu", deepspeed=keys)
    count, cost, _ = account(parallel, precision, 2, 2)
    found = run_ranks(2, most_gradient, Work(parallel, precision=precision, model=MODEL, micro=2))[0]
    assert found == 4 * count
    share, unit = (2 * count, 2) if precision == "bf16" else (0, 4)  # the reduced share, before it goes to the host
    assert cost.gradients == pytest.approx(found + share + 4 * SMALL["reduce_bucket_size"] + unit * LARGEST, rel=1e-3)


def test_buffers_are_counted_as_they_are_asked_for() -> None:
    def of(zero: int, precision: str = "bf16", ranks: int = 2, **keys: object) -> tuple[RankCost, OffloadAccount]:
        place = {"offload": "nvme", "offload_weights": "nvme", "offload_path": "/fast"} if "offload_param" in keys else {}
        settings = DeepSpeedConfig(config={"zero_optimization": {**SMALL, **keys}})
        parallel = ParallelConfig(engine="deepspeed", zero=zero, deepspeed=settings, **place)  # type: ignore[arg-type]
        return account(parallel, precision, 2, ranks)[1:]

    few, many = (of(3, offload_param={"buffer_count": count, "buffer_size": 1000})[1] for count in (2, 7))
    assert many.host - few.host == 2 * 5 * 1000
    bucket = SMALL["reduce_bucket_size"]
    for zero, precision, size in ((1, "fp32", 4), (2, "fp32", 4), (2, "bf16", 2)):
        one, two, none = (
            of(zero, precision, **keys)[0].gradients for keys in ({}, {"overlap_comm": True}, {"contiguous_gradients": False})
        )
        assert two - one == size * bucket, (zero, precision)
        assert one - none == size * bucket + (4 * bucket if size == 2 else 0), (zero, precision)


def test_a_rank_of_fsdp2_holds_what_the_account_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between steps there is no gradient."""
    monkeypatch.setattr(offload, "pinned", lambda size: size)
    parallel = ParallelConfig(zero=3, offload="cpu")
    count, cost, elsewhere = account(parallel, "fp32", 2, 2)
    assert elsewhere.host == pytest.approx(16 * count / 2, rel=0.01)
    assert (cost.weights, cost.optimizer) == (0, 0) and 0 < cost.gradients < 4 * count
    found = sum(run_ranks(2, held, Work(parallel, precision="fp32", model=MODEL, micro=2))) / 2
    assert found == pytest.approx(12 * count / 2, rel=0.02)


def test_offloading_by_closed_form() -> None:
    """On disk 16 bytes a parameter, passed over twice a step; the host adds the gradient up, micro-batch by micro-batch."""
    keys = DeepSpeedConfig(config={"zero_optimization": {**SMALL, "sub_group_size": 10**9}})
    away = {"offload": "nvme", "offload_weights": "cpu", "offload_path": "/fast"}
    parallel = ParallelConfig(engine="deepspeed", zero=3, deepspeed=keys, **away)  # type: ignore[arg-type]
    n, cost, found = account(parallel, "bf16", 8, 1)
    with torch.device("meta"):
        model = decoder(**Work(model=MODEL).llama())
    decayed = sum(weight.numel() for name, weight in model.named_parameters() if model.decays(name))
    locked = pinned(4 * n) + pinned(2 * decayed) + pinned(2 * (n - decayed))
    assert found == OffloadAccount(
        host=locked + 4 * 4 * decayed,
        disk=16 * n,
        to_host=4 * n * 9,
        from_host=4 * n * 8 + 2 * n * 16,
        disk_read=16 * n,
        disk_written=16 * n,
    )
    assert (cost.weights, cost.optimizer, cost.gradients) == (0, 0, 4 * SMALL["reduce_bucket_size"])


def test_gpu_gathers_a_few_blocks_of_offloaded_weights() -> None:
    with torch.device("meta"):
        model = decoder(dim=8192, layers=80, heads=64, kv_heads=8, ffn_dim=28672, vocabulary=128256)
    keys = DeepSpeedConfig(config={"zero_optimization": {"stage3_max_live_parameters": 0}})
    parallel = ParallelConfig(
        engine="deepspeed", zero=3, offload="nvme", offload_path="/fast", offload_weights="cpu", deepspeed=keys
    )
    job = Job(4096, 1, 1, "bf16", ["full"] * 80, compiled=False)
    layout = Layout.plan(parallel, 1)
    inventory = model_inventory(model, parallel.tp)
    optimizer = tried_optimizer(lambda p, s: AdamW(AdamWConfig(), p, s))
    rank = layout_cost(inventory, parallel, layout, job, optimizer).ranks[0]
    cost, _ = engine_cost(rank, inventory, parallel, layout, job)
    block = sum(weight.numel() for weight in model.layers["0"].parameters())
    assert 2 * 2 * block <= cost.gathered < 2 * (2 * block + 2 * 128256 * 8192)


def test_locked_memory_is_a_power_of_two() -> None:
    assert [pinned(size) for size in (0, 1, 4096, 4097, 3 * 2**30)] == [0, 1, 4096, 8192, 2**32]


def test_a_plan_says_where_the_state_is_and_what_moves() -> None:
    gib = 2**30
    places, moves = describe(OffloadAccount(gib // 2, 4 * gib, 2 * gib, gib, 16 * gib, 12 * gib))
    assert "0.5 GiB in host memory and 4 GiB on disk" in places
    assert moves == (
        "each step moves per process 2 GiB from the GPU to the host, 1 GiB back; 16 GiB read from disk, 12 GiB written"
    )
    assert describe(OffloadAccount()) == []
