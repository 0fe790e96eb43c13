"""Config of `launch`: how many processes, where, and under which scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class LaunchConfig:
    """nproc: processes per node ("auto": one per GPU, or one on a CPU machine); nodes and the rest: for `meshloom slurm`."""

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
