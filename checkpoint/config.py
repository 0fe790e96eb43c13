"""Config of `checkpoint`: when the run's state is saved, how, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config.keys import Side, key
from ..config.problems import Problem
from .files import is_remote

OBJECT_STORE_FAULT = "host needs a mounted folder: processes can't write parts of one file to an object store"


@dataclass(frozen=True)
class CheckpointConfig:
    """Settings of checkpoints: when, how and where to save."""

    SIDE: ClassVar[Side] = Side.HABIT

    every: int | None = key(500, "steps between saves; null: only at the end; 0: never")
    keep: int = key(2, "newest complete steps that stay on disk; 0: all")
    mode: str = key("async", "async: copy while the next step computes, write in another process; sync: training waits")
    memory_every: int | None = key(None, "steps between snapshots into the in-memory tier; null: none")
    memory_group: int = key(2, "ranks that protect each other's snapshots: any one of a group may be lost; 2 is a mirror")
    folder: str | None = key(
        None, "a path or an fsspec URL such as s3://bucket/run; null: <output_dir>/checkpoints", Side.PLACEMENT
    )
    files: str = key(
        "rank",
        "rank: each rank writes a file, and its digests beside it; host: the ranks of a host write one file, with the digests"
        " in it. Not on object stores, which can't be written at offsets",
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
        Side.PLACEMENT,  # typed for one start: kept, it would drop state in silence at every later one
    )
    lost_layers: str = key(
        "refuse",
        "where files of the step that resume names are missing: refuse; neighbours: make layers that are wholly in them of"
        " those beside them (CheckFree), which changes the losses",
        Side.PLACEMENT,  # typed for one start, as strict is
    )
    failures: int = key(3, "failed saves in a row after which the run stops")
    timeout: float = key(600.0, "seconds without news from another rank or progress of the writer until a save is given up")

    def problems(self, key: str = "checkpoint") -> list[Problem]:
        """Return what is wrong with the values."""
        found: list[Problem] = []

        def refuse(name: str, message: str, fix: str) -> None:
            found.append(Problem(f"{key}.{name}", message, fix))

        if self.mode not in ("async", "sync"):
            refuse("mode", f"there is no mode {self.mode!r}", "use async or sync")
        if self.every is not None and self.every < 0:
            refuse("every", f"{self.every} is not a number of steps", "use 0 to never save, null to save at the end only")
        if self.keep < 0:
            refuse("keep", f"{self.keep} is not a number of steps", "use 0 to keep all")
        if self.memory_every is not None and self.memory_every < 1:
            refuse("memory_every", f"{self.memory_every} is not a number of steps", "use null to switch the memory tier off")
        if self.memory_group < 2:
            refuse("memory_group", f"a group of {self.memory_group} protects nobody", "use 2 for a mirror, 4 for XOR over four")
        if self.folder is not None and self.folder.startswith("memory://"):
            fix = "give a path, or the URL of a store that other processes see, too"
            refuse("folder", f"'{self.folder}' is the memory of one process, and another one writes checkpoints", fix)
        if self.files not in ("rank", "host"):
            refuse("files", f"there are no files of a {self.files!r}", "use rank or host")
        if self.files == "host" and self.folder is not None and is_remote(self.folder):
            refuse("files", OBJECT_STORE_FAULT, "use rank")
        if self.host_memory_gib is not None and not self.host_memory_gib > 0:
            refuse("host_memory_gib", f"{self.host_memory_gib} leaves no room", "use null for room for two snapshots")
        if self.device_memory_gib is not None and not self.device_memory_gib >= 0:
            refuse("device_memory_gib", f"{self.device_memory_gib} is no amount of memory", "use 0 for none")
        if self.snapshot_folder is not None and self.memory_every is not None:
            refuse(
                "snapshot_folder",
                "the in-memory tier (checkpoint.memory_every) keeps its snapshots in memory",
                "use one of them",
            )
        if self.snapshot_folder is not None and self.host_memory_gib is not None:
            refuse("snapshot_folder", "takes no host memory for checkpoint.host_memory_gib to limit", "use one of them")
        if self.lost_layers not in ("refuse", "neighbours"):
            refuse("lost_layers", f"there is no way {self.lost_layers!r} to replace layers", "use refuse or neighbours")
        if self.failures < 1:
            refuse("failures", f"{self.failures} failures can't be waited for", "use 1 to stop at the first")
        if not self.timeout > 0:
            refuse("timeout", f"{self.timeout} is not a time", "use for example 600")
        return found
