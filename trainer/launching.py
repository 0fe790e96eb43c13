"""Config of `launch`: how many processes, where, and under which scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class LaunchConfig:
    """How `meshloom train` starts its processes, and what `meshloom slurm` asks the cluster for.

    nproc           processes that `meshloom train` starts on this machine; auto: one per GPU, or one where there is none
    max_restarts    how often torchrun starts all processes again after one has failed; they go on from the last checkpoint
    nodes, gpus_per_node, cpus_per_task, time, partition, account, job_name   of the SLURM job; null: the cluster's default
    signal_seconds  how long before its time limit the SLURM job saves, stops and queues itself again
    """

    nproc: Any = "auto"
    nodes: int = 1
    max_restarts: int = 0
    job_name: str = "meshloom"
    partition: str | None = None
    account: str | None = None
    time: str = "24:00:00"
    gpus_per_node: int = 8
    cpus_per_task: int | None = None
    signal_seconds: int = 300
