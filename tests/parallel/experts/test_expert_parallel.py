"""Expert parallelism: tokens reach their experts on other ranks, and every layout trains the run of one process (fp64)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from meshloom.models.mixture.dispatch import LocalJourney, sort_by_expert
from meshloom.models.mixture.mixture import mixtures_of
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.experts.dispatch import ExchangedJourney
from support.checkpoint_layouts import Pair, Place, matrix
from support.parity import Work, build, curves, global_tokens, share
from support.parity_table import ParityTable
from support.ranks import run_ranks

TOLERANCE = 1e-9
RANKS = 4
EXPERTS = {"count": 8, "top_k": 2, "ffn_dim": 7, "shared": 1}
GROUPS = {"count": 6, "top_k": 2, "groups": 3, "top_groups": 2, "scores": "sigmoid", "bias": True, "scale": 2.5}
MANY = {"count": 40, "top_k": 1, "ffn_dim": 3}
PAST = {"global_batch": 0.5}
ALL = {**PAST, "counts": "exact", "micro_batch": 0.3, "sequence": 0.2, "z_loss": 0.1}
FREE = {"global_batch": 0.0, "sequence": 0.3, "bias_rate": 0.01}


def work(micro: int, experts: dict[str, Any], balance: dict[str, Any], activation: str = "none", **settings: Any) -> Work:
    """A run of a decoder with mixtures. Coefficients are large, so that a wrong factor shows."""
    fields = Work.__dataclass_fields__
    of_work = {key: value for key, value in settings.items() if key in fields}
    parallel = ParallelConfig(**{key: value for key, value in settings.items() if key not in fields})
    model = (("experts", experts), ("layers", 4 if parallel.pp > 1 else 2))
    balances = tuple(balance.items())
    of_work = {"samples": 4 if parallel.pp > 1 else 8, **of_work}
    return Work(parallel, micro, steps=2, lr=2e-3, activation=activation, model=model, balance=balances, **of_work)


# Together: ep 2 and 4 with every ZeRO stage, copies of experts and none, experts on all ranks and some, and every other axis.
ROWS = {
    "ep 2, ZeRO-0": work(1, EXPERTS, ALL, ep=2, zero=0),
    "ep 4, ZeRO-1, 3 and 1 sequences": work(3, EXPERTS, PAST, ep=4, zero=1, samples=7),
    "ep 2, ZeRO-2, HSDP": work(1, EXPERTS, ALL, ep=2, zero=2, replicate=2),
    "ep 2, ZeRO-3, activation=full": work(1, EXPERTS, ALL, "full", ep=2, zero=3),
    "ep 4, ZeRO-3, experts without a token": work(1, MANY, ALL, ep=4, zero=3),
    "ep 2, ZeRO-1, sigmoid, groups, bias": work(2, GROUPS, FREE, ep=2, zero=1),
    "ep 4 over tp 2, ZeRO-3, cut inside sequences": work(3, EXPERTS, ALL, ep=4, tp=2),
    "ep 2, tp 2, ZeRO-1": work(4, EXPERTS, PAST, ep=2, tp=2, zero=1),
    "ep 4 over cp 2, documents": work(2, EXPERTS, ALL, ep=4, cp=2, documents=True),
    "ep 2, pp 2, interleaved, ZeRO-3": work(1, {**EXPERTS, "dense_layers": 1}, PAST, ep=2, pp=2, schedule="interleaved"),
    "ep 2, pp 2, ZeRO-1, activation=full": work(1, EXPERTS, ALL, "full", ep=2, pp=2, zero=1),
    "ep 2, pp 2, ZeRO-3, activation=selective": work(1, EXPERTS, PAST, "selective", ep=2, pp=2, zero=3),
    "ep 2, pp 2, zbv, ZeRO-0": work(1, EXPERTS, ALL, ep=2, pp=2, schedule="zbv", zero=0),
}
TABLE = ParityTable({name: (RANKS, row) for name, row in ROWS.items()}, timeout=300.0)


@pytest.mark.parametrize("name", TABLE.names())
def test_experts_on_other_ranks_train_the_same_run(name: str) -> None:
    """Losses, gradients (neither doubled nor divided), and on every rank the norm that it clips by."""
    found = TABLE.difference(name)
    assert found.worst < TOLERANCE, found


def held(rank: int, world_size: int, works: Sequence[Work]) -> list[list[tuple[str, int, tuple[int, ...]]]]:
    """This rank's weights of experts of each work: name, rows of the whole, and box's shape."""
    found: list[list[tuple[str, int, tuple[int, ...]]]] = []
    for each in works:
        experts = [fragment for fragment in build(each, world_size).fragments() if ".experts." in fragment.name]
        found.append([(fragment.name, fragment.global_shape[0], fragment.box.shape) for fragment in experts])
    return found


def test_a_rank_holds_its_part_of_its_own_experts_only() -> None:
    rows = {0: 4 * 7, 1: 2 * 7, 3: 2 * 7}  # by ZeRO stage
    for mine in run_ranks(RANKS, held, [work(1, EXPERTS, PAST, ep=2, zero=zero) for zero in rows]):
        for (zero, count), weights in zip(rows.items(), mine, strict=True):
            assert ("layers.1.ffn.experts.w1", 8 * 7, (count, 24)) in weights, zero
            assert len(weights) == 2 * 3, zero


def test_capacity_drops_the_same_tokens_wherever_experts_are() -> None:
    small = {**EXPERTS, "capacity": 0.7}
    here, there = (run_ranks(2, curves, work(4, small, PAST, ep=ep, zero=1))[0] for ep in (1, 2))
    assert there[0] == pytest.approx(here[0], rel=TOLERANCE) and there[1] == pytest.approx(here[1], rel=TOLERANCE)


def all_travelled(rank: int, world_size: int) -> dict[tuple[str, float | None], float]:
    return {
        (name, capacity): travelled(rank, choices, capacity) for name, choices in CHOICES.items() for capacity in (None, 0.5)
    }


def travelled(rank: int, choices: list[list[list[int]]], capacity: float | None) -> float:
    """The largest difference of outputs and gradients from those with all experts here. Experts multiply by a number."""
    choice_TK = torch.tensor(choices[rank])
    draw = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(len(choice_TK), 3, generator=draw, dtype=torch.float64, requires_grad=True)
    factor_E = torch.arange(2.0, 6.0, dtype=torch.float64, requires_grad=True)
    weight_TKD = torch.randn(*choice_TK.shape, 3, generator=draw, dtype=torch.float64)
    found: list[torch.Tensor] = []
    for experts, journey in (
        (slice(0, 4), LocalJourney(sort_by_expert(choice_TK, 4, capacity))),
        (slice(2 * rank, 2 * rank + 2), ExchangedJourney(dist.group.WORLD, sort_by_expert(choice_TK, 4, capacity))),
    ):
        rows_ND, counts = journey.send(x_TD)
        taken = factor_E[experts].repeat_interleave(counts)
        rows_ND = torch.cat([rows_ND[: len(taken)] * taken[:, None], rows_ND[len(taken) :]])
        y_TKD = journey.back(rows_ND)
        gradients = torch.autograd.grad((y_TKD * weight_TKD).sum(), (x_TD, factor_E))
        dist.all_reduce(gradients[1])
        found += [y_TKD.detach(), *gradients]
    return max(float((one - other).abs().max()) for one, other in zip(found[:3], found[3:], strict=True))


CHOICES = {
    "mixed": [[[0, 3], [2, 1], [3, 2]], [[1, 0], [3, 0], [2, 3]]],
    "the second rank's experts get no token, and it none back from itself": [[[0, 1]] * 3, [[1, 0]] * 3],
    "all tokens leave their rank": [[[2, 3]] * 3, [[0, 1]]],
}


def test_tokens_travel_to_any_expert_and_back() -> None:
    """With all of their choices, and with those that a capacity leaves."""
    for found in run_ranks(2, all_travelled, timeout=60.0):
        assert {case: difference for case, difference in found.items() if not difference < 1e-14} == {}


COLLAPSED = {"count": 8, "top_k": 2, "ffn_dim": 7, "scores": "sigmoid", "bias": True}


def with_all_tokens_on_one_rank(rank: int, world_size: int, works: list[Work]) -> list[tuple[float, float]]:
    """Loss and gradient norm of a step in which the biases of the choice send every token to the first two experts."""
    found: list[tuple[float, float]] = []
    for each in works:
        engine = build(each, world_size)
        for bias in engine.module.buffers():
            bias[:2] = 100.0
        batch = share(engine.mesh, each, 0)
        loss = float(engine.accumulate(batch, global_tokens(engine.mesh, batch)).mean)
        found.append((loss, float(engine.gradient_norm())))
        engine.update(1e-3)
    return found


def test_ranks_whose_experts_get_no_token_wait_for_none() -> None:
    """Under every ZeRO stage; elsewhere such ranks hang (DeepSpeed issues 2870, 1392, 4808)."""
    works = [work(1, COLLAPSED, PAST, activation, ep=4, zero=zero) for zero, activation in enumerate(["none", "full"] * 2)]
    (expected,) = run_ranks(1, with_all_tokens_on_one_rank, [work(1, COLLAPSED, PAST, zero=0)])[0]
    for found in run_ranks(RANKS, with_all_tokens_on_one_rank, works, timeout=100.0):
        assert found == [pytest.approx(expected, rel=TOLERANCE)] * 4


class Order(TorchDispatchMode):
    """List what a forward pass of a mixture begins: exchanges of counts and of rows, and the shared experts."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_to_all" in str(func):
            self.begun.append("rows" if args[0].is_floating_point() else "counts")
        return func(*args, **(kwargs or {}))


