"""Waiting for functional collectives is measured, wherever they are called from."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from meshloom.parallel.collective_waits import measure_collectives
from support.ranks import run_ranks

LATE = 0.25


class Stopwatch:
    """Measures what is waited for, as a run does."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.waits.append(time.monotonic() - began)


def summed(x: torch.Tensor) -> torch.Tensor:
    return funcol.wait_tensor(funcol.all_reduce(x * 2, "sum", dist.group.WORLD)) + 1


def redistributed(x: torch.Tensor) -> torch.Tensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return DTensor.from_local(x, mesh, [Partial()]).redistribute(mesh, [Replicate()]).to_local()


def sent(x: torch.Tensor) -> torch.Tensor:
    return funcol.all_to_all_single_autograd(x, None, None, dist.group.WORLD) * 2


def waits_for_the_other(rank: int, call: Callable[[], Any]) -> bool:
    """Return whether a call is seen to wait for rank 1, which is late."""
    measured = Stopwatch()
    end = measure_collectives(torch.device("cpu"), measured)
    dist.barrier()
    time.sleep(rank * LATE)
    call()
    end()
    seen = len(measured.waits)
    summed(torch.ones(2))
    assert seen == len(measured.waits) > 0, "what is measured begins and ends with the call"
    return sum(measured.waits) > LATE / 2


def all_waits(rank: int, world_size: int) -> list[bool]:
    x = torch.ones(world_size, requires_grad=True)
    compiled: Any = torch.compile(summed, backend="aot_eager")
    compiled(x.detach())
    calls = [
        lambda: summed(x.detach()),
        lambda: redistributed(x).sum(),
        lambda: sent(x).sum().backward(),
        lambda: compiled(x.detach()),
    ]
    return [waits_for_the_other(rank, call) for call in calls]


def test_waiting_for_a_late_rank_is_measured_in_every_kind_of_call() -> None:
    """That of a backward pass and of a compiled function, too."""
    assert run_ranks(2, all_waits, timeout=60.0) == [[True] * 4, [False] * 4]


def threads(rank: int, world_size: int) -> bool:
    """Return whether another thread runs while this one waits for the last rank."""
    measure_collectives(torch.device("cpu"), contextlib.nullcontext)
    ran = threading.Event()
    dist.barrier()
    if rank:
        time.sleep(2 * LATE)
    else:
        threading.Timer(LATE / 4, ran.set).start()
    began = time.monotonic()
    summed(torch.ones(2))
    return ran.is_set() or time.monotonic() - began < LATE


def test_other_threads_run_meanwhile() -> None:
    assert all(run_ranks(2, threads))
