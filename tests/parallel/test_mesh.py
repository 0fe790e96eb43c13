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


def test_every_group_has_the_configured_timeout() -> None:
    expected = dict.fromkeys(("pp", "copies", "shards", "tp", "data", "stage", "cp"), datetime.timedelta(seconds=77))
    assert run_ranks(2, limits) == [expected] * 2
