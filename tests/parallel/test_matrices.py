"""Whole matrices that travel in levels, within hosts and between them, train as those of one process."""

from __future__ import annotations

import functools
import os
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from meshloom.optim.build import build_optimizer
from meshloom.optim.optimizers import parameters
from meshloom.optim.optimizers.config import OptimConfig
from meshloom.optim.optimizers.matrix_config import GaLoreConfig, MuonConfig, NorMuonConfig, SOAPConfig
from meshloom.optim.optimizers.parameters import Matrix, NamedParameter
from meshloom.parallel import exchange_levels, hosts, matrices
from meshloom.parallel.box import Box
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engines import make_engine
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from support.models import decoder
from support.parity import Work, take_steps
from support.ranks import run_ranks
from support.settings import settings_of

MUON = MuonConfig(lr=0.02)
WORK = Work(samples=8, micro=1)
STEPS = 3
EXPERTS = (("experts", {"count": 8, "top_k": 2, "ffn_dim": 7, "shared": 1}),)


@dataclass(frozen=True)
class Row:
    """A training on hosts of so many ranks, and the levels in which its matrices travel. wave: elements at once"""

    per_host: int
    levels: tuple[int, ...]
    optim: OptimConfig
    parallel: ParallelConfig
    wave: int = 1000
    peers: int = exchange_levels.PEERS
    model: tuple[tuple[str, Any], ...] = ()


ROWS: dict[int, list[Row]] = {
    4: [
        Row(2, (2, 2), MUON, ParallelConfig(zero=3)),
        Row(2, (2, 2), SOAPConfig(lr=0.01, interval=2, max_dim=30), ParallelConfig(zero=0)),  # copies on each host
        Row(2, (4,), MUON, ParallelConfig(zero=1, gradient_exchange="direct")),
        Row(2, (2,), MUON, ParallelConfig(zero=1, pp=2)),  # a stage on each host
    ],
    6: [Row(2, (2, 3), NorMuonConfig(lr=0.02, per_head=True), ParallelConfig(zero=1))],
    8: [
        Row(2, (2, 2, 2), MUON, ParallelConfig(zero=3, tp=2), peers=1),
        Row(4, (4, 2), GaLoreConfig(lr=0.01, rank=4, interval=2), ParallelConfig(zero=2, replicate=2), wave=1 << 26),
        Row(1, (4, 2), MUON, ParallelConfig(zero=3, gradient_exchange="hierarchical")),
        Row(4, (4, 2), MUON, ParallelConfig(zero=1, ep=2), model=EXPERTS),
    ],
}


def losses(row: Row, world_size: int, parallel: ParallelConfig) -> list[float]:
    """The losses of a few steps."""
    mesh = Mesh.connect(Layout.plan(parallel, world_size), torch.device("cpu"))
    with torch.device("meta"):
        model = decoder(**{**WORK.llama(), **dict(row.model)})
    make = functools.partial(build_optimizer, row.optim)
    return take_steps(make_engine(model, mesh, make, parallel, settings_of(model, parallel, seed=7)), WORK, range(STEPS)).losses


def on_their_hosts(rank: int, world_size: int) -> list[list[float]]:
    found: list[list[float]] = []
    make = matrices.groups_of_levels
    for row in ROWS[world_size]:
        sizes: list[tuple[int, ...]] = []

        def noted(mesh: Mesh, axis: Any, levels: Sequence[int], sizes: list[tuple[int, ...]] = sizes) -> Sequence[Any]:
            groups = make(mesh, axis, levels)
            sizes.append(tuple(group.size() for group in groups))
            return groups

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hosts, "host_name", lambda per=row.per_host: f"host {int(os.environ['RANK']) // per}")
            patch.setattr(exchange_levels, "PEERS", row.peers)
            patch.setattr(parameters, "WAVE", row.wave)
            patch.setattr(matrices, "groups_of_levels", noted)
            found.append(losses(row, world_size, row.parallel))
        assert sizes == [row.levels], (row, sizes)
    return found


def alone(rank: int, world_size: int) -> dict[int, list[list[float]]]:
    return {ranks: [losses(row, 1, ParallelConfig(zero=0)) for row in rows] for ranks, rows in ROWS.items()}


@pytest.fixture(scope="module")
def expected() -> dict[int, list[list[float]]]:
    (found,) = run_ranks(1, alone)
    return found


@pytest.mark.parametrize("ranks", ROWS)
def test_every_cut_into_hosts_updates_the_same_matrices(ranks: int, expected: dict[int, list[list[float]]]) -> None:
    for found in run_ranks(ranks, on_their_hosts):
        for row, got, want in zip(ROWS[ranks], found, expected[ranks], strict=True):
            assert got == pytest.approx(want, rel=1e-9), row


UNDER_WAY = {((4,), True): 2 + 2 * 4, ((4,), False): 2 + 2, ((2, 2), False): 2 * (2 + 2)}
"""Levels and whether each of 4 ranks has all → waves of an owner that are sent and received while it computes: as many that
arrive as there are levels, and that leave. With copies, results are sent to four and come from four."""


def waves_under_way(rank: int, world_size: int) -> dict[tuple[tuple[int, ...], bool], float]:
    """The waves that are sent and received, at most, while one is computed."""
    mesh = Mesh.connect(Layout.plan(ParallelConfig(zero=0), world_size), torch.device("cpu"))
    rows, columns, found = 8, 4, {}
    exchange = dist.all_to_all_single
    for levels, copies in UNDER_WAY:
        under_way: list[weakref.ref[torch.Tensor]] = []
        counted: list[float] = []

        def noted(output: torch.Tensor, input: torch.Tensor, *args: Any, under_way: Any = under_way, **kwargs: Any) -> Any:
            under_way += [weakref.ref(output), weakref.ref(input)]
            return exchange(output, input, *args, **kwargs)

        def waves(under_way: Sequence[weakref.ref[torch.Tensor]] = under_way) -> float:
            return sum(tensor.nbytes for each in under_way if (tensor := each()) is not None) / (rows * columns * 4)

        def double(
            _: Sequence[Matrix],
            whole: Sequence[torch.Tensor],
            waves: Callable[[], float] = waves,
            most: int = UNDER_WAY[levels, copies],
            counted: list[float] = counted,
            deadline: float = time.monotonic() + 30,
        ) -> list[torch.Tensor]:
            while waves() > most and time.monotonic() < deadline:
                time.sleep(0.001)  # Gloo's thread lets go of what has arrived a moment later
            counted.append(waves())
            return [2 * each for each in whole]

        offset, held = (0, rows) if copies else (rows // world_size * rank, rows // world_size)
        shards = [torch.full((held, columns), float(number + offset)) for number in range(8 * world_size)]
        named = [
            NamedParameter(str(number), torch.nn.Parameter(shard), (rows, columns), hidden=True, offsets=(offset, 0))
            for number, shard in enumerate(shards)
        ]
        boxes = {each.name: Box((offset, 0), (held, columns)) for each in named}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parameters, "WAVE", rows * columns)
            patch.setattr(dist, "all_to_all_single", noted)
            whole = matrices.MeshMatrices(mesh, boxes, named, lambda a, b: a * b, levels)
            results = whole.map(shards, double, torch.float32)
        assert all(torch.equal(result, 2 * shard) for result, shard in zip(results, shards, strict=True))
        found[levels, copies] = max(counted)
    return found


def test_no_wave_is_kept_when_it_has_arrived() -> None:
    assert run_ranks(4, waves_under_way) == [UNDER_WAY] * 4
