"""Flight-recorder dumps, made by PyTorch itself: the collective that a rank lacks is found."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist

from meshloom.launch.watch.recorder import read_dumps
from support.ranks import run_ranks


def dump(rank: int, world_size: int) -> dict[str, Any]:
    """Run two collectives on all ranks and one in a group that rank 1 leaves out. gloo's sends let nobody wait for it."""
    dist.all_reduce(torch.ones(3, 2))
    pair = dist.new_group([0, 1], group_desc="pair")
    dist.all_reduce(torch.ones(5), group=pair)
    if rank != 1:
        dist.broadcast(torch.ones(7), src=0, group=pair, async_op=rank == 0)
    found: bytes = torch._C._distributed_c10d._dump_fr_trace()  # pyright: ignore[reportAttributeAccessIssue]
    return pickle.loads(found)


@pytest.fixture(scope="module")
def dumps() -> dict[int, dict[str, Any]]:
    if not hasattr(torch._C._distributed_c10d, "_dump_fr_trace"):
        pytest.skip("this PyTorch records no collectives of gloo")
    return dict(enumerate(run_ranks(2, dump)))


def test_the_missing_rank_and_its_collective(dumps: dict[int, dict[str, Any]]) -> None:
    told = read_dumps(dumps)
    assert "broadcast (7)" in told and "group pair" in told and told.endswith("not joined by rank 1"), told


def test_nothing_is_said_where_all_joined(dumps: dict[int, dict[str, Any]]) -> None:
    assert read_dumps({0: dumps[1], 1: dumps[1]}) == "" and read_dumps({0: dumps[0]}) == "" and read_dumps({}) == ""


def test_a_device_that_has_not_begun_is_named(dumps: dict[int, dict[str, Any]]) -> None:
    """On GPUs all hosts have queued the collective, and only one device has not come to it."""
    begun, waiting = copy.deepcopy(dumps[1]), copy.deepcopy(dumps[1])
    for one, state in ((begun, "started"), (waiting, "scheduled")):
        for entry in one["entries"]:
            entry["state"] = "completed"
        one["entries"][-1]["state"] = state
    assert read_dumps({0: begun, 1: waiting}).endswith("not joined by rank 1")
