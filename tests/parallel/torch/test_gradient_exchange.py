"""Gradients exchanged in levels, within hosts and between them, train as those exchanged directly; and nothing is rounded."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from meshloom.parallel import exchange_groups, exchange_levels, hosts
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.torch import transport, weights
from support.checkpoint_layouts import Pair, Place, matrix
from support.engines import masters_of
from support.parity import Run, Work, build, differences, runs
from support.ranks import run_ranks

EXPERTS = (("experts", {"count": 8, "top_k": 2, "ffn_dim": 7, "shared": 1}),)


def on_hosts(patch: pytest.MonkeyPatch, per_host: int) -> None:
    """Let ranks believe that every host has so many of them."""
    patch.setattr(hosts, "host_name", lambda: f"host {int(os.environ['RANK']) // per_host}")


@contextmanager
def start_lines() -> Iterator[list[str]]:
    """Collect what is logged of exchanges."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log = exchange_groups.log
    handler, level = Collector(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lines
    log.removeHandler(handler)
    log.setLevel(level)


def work(kind: str = "auto", micro: int = 1, documents: bool = False, model: Any = (), **parallel: Any) -> Work:
    config = ParallelConfig(zero=1, gradient_exchange=kind, **parallel)
    return Work(config, micro, steps=2, lr=2e-3, documents=documents, model=model)


@dataclass(frozen=True)
class Row:
    """Train on hosts of so many ranks. Return the result, and the levels in which dense gradients are exchanged."""

    per_host: int
    levels: tuple[int, ...]
    work: Work
    peers: int = exchange_levels.PEERS


ROWS: dict[int, list[Row]] = {
    4: [
        Row(2, (2, 2), work()),
        Row(2, (2, 2), work("hierarchical", micro=8)),
        Row(2, (2, 2), work(cp=2, documents=True)),
    ],
    6: [Row(2, (2, 3), work()), Row(3, (3, 2), work())],
    8: [
        Row(2, (2, 2, 2), work(), peers=1),
        Row(4, (4, 2), work(model=(("tied", True),))),
        Row(2, (2, 2), work(replicate=2)),
        Row(4, (2, 2), work(tp=2)),
        Row(1, (4, 2), work("hierarchical")),
        Row(4, (4, 2), work(ep=2, model=EXPERTS)),
    ],
}


def on_their_hosts(rank: int, world_size: int, works: Any) -> list[Run]:
    found: list[Run] = []
    make = weights.make_exchange_groups
    for row, each in zip(ROWS[world_size], works, strict=True):
        sizes: dict[str, tuple[int, ...]] = {}

        def noted(
            moved: transport.Transport, mesh: Mesh, name: str, kind: str, sizes: dict[str, tuple[int, ...]] = sizes
        ) -> Sequence[Any]:
            groups = make(moved, mesh, name, kind)
            sizes[name] = tuple(group.size() for group in groups)
            return groups

        with pytest.MonkeyPatch.context() as patch:
            on_hosts(patch, row.per_host)
            patch.setattr(exchange_levels, "PEERS", row.peers)
            patch.setattr(weights, "make_exchange_groups", noted)
            found += runs(rank, world_size, [each])
        assert sizes["dense"] == row.levels, (row, sizes)
    return found


@pytest.mark.parametrize("ranks", ROWS)
def test_every_cut_into_hosts_trains_the_same_run(ranks: int) -> None:
    found = differences(ranks, [each.work for each in ROWS[ranks]], body=on_their_hosts)
    assert max(each.worst for each in found) < 1e-9, found


def exchanged(rank: int, world_size: int, cases: list[list[int]]) -> list[tuple[dict[str, tuple[int, ...]], list[str]]]:
    """By the hosts of ranks: sizes of the groups in which experts' and dense gradients are exchanged, and start lines."""
    found: list[tuple[dict[str, tuple[int, ...]], list[str]]] = []
    parallel = ParallelConfig(zero=1, ep=2, gradient_exchange="hierarchical")
    for places in cases:
        with pytest.MonkeyPatch.context() as patch, start_lines() as lines:
            patch.setattr(hosts, "host_name", lambda places=places: f"host {places[rank]}")
            mesh = Mesh.connect(Layout.plan(parallel, world_size), torch.device("cpu"), timeout=60.0)
            sizes: dict[str, tuple[int, ...]] = {}
            for name in ("experts", "dense"):
                moved = transport.choose_transport(mesh, mesh.weight_axes[name], parallel)
                groups = transport.make_exchange_groups(moved, mesh, name, parallel.gradient_exchange)
                for group in groups:
                    torch.distributed.all_reduce(torch.ones(1), group=group)
                sizes[name] = tuple(group.size() for group in groups)
            found.append((sizes, lines))
    return found


def test_ranks_agree_on_levels_that_all_can_take() -> None:
    """On hosts of 7 and 1 ranks, experts of one kind are on one host and those of the other on two."""
    first, *others = run_ranks(8, exchanged, [[0] * 7 + [1], [0, 1] * 4])
    assert [[sizes for sizes, _ in each] for each in (first, *others)] == [
        [{"experts": (4,), "dense": (4, 2)}, {"experts": (4,), "dense": (8,)}]
    ] * 8
    (_, uneven), (_, in_turns) = first
    assert uneven == [
        "gradients (experts) are exchanged directly among 4 ranks: 3 messages a rank, since hosts do not cut all groups"
        " of ranks alike",
        "gradients (dense) are exchanged in levels among 4 × 2 ranks: 4 messages a rank",
    ]
    assert in_turns[1] == (
        "gradients (dense) are exchanged directly among 8 ranks: 7 messages a rank, since the ranks of a host do not"
        " follow each other (--distribution=block would)"
    )
    assert not any(lines for each in others for _, lines in each)


def sent(rank: int, world_size: int, kinds: list[str]) -> list[tuple[set[float], set[tuple[int, str]], list[str]]]:
    """By kind of exchange: elements of gradients after it; messages of a rank and their dtype, of each all-to-all; start lines.

    Each rank's gradient is 256, 1, 1, …
    """
    found: list[tuple[set[float], set[tuple[int, str]], list[str]]] = []
    plain = torch.distributed.all_to_all_single
    calls: list[tuple[int, str]] = []

    def counted(received: torch.Tensor, rows: torch.Tensor, group: Any, **how: Any) -> Any:
        calls.append((group.size() - 1, str(rows.dtype)))
        return plain(received, rows, group=group, **how)

    for kind in kinds:
        with start_lines() as lines:
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
        found.append((values, set(calls), lines))
        assert all(calls.count(call) == len(masters.units) for call in calls), "each unit of weights once"
        calls.clear()
    return found


def test_levels_send_few_messages_and_add_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    # bf16 has no number between 256 and 258: there 256 + 1 + 1 + … would stay at 256.
    on_hosts(monkeypatch, 4)
    said = ["directly among 8 ranks: 7 messages a rank"], ["in levels among 4 × 2 ranks: 4 messages a rank"]
    for rank, (direct, levels) in enumerate(run_ranks(8, sent, ["direct", "auto"])):
        assert direct[:2] == ({263.0}, {(7, "torch.bfloat16")})
        assert levels[:2] == ({263.0}, {(3, "torch.bfloat16"), (1, "torch.float32")})
        lines = [[line.partition("exchanged ")[2] for line in each[2]] for each in (direct, levels)]
        assert lines == ([[], []] if rank else [*said])


def test_a_run_may_resume_with_another_exchange(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_hosts(monkeypatch, 2)
    here, there = (Place(4, ParallelConfig(zero=1, gradient_exchange=kind), 1, "none") for kind in ("direct", "auto"))
    (result,) = matrix([Pair(here, there, ())], tmp_path)
    assert result.fault() is None


def test_an_unknown_exchange_is_refused() -> None:
    (problem,) = ParallelConfig(zero=1, gradient_exchange="ring").problems()
    assert problem.key == "parallel.gradient_exchange" and "hierarchical" in problem.fix
