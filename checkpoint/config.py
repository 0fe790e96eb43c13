"""Config of `checkpoint`: when the run's state is saved, how, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config.keys import Side, key
from ..config.problems import Problem


@dataclass
class CheckpointConfig:
    """When, how and where to save."""

    SIDE: ClassVar[Side] = Side.HABIT

    every: int | None = key(500, "steps between saves; null: only at the end; 0: never")
    keep: int = key(2, "newest complete steps that stay on disk; 0: all")
    mode: str = key("async", "async: copy while the next step computes, write in another process; sync: training waits")
    memory_every: int | None = key(None, "steps between snapshots into the in-memory tier; null: none")
    memory_group: int = key(2, "ranks that protect each other's snapshots: any one of a group may be lost; 2 is a mirror")
    folder: str | None = key(
        None, "a path or an fsspec URL such as s3://bucket/run; null: <output_dir>/checkpoints", Side.PLACEMENT
    )
    host_memory_gib: float | None = key(
        None,
        "most host memory of one rank for snapshots, one at least (two with memory_every); a save that finds it all taken is"
        " skipped and said so; null: room for two",
    )
    device_memory_gib: float | None = key(
        None,
        "most GPU memory of one rank for parts of a snapshot on their way to the host, so that the update need not wait;"
        " null: up to half of what is free; 0: none",
    )
    snapshot_folder: str | None = key(
        None,
        "folder on a local disk where a snapshot is put together, for state that memory can't hold (parallel.offload=nvme); it"
        " takes as much room as the state; null: in memory",
        Side.PLACEMENT,
    )
    strict: bool = key(
        True,
        "refuse to resume where optimizer state does not fit; false: what fits is loaded and the rest reported. Weights must"
        " always fit",
    )
    failures: int = key(3, "failed saves in a row after which the run stops")
    timeout: float = key(600.0, "seconds without news from another rank or progress of the writer until a save is given up")


def checkpoint_problems(config: CheckpointConfig) -> list[Problem]:
    """Everything in this group that can't be."""
    problems: list[Problem] = []

    def refuse(key: str, message: str, fix: str) -> None:
        problems.append(Problem(f"checkpoint.{key}", message, fix))

    if config.mode not in ("async", "sync"):
        refuse("mode", f"there is no mode {config.mode!r}", "use async or sync")
    if config.every is not None and config.every < 0:
        refuse("every", f"{config.every} is not a number of steps", "use 0 to never save, null to save at the end only")
    if config.keep < 0:
        refuse("keep", f"{config.keep} is not a number of steps", "use 0 to keep all")
    if config.memory_every is not None and config.memory_every < 1:
        refuse("memory_every", f"{config.memory_every} is not a number of steps", "use null to switch the memory tier off")
    if config.memory_group < 2:
        refuse("memory_group", f"a group of {config.memory_group} protects nobody", "use 2 for a mirror, 4 for XOR over four")
    if config.folder is not None and config.folder.startswith("memory://"):
        fix = "give a path, or the URL of a store that other processes see, too"
        refuse("folder", f"'{config.folder}' is the memory of one process, and another one writes checkpoints", fix)
    if config.host_memory_gib is not None and not config.host_memory_gib > 0:
        refuse("host_memory_gib", f"{config.host_memory_gib} leaves no room", "use null for room for two snapshots")
    if config.device_memory_gib is not None and not config.device_memory_gib >= 0:
        refuse("device_memory_gib", f"{config.device_memory_gib} is no amount of memory", "use 0 for none")
    if config.snapshot_folder is not None and config.memory_every is not None:
        refuse(
            "snapshot_folder", "the in-memory tier (checkpoint.memory_every) keeps its snapshots in memory", "use one of them"
        )
    if config.snapshot_folder is not None and config.host_memory_gib is not None:
        refuse("snapshot_folder", "takes no host memory for checkpoint.host_memory_gib to limit", "use one of them")
    if config.failures < 1:
        refuse("failures", f"{config.failures} failures can't be waited for", "use 1 to stop at the first")
    if not config.timeout > 0:
        refuse("timeout", f"{config.timeout} is not a time", "use for example 600")
    return problems
