"""The time that a rank waits under FSDP2 is not counted as its own work."""

from __future__ import annotations

import contextlib
import inspect
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

from meshloom.parallel import mesh
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.heartbeat import Heartbeat, Phase, read_beat
from meshloom.parallel.torch import fsdp_waiting
from meshloom.parallel.torch.fsdp_waiting import WAITING
from support.parity import Work, global_tokens, share, train
from support.ranks import run_ranks

LAYOUTS = [(2, ParallelConfig(zero=2)), (2, ParallelConfig(zero=3)), (4, ParallelConfig(zero=3, replicate=2))]
PATIENCE, STILL = 30.0, 0.2


def waits_for_rank_one(path: Path) -> bool:
    """Return whether the rank with this heartbeat comes to wait in an exchange."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        before = read_beat(path)
        time.sleep(STILL)
        after = read_beat(path)
        if before is not None and after is not None and before.beats == after.beats and after.phase is Phase.EXCHANGE:
            return True
    return False


def phases_of_the_others(rank: int, world_size: int, parallel: ParallelConfig, folder: Path) -> tuple[bool, set[Phase]]:
    """Return whether the other ranks wait while rank 1 is in its forward pass, and the phases of an evaluation."""
    mesh.Heartbeat = lambda: Heartbeat(folder / f"{rank}.beat")  # type: ignore[assignment,misc]
    work = Work(samples=world_size, parallel=parallel, steps=1)
    engine, _, _ = train(work, world_size)
    heartbeat, found = engine.mesh.heartbeat, list[bool]()

    def wait(*_: object) -> None:
        found.extend(waits_for_rank_one(folder / f"{each}.beat") for each in range(world_size) if each != 1)

    batch = share(engine.mesh, work, 0)
    hook = engine.module.register_forward_pre_hook(wait) if rank == 1 else None
    engine.accumulate(batch, global_tokens(engine.mesh, batch))
    engine.zero_grad()
    if hook is not None:
        hook.remove()
    seen: set[Phase] = set()
    heartbeat.beat(Phase.EVALUATION)
    beat, interrupt = heartbeat.beat, heartbeat.interrupt
    heartbeat.beat = lambda phase, micro_batch=0: (seen.add(phase), beat(phase, micro_batch))[1]  # type: ignore[method-assign]
    heartbeat.interrupt = lambda phase: (seen.add(phase), interrupt(phase))[1]  # type: ignore[method-assign]
    engine.evaluate(batch.micro_batches)
    return all(found), seen


@pytest.mark.parametrize(("ranks", "parallel"), LAYOUTS)
def test_a_rank_that_waits_for_a_slow_one_says_so(ranks: int, parallel: ParallelConfig, tmp_path: Path) -> None:
    assert run_ranks(ranks, phases_of_the_others, parallel, tmp_path) == [(True, {Phase.EVALUATION})] * ranks


class Group:
    """Stands for FSDP2's record of a module's weights."""

    def __init__(self) -> None:
        self._all_gather_result: object | None = None
        self.is_unsharded = False
        for name in WAITING:
            setattr(self, name, list)


def enclosed(device: str, calls: Sequence[str], *, main: bool = True, group: Any = None) -> tuple[Any, list[str]]:
    """Return a group whose waiting is enclosed, and the list of what was told of it."""
    told: list[str] = []

    @contextlib.contextmanager
    def waiting() -> Iterator[None]:
        told.append("waits")
        yield

    group = group or Group()
    mesh = SimpleNamespace(device=torch.device(device), is_main=main, compute_time=SimpleNamespace(waiting=waiting))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp_waiting, "fsdp_groups", lambda _: [group])
        fsdp_waiting.enclose_waiting(cast(Any, None), cast(Any, mesh))
    for name in calls:
        getattr(group, name)()
    return group, told


def test_a_rank_with_nothing_to_wait_for_does_not_wait() -> None:
    assert enclosed("cpu", ["wait_for_unshard"])[1] == []
    group, told = enclosed("cpu", ["unshard"])
    assert told == ["waits"]
    group.is_unsharded = True
    group.unshard()
    assert told == ["waits"]
    group.is_unsharded, group._all_gather_result = False, object()
    group.unshard()
    group.wait_for_unshard()
    assert told == ["waits"] * 2
    group.post_backward()
    assert told == ["waits"] * 3


def test_a_gather_that_is_only_queued_on_a_gpu_is_no_waiting() -> None:
    assert enclosed("cuda", ["unshard"])[1] == []  # the stream that computes waits later
    assert enclosed("cuda", ["finalize_backward"])[1] == ["waits"]


def test_a_changed_fsdp_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    fsdp_waiting._warn_of_change.cache_clear()
    for main in (False, True, True):
        changed = Group()
        del changed._all_gather_result
        assert enclosed("cpu", ["unshard"], main=main, group=changed)[1] == []
        assert len(caplog.records) == main


def test_private_names_of_fsdp_are_there() -> None:
    assert all(callable(getattr(FSDPParamGroup, name)) for name in WAITING) and hasattr(FSDPParamGroup, "is_unsharded")
    module = inspect.getsource(sys.modules[FSDPParamGroup.__module__])
    assert "self.unshard(" in module and "self.wait_for_unshard(" in module  # looked up on the instance
    assert "self._all_gather_result: " in module and "if not self._all_gather_result:" in module
    assert ".post_backward()" in module and "finalize_backward()" in inspect.getsource(FSDPState)
