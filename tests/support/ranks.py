"""Run a function on several ranks, each a process forked from this one (torch is imported already: tenths of a second).

    def body(rank: int, world_size: int, factor: int) -> float: ...
    results = run_ranks(4, body, 3)      # results[r] is what rank r returned

The process group (gloo, loopback, a file store) exists inside `body`. The first rank that raises fails the test with its
traceback; ranks that wait for it are ended.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def share_gloo_device() -> None:
    """Let all process groups of this process send through one gloo device.

    PyTorch gives each group a device of its own, whose thread wakes a hundred times a second though nothing is sent. A body
    that trains many layouts has hundreds of groups: four ranks with 13 rows spent a third of their CPU time on that.
    """
    backend = dist.ProcessGroupGloo
    create, device = backend.__init__, backend.create_default_device()

    def create_on_device(self: Any, store: Any, rank: int, size: int, timeout: datetime.timedelta) -> None:
        options = backend._Options()
        options._devices, options._timeout = [device], timeout
        create(self, store, rank, size, options)

    backend.__init__ = create_on_device


def _child(rank: int, world_size: int, store: str, pipe: Any, timeout: float, body: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
    try:
        share_gloo_device()
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        result = pickle.dumps((True, body(rank, world_size, *args)))
    except BaseException:  # whatever went wrong is for the parent to report
        result = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(result)
    pipe.poll(timeout)  # the parent has all results: before, an end could reset a connection that a peer still reads from
    os._exit(0)  # no interpreter shutdown: a peer that died must not make this one hang


def run_ranks(world_size: int, body: Callable[..., Any], *args: Any, timeout: float = 150.0) -> list[Any]:
    """Call `body(rank, world_size, *args)` on every rank; returns what each returned, in rank order.

    A body may have an attribute `prepare`: it is called here once as `prepare(world_size, *args)`, and returns the arguments
    that all ranks get in their place.
    """
    # A process group that has ended here must not be destroyed in a child: it would wait for threads that a fork leaves behind.
    gc.collect()
    gc.freeze()  # so that neither this process nor a child looks through the same objects again
    if prepare := getattr(body, "prepare", None):
        args = prepare(world_size, *args)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        children: list[Any] = []
        pipes: list[Any] = []
        for rank in range(world_size):
            here, there = context.Pipe()
            child = context.Process(
                target=_child, args=(rank, world_size, f"{folder}/store", there, timeout, body, args), daemon=False
            )
            child.start()
            there.close()
            children.append(child)
            pipes.append(here)
        results: dict[int, Any] = {}
        failure: str | None = None
        deadline = time.monotonic() + timeout
        try:
            while len(results) < world_size and failure is None:
                waiting = [pipes[rank] for rank in range(world_size) if rank not in results]
                ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    missing = [rank for rank in range(world_size) if rank not in results]
                    failure = f"ranks {missing} did not finish within {timeout} s"
                for pipe in ready:
                    rank = pipes.index(pipe)
                    try:
                        good, value = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        good, value = False, f"the process died with exit code {children[rank].exitcode}"
                    if good:
                        results[rank] = value
                    else:
                        failure = f"rank {rank} of {world_size} failed:\n{value}"
                        break
        finally:
            for child, pipe in zip(children, pipes, strict=True):
                if failure is not None:
                    child.kill()
                    continue
                with contextlib.suppress(OSError):  # one that was killed behind its result
                    pipe.send_bytes(b"end")
            for child in children:
                child.join(10)
        if failure is not None:
            raise AssertionError(failure)
    return [results[rank] for rank in range(world_size)]
