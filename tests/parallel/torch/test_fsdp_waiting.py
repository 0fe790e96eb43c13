"""What a rank waits for under FSDP2 is not counted as its own work."""

from __future__ import annotations

import inspect
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

from meshloom.parallel import mesh
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.heartbeat import Heartbeat, Phase, read_beat
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
    beat = heartbeat.beat
    heartbeat.beat = lambda phase, micro_batch=0: (seen.add(phase), beat(phase, micro_batch))[1]  # type: ignore[method-assign]
    engine.evaluate(batch.micro_batches)
    return all(found), seen


@pytest.mark.parametrize(("ranks", "parallel"), LAYOUTS)
def test_who_waits_for_a_slow_rank_says_so(ranks: int, parallel: ParallelConfig, tmp_path: Path) -> None:
    assert run_ranks(ranks, phases_of_the_others, parallel, tmp_path) == [(True, {Phase.EVALUATION})] * ranks


def test_what_is_private_in_fsdp_is_there() -> None:
    assert all(callable(getattr(FSDPParamGroup, name)) for name in WAITING)
    module = inspect.getsource(sys.modules[FSDPParamGroup.__module__])
    assert "self.unshard(" in module and "self.wait_for_unshard(" in module  # looked up on the instance
    assert ".post_backward()" in module and "finalize_backward()" in inspect.getsource(FSDPState)
