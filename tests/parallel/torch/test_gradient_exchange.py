"""Gradients exchanged in levels, within hosts and between them, train as those exchanged directly; and nothing is rounded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.parallel import hosts
from meshloom.parallel.config import ParallelConfig
from support.checkpoint_layouts import Pair, Place, matrix
from support.engines import masters_of
from support.parity import Run, Work, build, differences, runs
from support.ranks import run_ranks

EXPERTS = (("experts", {"count": 8, "top_k": 2, "ffn_dim": 7, "shared": 1}),)


def on_hosts(patch: pytest.MonkeyPatch, per_host: int) -> None:
    """Let ranks believe that every host has so many of them."""
    patch.setattr(hosts, "host_name", lambda: f"host {int(os.environ['RANK']) // per_host}")


def work(kind: str = "auto", micro: int = 1, documents: bool = False, model: Any = (), **parallel: Any) -> Work:
    config = ParallelConfig(zero=1, gradient_exchange=kind, **parallel)
    return Work(config, micro, steps=2, lr=2e-3, documents=documents, model=model)


ROWS: dict[int, list[tuple[int, Work]]] = {
    4: [(2, work()), (2, work("hierarchical", micro=8)), (2, work(tp=2)), (2, work(cp=2, documents=True))],
    6: [(2, work()), (3, work())],
    8: [
        (2, work()),
        (4, work(model=(("tied", True),))),
        (4, work(replicate=2)),
        (1, work("hierarchical")),
        (4, work(ep=2, model=EXPERTS)),
    ],
}
"""Number of ranks → ranks of each host, and what is trained there."""


def on_their_hosts(rank: int, world_size: int, works: Any) -> list[Run]:
    found: list[Run] = []
    for (per_host, _), each in zip(ROWS[world_size], works, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            on_hosts(patch, per_host)
            found += runs(rank, world_size, [each])
    return found


@pytest.mark.parametrize("ranks", ROWS)
def test_every_cut_into_hosts_trains_the_same_run(ranks: int) -> None:
    found = differences(ranks, [each for _, each in ROWS[ranks]], body=on_their_hosts)
    assert max(each.worst for each in found) < 1e-9, found


def sent(rank: int, world_size: int, kinds: list[str]) -> list[tuple[set[float], set[tuple[int, str]]]]:
    """By kind of exchange: elements of gradients after it; and messages of a rank and their dtype, of each all-to-all.

    Each rank's gradient is 256, 1, 1, …
    """
    found: list[tuple[set[float], set[tuple[int, str]]]] = []
    plain = torch.distributed.all_to_all_single
    calls: list[tuple[int, str]] = []

    def counted(received: torch.Tensor, rows: torch.Tensor, group: Any, **how: Any) -> Any:
        calls.append((group.size() - 1, str(rows.dtype)))
        return plain(received, rows, group=group, **how)

    for kind in kinds:
        engine = build(Work(ParallelConfig(zero=1, gradient_exchange=kind), precision="bf16"), world_size)
        masters = masters_of(engine)
        masters.begin_step(single=True, fused=True)
        masters.set_last_micro_batch(True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "all_to_all_single", counted)
            factor = 1.0 if rank else 256.0
            torch.stack([(parameter * factor).sum() for parameter in engine.module.parameters()]).sum().backward()
            masters.wait_reduce()
        gradients = [weight.tensor.grad for weight in masters.local.values() if weight.tensor.numel()]
        values = {float(value) for gradient in gradients if gradient is not None for value in gradient.unique()}
        found.append((values, set(calls)))
        assert all(calls.count(call) == len(masters.units) for call in calls), "each unit of weights once"
        calls.clear()
    return found


def test_levels_send_few_messages_and_add_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    # bf16 has no number between 256 and 258: there 256 + 1 + 1 + … would stay at 256.
    on_hosts(monkeypatch, 4)
    for direct, levels in run_ranks(8, sent, ["direct", "auto"]):
        assert direct == ({263.0}, {(7, "torch.bfloat16")})
        assert levels == ({263.0}, {(3, "torch.bfloat16"), (1, "torch.float32")})


def test_a_run_may_resume_with_another_exchange(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_hosts(monkeypatch, 2)
    here, there = (Place(4, ParallelConfig(zero=1, gradient_exchange=kind), 1, "none") for kind in ("direct", "auto"))
    (result,) = matrix([Pair(here, there, ())], tmp_path)
    assert result.fault() is None


def test_a_key_that_nobody_reads_is_refused() -> None:
    for wrong in ({"zero": 3}, {"zero": 0}, {"zero": 1, "pp": 2}, {"zero": 1, "engine": "deepspeed"}):
        config = ParallelConfig(gradient_exchange="hierarchical", **wrong)  # type: ignore[arg-type]
        assert "parallel.gradient_exchange" in {problem.key for problem in config.problems()}
    assert not ParallelConfig(zero=1, gradient_exchange="hierarchical").problems()
    (problem,) = ParallelConfig(zero=1, gradient_exchange="ring").problems()
    assert problem.key == "parallel.gradient_exchange" and "hierarchical" in problem.fix
