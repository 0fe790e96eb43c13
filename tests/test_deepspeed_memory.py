"""The account of a DeepSpeed rank's memory, against what such a rank holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from meshloom.config.parallel import ParallelConfig
from meshloom.models.llama import Llama
from meshloom.optim.adamw import AdamW
from meshloom.parallel.cost import RankCost, layout_cost
from meshloom.parallel.deepspeed.memory import OffloadAccount, deepspeed_cost, describe
from meshloom.parallel.layout import Layout
from meshloom.parallel.memory import Job
from parity import SEQ_LEN, Work, build, step
from ranks import run_ranks

MODEL = (("dim", 64), ("ffn_dim", 160))


def torch_rank(work: Work, ranks: int) -> tuple[RankCost, int]:
    with torch.device("meta"):
        model = Llama(**work.llama())
    job = Job(
        seq_len=SEQ_LEN, micro=1, micro_batches=1, precision=work.precision, policies=["none"] * model.depth, compiled=False
    )
    parallel = replace(work.parallel, engine="torch", offload="none")
    make = lambda parameters, shards: AdamW(parameters=parameters, shards=shards)  # noqa: E731
    return layout_cost(model, parallel, Layout.plan(parallel, ranks), job, make).ranks[0], model.parameter_count()


def held(rank: int, world_size: int, work: Work) -> tuple[int, int]:
    """Bytes of masters and moments, and of the weights to compute with."""
    engine = build(work, world_size)
    step(engine, work, 0)
    state = sum(fragment.tensor.nbytes for fragment in engine.fragments())
    weights = sum(getattr(p, "ds_tensor", p).nbytes for p in engine.module.parameters())
    masters = {p.data_ptr() for p in engine.module.parameters()}
    if work.parallel.zero == 0:
        state -= sum(f.tensor.nbytes for f in engine.fragments() if f.tensor.data_ptr() in masters)
    return state, weights


@pytest.mark.parametrize(
    ("precision", "zero", "offload"), [("fp32", 0, "none"), ("bf16", 1, "none"), ("bf16", 2, "cpu"), ("bf16", 3, "none")]
)
def test_state_takes_what_the_account_says(precision: str, zero: int, offload: str) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra: pip install 'meshloom[deepspeed]'")
    work = Work(ParallelConfig(engine="deepspeed", zero=zero, offload=offload), precision=precision, model=MODEL)
    rank, parameters = torch_rank(work, 2)
    cost, away = deepspeed_cost(rank, parameters, work.parallel, precision, 2)
    on_gpu = cost.weights + (cost.optimizer or 0)
    gradient = 4 * parameters // 2
    state, weights = (sum(each) / 2 for each in zip(*run_ranks(2, held, work), strict=True))
    assert state == pytest.approx(away.host - gradient if offload == "cpu" else on_gpu, rel=0.01)
    computed = cost.gathered - (rank.gathered if zero == 3 else 0)
    assert weights == pytest.approx(computed, rel=0.01)


def test_offloading_by_closed_form() -> None:
    """16 bytes a parameter away from the GPU, over the ranks; the disk is passed over twice a step."""
    n, ranks = 10**9, 4
    rank = RankCost([], n // ranks, 0.0, 4 * n // ranks, 0, 0, 8 * n // ranks, 7, 5)
    parallel = ParallelConfig(engine="deepspeed", zero=3, offload="nvme", offload_weights="cpu", offload_path="/fast")
    cost, away = deepspeed_cost(rank, n, parallel, "bf16", ranks)
    each = n // ranks
    assert away == OffloadAccount(2 * each, 16 * each, 4 * each, 2 * each, 16 * each, 16 * each, 2 * each)
    assert (cost.weights, cost.optimizer, cost.activations, cost.working) == (0, 0, 7, 5)
    places, moves = describe(away, micro_batches=8)
    assert "0.466 GiB in host memory and 3.73 GiB on disk" in places and "7.45 GiB of weights fetched" in moves
    assert describe(OffloadAccount(), 1) == []
