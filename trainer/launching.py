"""Config of `launch`: how many processes, where, and under which scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..config.keys import Side, key


@dataclass
class LaunchConfig:
    """How `meshloom train` starts its processes, and what `meshloom slurm` asks the cluster for."""

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
