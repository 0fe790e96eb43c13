"""A layout brought to life: what its groups are told."""

from __future__ import annotations

import datetime
from typing import Any

import torch

from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from support.ranks import run_ranks


def limits(rank: int, world_size: int) -> dict[str, datetime.timedelta]:
    """By axis, how long its group waits."""
    parallel = ParallelConfig(zero=1, tp=2)
    mesh = Mesh.connect(Layout.plan(parallel, world_size), torch.device("cpu"), timeout=77)
    found: dict[str, datetime.timedelta] = {}
    dense = mesh.weight_axes["dense"]
    for axis, there in {**mesh.axes, "shards": dense.shards, "copies": dense.copies}.items():
        backend: Any = there.get_group()._get_backend(mesh.device)
        found[axis] = backend.options._timeout
    return found


def of_islands(rank: int, world_size: int) -> tuple[int, list[int], float]:
    """The rank, the numbers in the whole run of the ranks of its island, and how many seconds islands wait for one another."""
    mesh = Mesh.connect(Layout.plan(ParallelConfig(zero=1), world_size, 2), torch.device("cpu"), timeout=77)
    across: Any = mesh.island.across
    waits = across._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    assert mesh.global_rank(3) == 3
    return mesh.rank, [mesh.island.global_rank(each) for each in range(mesh.island.layout.world_size)], waits


def test_islands_know_their_place_in_the_run_and_wait_longer_for_others() -> None:
    islands = [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert run_ranks(4, of_islands) == [(rank, ranks, 12 * 77.0) for rank, ranks in enumerate(islands)]


def test_every_group_has_the_configured_timeout() -> None:
    expected = dict.fromkeys(("pp", "copies", "shards", "tp", "data", "stage", "cp"), datetime.timedelta(seconds=77))
    assert run_ranks(2, limits) == [expected] * 2