def order_of(rank: int, world_size: int, work: Work) -> list[str]:
    module = build(work, world_size).module
    order, mixture = Order(), next(iter(mixtures_of(module).values()))
    assert mixture.shared is not None
    mixture.shared.register_forward_pre_hook(lambda *_: order.begun.append("shared"))
    mixture.shared.register_forward_hook(lambda *_: order.begun.append("shared ends"))
    x = torch.ones(1, 4, 24, dtype=torch.float64)
    with torch.no_grad(), order:
        mixture([x] * mixture.num_inputs(x), None)
    return order.begun


def test_shared_experts_hide_the_wait_for_counts() -> None:
    """The host reads the counts when rows are sent. The exchange back has the same counts, and waits for none."""
    for begun in run_ranks(2, order_of, work(1, EXPERTS, PAST, ep=2, zero=1), timeout=60.0):
        assert begun == ["counts", "shared", "shared ends", "rows", "rows"]


def test_checkpoints_keep_every_bit_under_another_ep(tmp_path: Path) -> None:
    """There and back, with losses that go on: no rank's experts are lost."""
    here = Place(2, ParallelConfig(zero=3, ep=2), 1, "none")
    there = Place(4, ParallelConfig(zero=1, ep=4, tp=2), 2, "full")
    (result,) = matrix([Pair(here, there, (("experts", EXPERTS),))], tmp_path)
    assert result.fault() is None
