"""Mixtures of experts on every layout, by the trainer's own loop, held to closed forms of the balance in a bare loop (fp64)."""

from __future__ import annotations

from typing import Any

import pytest

from meshloom.parallel.config import CONTEXT_KINDS, ParallelConfig
from meshloom.parallel.pipeline.stages import SCHEDULES
from support.parity import Work, build, curves, global_tokens, share
from support.parity_table import ParityTable
from support.ranks import run_ranks

TOLERANCE = 1e-9
STEPS = 2  # the second has the first one's averages and biases, and the evaluation those of the second
EXPERTS = {"count": 5, "top_k": 2, "ffn_dim": 7, "shared": 1}
GROUPS = {"count": 6, "top_k": 2, "groups": 3, "top_groups": 2, "scores": "sigmoid", "bias": True, "scale": 2.5}
LARGE = {"global_batch": 0.5}
PAST, EXACT = LARGE, {**LARGE, "counts": "exact"}
ALL = {**EXACT, "micro_batch": 0.3, "sequence": 0.2, "z_loss": 0.1}
FREE = {"global_batch": 0.0, "sequence": 0.3, "bias_rate": 0.01}


def work(micro: int = 1, balance: dict[str, Any] = PAST, experts: dict[str, Any] = EXPERTS, **settings: Any) -> Work:
    """A run of a decoder with mixtures. Coefficients are large, so that a wrong factor shows."""
    axes, fields = ParallelConfig.__dataclass_fields__, Work.__dataclass_fields__
    parallel = ParallelConfig(**{key: value for key, value in settings.items() if key in axes})
    model: dict[str, Any] = {"experts": experts, "layers": 4 if parallel.pp > 1 else 2}
    settings = {"steps": STEPS, **({"samples": 4} if parallel.pp > 1 else {}), **settings}
    model |= {key: value for key, value in settings.items() if key not in axes and key not in fields}
    of_work = {key: value for key, value in settings.items() if key in fields}
    return Work(parallel, micro, lr=2e-3, model=tuple(model.items()), balance=tuple(balance.items()), **of_work)


# A pass of tensor or context parallelism is slow: where all ranks share it there are two, of 2 and 2 or 3 and 2 sequences.
DENSE_FIRST = {**EXPERTS, "dense_layers": 1}
BIASED = {**EXPERTS, "logit_bias": True}
TABLE = ParityTable(
    {
        **{f"past, {micro} sequences at once": (1, work(micro, zero=0, steps=3)) for micro in (1, 3, 8)},
        **{f"exact, {micro} sequences at once": (1, work(micro, EXACT, zero=0)) for micro in (1, 3, 8)},
        "past, last step alone": (1, work(2, {**PAST, "keep": 0.0}, zero=0)),
        "prefix": (1, work(2, {**LARGE, "counts": "prefix"}, zero=0)),
        "all losses": (1, work(3, ALL, zero=0)),
        "sigmoid, groups, bias": (1, work(2, FREE, GROUPS, zero=0)),
        "sigmoid, not renormalised": (1, work(2, ALL, {**GROUPS, "renormalise": False, "groups": 1}, zero=0)),
        "one expert, top 1": (1, work(2, PAST, {"count": 1, "top_k": 1}, zero=0)),
        "second layer only": (1, work(2, PAST, {**EXPERTS, "layers": [1]}, zero=0)),
        **{
            f"all losses, activation={policy}": (1, work(3, ALL, activation=policy))
            for policy in ("full", "selective", "offload")
        },
        "prefix, activation=full": (1, work(2, {**LARGE, "counts": "prefix"}, activation="full")),
        **{f"past, ZeRO-{zero}": (2, work(1, PAST, DENSE_FIRST, zero=zero)) for zero in range(4)},
        **{f"exact, ZeRO-{zero}, activation=full": (2, work(2, EXACT, zero=zero, activation="full")) for zero in (1, 3)},
        "experts without a token, ZeRO-3": (2, work(1, ALL, {"count": 40, "top_k": 1, "ffn_dim": 3}, zero=3)),
        "all losses, ZeRO-3, 7 sequences": (2, work(2, ALL, zero=3, samples=7)),
        "sigmoid, groups, bias, ZeRO-1": (2, work(2, FREE, GROUPS, zero=1)),
        "all losses, tp 2": (2, work(3, ALL, DENSE_FIRST, tp=2, samples=5)),
        "all losses, tp 2, cut between sequences": (2, work(2, ALL, tp=2, activation="full", samples=4)),
        "sigmoid, groups, bias, tp 2": (2, work(3, FREE, GROUPS, tp=2, samples=5)),
        **{
            f"past, pp 2, {schedule}": (2, work(1, PAST, DENSE_FIRST, pp=2, schedule=schedule, zero=0))
            for schedule in ("1f1b", "zbv")
        },
        **{f"all losses, pp 2, {schedule}": (2, work(1, ALL, pp=2, schedule=schedule, zero=0)) for schedule in SCHEDULES},
        "sigmoid, groups, bias, pp 2, documents": (2, work(2, FREE, GROUPS, pp=2, documents=True)),
        **{
            f"all losses, cp 2, {kind}": (2, work(2, ALL, cp=2, cp_kind=kind, documents=True, samples=4))
            for kind in CONTEXT_KINDS
        },
        "all losses, cp 2 × tp 2": (4, work(3, ALL, cp=2, tp=2, samples=5)),
        "biases as in gpt-oss, tp 2": (
            2,
            work(2, PAST, BIASED, tp=2, samples=4, ffn_bias=True, ffn_activation="clamped_swiglu"),
        ),
        "biases as in gpt-oss, ZeRO-3": (2, work(2, PAST, BIASED, zero=3, ffn_bias=True, ffn_activation="clamped_swiglu")),
        "past, tp 2 × ZeRO-3": (4, work(3, PAST, tp=2, zero=3)),
        "exact, tp 2 × ZeRO-1": (4, work(2, EXACT, tp=2, zero=1)),
        "exact, pp 2 × ZeRO-3, interleaved": (4, work(1, EXACT, pp=2, schedule="interleaved", samples=8)),
        "past, HSDP": (4, work(1, PAST, replicate=2, zero=2)),
    },
    timeout=300.0,
)


