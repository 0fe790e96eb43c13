"""Config of `launch`: how many processes, where, and under which scheduler."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..config.keys import Side, key
from ..config.problems import Problem


@dataclass(frozen=True)
class LaunchConfig:
    """Processes that `meshloom train` starts, and resources that `meshloom slurm` requests."""

    SIDE: ClassVar[Side] = Side.PLACEMENT

    nproc: Any = key("auto", "processes on this machine; auto: one per GPU, or one where there is none")
    nodes: int = key(1, "machines of the SLURM job")
    max_restarts: int = key(
        0, "how often torchrun starts all processes again after one has failed; they go on from the last checkpoint"
    )
    job_name: str = key("meshloom", "name of the SLURM job")
    partition: str | None = key(None, "partition of the SLURM job; null: the cluster's default")
    account: str | None = key(None, "account of the SLURM job; null: the cluster's default")
    time: str = key("24:00:00", "time limit of the SLURM job")
    gpus_per_node: int = key(8, "GPUs of each machine of the SLURM job")
    cpus_per_task: int | None = key(None, "CPU cores of each process of the SLURM job; null: the cluster's default")
    signal_seconds: int = key(300, "how long before its time limit the SLURM job saves, stops and queues itself again")

    def problems(self, key: str = "launch") -> list[Problem]:
        """Return what is wrong with the values."""
        found: list[Problem] = []

        def refuse(name: str, message: str, fix: str) -> None:
            found.append(Problem(f"{key}.{name}", message, fix))

        if self.nproc != "auto" and (not isinstance(self.nproc, int) or isinstance(self.nproc, bool) or self.nproc < 1):
            refuse("nproc", f"{self.nproc!r} is not a number of processes", "use auto, or 1 or more")
        for name, count in (("nodes", self.nodes), ("gpus_per_node", self.gpus_per_node)):
            if count < 1:
                refuse(name, f"{count} is not a number of them", "use 1 or more")
        if self.max_restarts < 0:
            refuse("max_restarts", f"{self.max_restarts} is negative", "use 0 for none")
        if self.signal_seconds < 1:
            refuse("signal_seconds", f"{self.signal_seconds} leaves no time to save", "use for example 300")
        if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", self.time):
            refuse("time", f"'{self.time}' is not a time limit", "write hours:minutes:seconds, or days-hours")
        return found


def under_torchrun() -> bool:
    """Return whether torchrun, or a scheduler that sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def visible_gpus() -> int:
    """Return the number of GPUs visible to this process, as far as that can be told without PyTorch."""
    there = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return there if visible is None else min(there, len([name for name in visible.split(",") if name.strip()]))


def gpu_count() -> int:
    """Return the number of GPUs that PyTorch can use in this process."""
    if not visible_gpus():
        return 0
    import torch

    return torch.cuda.device_count()


def planned_processes(launch: LaunchConfig) -> int:
    """Return the number of processes of a run on launch.nodes machines, perhaps others than this; 0 if not known."""
    per_node = launch.gpus_per_node if launch.nproc == "auto" and launch.nodes > 1 else run_processes(launch)
    return per_node * launch.nodes


def run_processes(launch: LaunchConfig) -> int:
    """Return the number of processes of a run: torchrun's world size, or without torchrun that of `launch.nproc`.

    0 if `launch.nproc` is not a number.
    """
    if under_torchrun():
        return int(os.environ["WORLD_SIZE"])
    if launch.nproc == "auto":
        return max(1, visible_gpus())
    return launch.nproc if isinstance(launch.nproc, int) and not isinstance(launch.nproc, bool) else 0
