"""Problems of too little host memory or disk space for a run's checkpoints and offloaded state."""

from __future__ import annotations

from collections.abc import Iterator

from ..checkpoint.files import is_remote, open_files
from ..checkpoint.folder import step_of
from ..config.problems import Problem
from ..planner.checkpoint_needs import CheckpointNeeds, fewer_snapshots
from ..planner.host import free_disk
from ..planner.offload import OffloadAccount
from ..planner.tables import gib
from ..trainer.derived import checkpoint_folder
from ..trainer.schema import RunConfig


def shortages(config: RunConfig, needs: CheckpointNeeds, away: OffloadAccount, local: int, memory: float) -> Iterator[Problem]:
    """Yield a problem for each resource that is too small on this machine. Of a run on several nodes, check only the folder.

    away: bytes that a process offloads; local: processes of the machine; memory: bytes of host memory that are available
    """
    alone = config.launch.most_nodes == 1
    limit = config.checkpoint.host_memory_gib
    if limit is not None and limit * 2**30 < needs.least:
        yield Problem("checkpoint.host_memory_gib", f"saves will fail: they take {gib(needs.least)} GiB at least", "raise it")
    elif alone and needs.host and local * (needs.host + away.host) > memory:
        besides = f" beside {gib(local * away.host)} of what is offloaded" if away.host else ""
        message = f"snapshots take {gib(local * needs.host)} GiB{besides}, and {gib(memory)} GiB of host memory are free here"
        yield Problem("checkpoint.host_memory_gib", message, fewer_snapshots(needs))
    for key, place, size in (
        ("parallel.offload_path", config.parallel.offload_path, away.disk),
        ("checkpoint.snapshot_folder", config.checkpoint.snapshot_folder, needs.spill),
    ):
        free = free_disk(place) if alone and size and place else None
        if free is not None and local * size > free:
            message = f"{local} × {gib(size)} GiB are needed there, and {gib(free)} GiB are free here"
            yield Problem(key, message, "make room, or name a folder on another disk")
    folder = checkpoint_folder(config)
    free = None if is_remote(folder) or not needs.step else free_disk(folder)
    if free is not None:
        there = sum(step_of(name) is not None for name in open_files(folder).names())
        more = 1 if needs.kept is None else max(1, needs.kept - there)  # a run that goes on finds room that it has taken
        if more * needs.step > free:
            message = f"{more} of {gib(needs.step)} GiB are to come, and {gib(free)} GiB are free there"
            yield Problem("checkpoint.folder", message, "make room, lower checkpoint.keep, or use a folder on another disk")