@pytest.mark.parametrize("name", TABLE.names())
def test_balance_is_the_closed_form_on_every_layout(name: str) -> None:
    found = TABLE.difference(name)
    assert found.worst < TOLERANCE, found


def test_a_prefix_is_of_all_ranks_passes() -> None:
    """Two ranks with one sequence each see in every pass what one rank with two sees."""
    balance = {**LARGE, "counts": "prefix"}
    both, one = (run_ranks(n, curves, work(3 - n, balance, zero=n - 1))[0] for n in (2, 1))
    assert both[0] == pytest.approx(one[0], rel=TOLERANCE) and both[1] == pytest.approx(one[1], rel=TOLERANCE)


def reported(rank: int, world_size: int, work: Work) -> tuple[dict[str, float], set[float]]:
    """Return what one step reports of its experts after an evaluation, and each layer's assignments in both over the tokens."""
    engine = build(work, world_size)
    batch = share(engine.mesh, work, 0)
    tokens = global_tokens(engine.mesh, batch)
    counts: list[float] = []
    engine.evaluate(batch.micro_batches)
    counts += (engine.assignments().sum(1) / tokens).tolist()
    extras = engine.accumulate(batch, tokens).extras
    counts += (engine.assignments().sum(1) / tokens).tolist()
    return {name: float(value) for name, value in extras.items()}, set(counts)


def test_every_token_is_reported_once() -> None:
    """Entropy and load of one expert alone are known; recomputation, evaluation, other ranks and tokens must not count."""
    one = {"count": 1, "top_k": 1}
    for ranks, layout in ((1, {"activation": "full"}), (2, {"pp": 2, "zero": 0}), (2, {"tp": 2}), (2, {"cp": 2})):
        for found, per_token in run_ranks(ranks, reported, work(2, EXACT, one, **layout)):
            assert per_token == {1.0}, layout
            assert found["experts/1/lbl"] == pytest.approx(1.0, rel=1e-12), layout
            assert found["experts/1/entropy"] == found["experts/1/dropped"] == found["experts/1/violation"] == 0.0


def test_dropped_tokens_are_reported() -> None:
    ((found, _),) = run_ranks(1, reported, work(8, PAST, {**EXPERTS, "capacity": 0.5}, zero=0))
    # An expert has room for half of a mean load, ⌈0.5 · 128 · 2 / 5⌉. Of the 128 positions 107 count, and are taken first.
    assert 1 - 5 * 26 / (107 * 2) - 1e-12 <= found["experts/0/dropped"] < 0.6


def with_one_layer_collapsed(rank: int, world_size: int, work: Work) -> tuple[dict[str, float], float]:
    """Return what a step reports whose second layer sends every token to experts 0 and 1, and its loss."""
    engine = build(work, world_size)
    batch = share(engine.mesh, work, 0)
    biases = dict(engine.module.named_buffers())
    biases["layers.1.ffn.router.bias"][:2] = 100.0
    loss = engine.accumulate(batch, global_tokens(engine.mesh, batch))
    engine.gradient_norm()
    return {name: float(value) for name, value in loss.extras.items()}, float(loss.mean)


def test_one_collapsed_layer_is_seen_and_loses_nothing() -> None:
    """A mean over layers would hide it (Qwen3 issue 1418)."""
    even = {"count": 8, "top_k": 2, "scores": "sigmoid", "bias": True}
    ((found, loss),) = run_ranks(1, with_one_layer_collapsed, work(2, PAST, even, zero=0))
    assert found["experts/1/load_max"] == 4.0 and found["experts/1/idle"] == 6.0 and found["experts/1/dropped"] == 0.0
    assert found["experts/0/load_max"] < 3.0 and found["experts/0/idle"] < 6.0
    assert 0 < loss < float("inf")
